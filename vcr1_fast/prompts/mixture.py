"""In which order a run goes through the examples of several tasks: by size, or by weight.

Both orders are pure functions of the position in the stream: a resumed run needs the position and nothing else, and all
ranks agree without asking each other. Used by prompts/stream.py.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from vcr1_fast.prompts.dataset import DataOrder
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.types import Example

BLOCK = 100  # positions after which the shares of the tasks are exact


class ExampleOrder(Protocol):
    """Which example stands at which position of an endless stream."""

    def indices(self, start: int, count: int) -> list[int]:
        """Indices of the examples at the positions start .. start + count - 1."""
        ...

    def epochs(self, position: int) -> dict[str, float]:
        """Task -> passes through its examples that lie before `position`."""
        ...


def make_order(examples: Sequence[Example], weights: Mapping[str, float], seed: int) -> ExampleOrder:
    """`weights` is `data.mixture`: empty for BySize, else for ByWeight.

    Raises ConfigError when a task has a weight but no example, or examples but no weight, or too small a weight.
    """
    tasks = [example.task for example in examples]
    return ByWeight(tasks, weights, seed) if weights else BySize(tasks, seed)


class BySize:
    """All examples shuffled together: a task comes as often as it has examples."""

    def __init__(self, tasks: Sequence[str], seed: int) -> None:
        """`tasks`: the task of each example."""
        self._tasks = tasks
        self._sizes = Counter(tasks)
        self._order = DataOrder(len(tasks), seed)

    def indices(self, start: int, count: int) -> list[int]:
        return self._order.indices(start, count)

    def epochs(self, position: int) -> dict[str, float]:
        whole, rest = divmod(position, len(self._tasks))
        begun = Counter(self._tasks[i] for i in self._order.indices(position - rest, rest))
        return {task: whole + begun[task] / size for task, size in sorted(self._sizes.items())}


class ByWeight:
    """Each block of 100 positions holds every task exactly so many times, in an order shuffled block by block.

    A task's count is 100 weight / (sum of weights), rounded by largest remainder: all rounded down, then the tasks with
    the largest fractions get one more each until there are 100 (of equal fractions the first by name). So proportions
    are exact when they are whole percents, and at most one position in 100 off otherwise.

    Inside a task: one seeded permutation of its examples per epoch, each example once, on any number of ranks.
    """

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float], seed: int) -> None:
        """`tasks`: the task of each example. Raises ConfigError as `make_order` says."""
        self._members: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            self._members.setdefault(task, []).append(index)
        _check_names(weights, {task: len(members) for task, members in self._members.items()})
        self.counts = block_counts(weights)
        self._names = list(self.counts)
        self._seed = seed
        # The name is part of the seed: two tasks of one size must not go through their examples in the same order.
        self._orders = {
            task: DataOrder(len(self._members[task]), (seed << 32) + zlib.crc32(task.encode())) for task in self._names
        }

    def indices(self, start: int, count: int) -> list[int]:
        tasks = self._tasks_at(start, count)
        first = self._num_before(start)
        wanted = Counter(tasks)
        upcoming = {task: iter(self._orders[task].indices(first[task], wanted[task])) for task in wanted}
        return [self._members[task][next(upcoming[task])] for task in tasks]

    def epochs(self, position: int) -> dict[str, float]:
        before = self._num_before(position)
        return {task: before[task] / len(self._members[task]) for task in self._names}

    def _tasks_at(self, start: int, count: int) -> list[str]:
        """The task of each position start .. start + count - 1."""
        first_block, offset = divmod(start, BLOCK)
        num_blocks = -(-(offset + count) // BLOCK)
        sizes, blocks = tuple(self.counts.values()), range(first_block, first_block + num_blocks)
        slots = [i for block in blocks for i in _shuffled_block(sizes, self._seed, block)]
        return [self._names[i] for i in slots[offset : offset + count]]

    def _num_before(self, position: int) -> Counter[str]:
        """Positions of each task before `position`."""
        blocks, rest = divmod(position, BLOCK)
        begun = Counter(self._tasks_at(blocks * BLOCK, rest))
        return Counter({task: blocks * self.counts[task] + begun[task] for task in self._names})


def block_counts(weights: Mapping[str, float]) -> dict[str, int]:
    """Positions of each task in a block of 100, by name; tasks of weight 0 are left out.

    Raises ConfigError when a weight is positive and gets none.
    """
    total = sum(weights.values())
    exact = {task: BLOCK * weight / total for task, weight in sorted(weights.items()) if weight > 0}
    counts = {task: int(share) for task, share in exact.items()}
    # Rounded before it is compared: 0.1 + 0.2 and such must not decide which of two equal fractions comes first.
    by_fraction = sorted(exact, key=lambda task: (-round(exact[task] - counts[task], 9), task))
    for task in by_fraction[: BLOCK - sum(counts.values())]:
        counts[task] += 1
    for task, count in counts.items():
        if count == 0:
            raise ConfigError(
                f"data.mixture.{task} is {weights[task]}, less than one in {BLOCK} of all weights together, {total}: "
                "raise it, or leave the task out with 0"
            )
    return counts


def _check_names(weights: Mapping[str, float], sizes: Mapping[str, int]) -> None:
    there_is = ", ".join(f"{task} ({size:,} examples)" for task, size in sorted(sizes.items()))
    for task in weights:
        if task not in sizes:
            raise ConfigError(f"data.mixture names {task!r}, but data.train has no example of it; there is: {there_is}")
    for task in sizes:
        if task not in weights:
            raise ConfigError(
                f"data.mixture has no weight for {task}: give it one, 0 leaves it out; there is: {there_is}"
            )


@lru_cache(maxsize=16)
def _shuffled_block(sizes: tuple[int, ...], seed: int, block: int) -> list[int]:
    """sizes[i] times i, shuffled."""
    words = np.random.Philox(np.random.SeedSequence([seed % 2**64, block, BLOCK])).random_raw(BLOCK)
    slots = np.repeat(np.arange(len(sizes)), sizes)
    return slots[np.argsort(words, kind="stable")].tolist()
