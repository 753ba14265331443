"""The endless stream of training prompts: data order -> example -> prompt, bad samples set aside and counted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from vcr1_fast.config import Config, ConfigError
from vcr1_fast.learner.sharding import World, all_reduce_sum
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.prompts.dataset import shard
from vcr1_fast.prompts.difficulty import read_rewards, select_by_reward
from vcr1_fast.prompts.mixture import make_order
from vcr1_fast.types import Example, Prompt, SampleError
from vcr1_fast.video.quarantine import Quarantine

NUM_READERS = 4  # clips read at once; decoding releases the interpreter lock
MIN_SAMPLES_TO_JUDGE = 20  # a bad fraction of fewer samples says nothing


class TooManyBadSamplesError(SampleError):
    """More of the data is unusable than train.max_bad_sample_frac allows."""


class PromptStream:
    """Hands each rank its share of the next prompts. Its only state is `position`, the items handed out so far."""

    def __init__(
        self, examples: Sequence[Example], builder: PromptBuilder, quarantine: Quarantine, config: Config, world: World
    ) -> None:
        """Raises ConfigError when there are no examples, also after data.reward_range, and for a wrong data.mixture."""
        if not examples:
            raise ConfigError("data.train has no usable example: see the messages above, or name other files")
        if config.data.rewards is not None and config.data.reward_range is not None:
            selection = select_by_reward(examples, read_rewards(config.data.rewards), config.data.reward_range)
            examples = selection.examples
            if world.is_main:
                print(selection, file=sys.stderr)
        self.examples, self.builder, self.quarantine = examples, builder, quarantine
        self.config, self.world = config, world
        self.order = make_order(examples, config.data.mixture, config.train.seed)
        self.position = 0
        # One torch thread each: an OpenMP team per reader would put libgomp above the number of cores, where it stops
        # spinning between operations and made the update of the tiny model twice as slow (0.35 s -> 0.8 s on 2 cores).
        self._pool = ThreadPoolExecutor(NUM_READERS, "read-video", initializer=torch.set_num_threads, initargs=(1,))
        self.num_read = self.num_bad = 0  # since this process started, over all ranks

    @property
    def epoch(self) -> float:
        """Items handed out, in passes through all examples; with `data.mixture` tasks may be ahead of or behind it."""
        return self.position / len(self.examples)

    def metrics(self) -> dict[str, float]:
        """epoch, `epoch/{task}` (passes through the examples of each task) and bad_samples."""
        by_task = {f"epoch/{task}": epoch for task, epoch in self.order.epochs(self.position).items()}
        return {"epoch": self.epoch, **by_task, "bad_samples": float(self.num_bad)}

    def next(self, count: int) -> list[Prompt]:
        """This rank's share of the next `count` items over all ranks, without those that cannot be used.

        Raises TooManyBadSamplesError on every rank alike.
        """
        indices = self.order.indices(self.position, count)
        self.position += count
        share = [self.examples[i] for i in shard(indices, self.world.rank, self.world.world_size)]
        wanted = [example for example in share if example.video not in self.quarantine]
        built = list(self._pool.map(self._build, wanted))
        prompts = [result for result in built if isinstance(result, Prompt)]
        for result in built:
            if isinstance(result, SampleError):
                self.quarantine.add(result)
                print(f"bad sample: {result}", file=sys.stderr)
        bad = all_reduce_sum({"bad": float(len(share) - len(prompts))}, self.world)["bad"]
        self.num_read += count
        self.num_bad += int(bad)
        self._check_bad_fraction()
        return prompts

    def _build(self, example: Example) -> Prompt | SampleError:
        try:
            return self.builder.build(example)
        except SampleError as error:
            return error

    def _check_bad_fraction(self) -> None:
        limit = self.config.train.max_bad_sample_frac
        if self.num_read >= MIN_SAMPLES_TO_JUDGE and self.num_bad > limit * self.num_read:
            raise TooManyBadSamplesError(
                "data.train",
                f"{self.num_bad} of {self.num_read} samples could not be used, more than "
                f"train.max_bad_sample_frac = {limit}: the reasons are in quarantine.jsonl of the run",
            )
