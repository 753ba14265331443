"""Rollout engines by events, for `python -m bench rollouts`: what each draws, and when, by assumed rates.

An engine fills a group's prompt once, stops decoding meanwhile, and takes groups while it has rows. A token of all its
rows takes the slower of bytes (weights, then keys and values of each row) and arithmetic; sampling and the scheduler
are left out.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from vcr1_fast.fake_gpu.predict import H100_RATES, Rates
from vcr1_fast.learner.model_size import model_size
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config

SEVEN = model_size(whole_config(PUBLIC_SIZES["Qwen2.5-VL-7B"]), "Qwen2.5-VL-7B")
READ = SEVEN.layers * SEVEN.layer_params + SEVEN.vocab * SEVEN.hidden  # weights a token: layers and head
FILLED = SEVEN.layers * SEVEN.layer_params + 4 * SEVEN.tower_depth * SEVEN.tower_block_params  # 4 patches a token
PAIR_FLOP = 4 * SEVEN.layers * SEVEN.heads_width


def decode_seconds(rows: int, cached: float, count: int = 1, rates: Rates = H100_RATES) -> float:
    """Of `count` tokens of each of the rows, of whose caches the first reads `cached` tokens, all rows' together."""
    pairs = count * cached + rows * count * (count - 1) / 2
    bytes_s = (2 * READ * count + SEVEN.kv_bytes_per_token * pairs) / rates.memory_bytes_s
    return max(bytes_s, (2 * rows * READ * count + PAIR_FLOP * pairs) / rates.gemm_flop_s)


def fill_seconds(prompt: int, begun: Sequence[int], rates: Rates = H100_RATES) -> float:
    """Of a prompt of so many tokens, taken as video, and of what its answers have already."""
    pairs = prompt * (prompt + 1) / 2 + sum(length * (prompt + (length + 1) / 2) for length in begun)
    attention_s = rates.attention_seconds(round(PAIR_FLOP * pairs), is_backward=False, version="fa3")
    products = prompt * FILLED + sum(begun) * SEVEN.layers * SEVEN.layer_params
    return 2 * products / rates.gemm_flop_s + attention_s


@dataclass(eq=False)
class Group:
    prompt: int  # tokens
    lengths: list[int]  # tokens of its answers
    left: list[int]  # of them, to be drawn yet; those under way are noted when the engine stops
    is_carried: bool = False  # from the step before

    @property
    def is_done(self) -> bool:
        return not any(self.left)


class Engine:
    """One engine's rows in a step."""

    def __init__(self, speed: float = 1.0) -> None:
        self.now = self.decode_s = self.fill_s = 0.0
        self.num_tokens = self.num_steps = self.num_read = 0  # drawn; of decoding; of caches, for all tokens together
        self._speed = speed
        self._cached = 0  # tokens in the caches of all rows
        self._rows: list[tuple[int, int, Group, int]] = []  # heap: step it ends at, a tie, its group, place in this
        self._ties = itertools.count()

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def fill(self, group: Group) -> None:
        """Reads its prompt once, and the tokens of answers that go on, as sgl/video.py asks for it."""
        places = [place for place, left in enumerate(group.left) if left]
        cached = [group.prompt + group.lengths[place] - group.left[place] for place in places]
        seconds = fill_seconds(group.prompt, [n - group.prompt for n in cached]) / self._speed
        self.now += seconds
        self.fill_s += seconds
        self._cached += sum(cached)
        for place in places:
            heapq.heappush(self._rows, (self.num_steps + group.left[place], next(self._ties), group, place))

    def end_of(self, count: int) -> float:
        """When it has drawn `count` more tokens of each row."""
        return self.now + decode_seconds(self.num_rows, self._cached + self.num_rows, count) / self._speed

    def next_end(self) -> float:
        """When the next of its answers ends."""
        return self.end_of(self._rows[0][0] - self.num_steps)

    def advance(self, now: float) -> list[Group]:
        """Draw until then, at most to the next end; the groups that are finished, which leave."""
        if now <= self.now or not self._rows:
            return []
        count = bisect.bisect_right(range(1, self._rows[0][0] - self.num_steps + 1), now, key=self.end_of)
        self.num_tokens += count * self.num_rows
        self.num_read += count * self._cached + self.num_rows * count * (count + 1) // 2
        self._cached += count * self.num_rows
        self.num_steps += count
        self.decode_s += now - self.now
        self.now = now
        done: list[Group] = []
        while self._rows and self._rows[0][0] == self.num_steps:
            _, _, group, place = heapq.heappop(self._rows)
            group.left[place] = 0
            self._cached -= group.prompt + group.lengths[place]
            done += [group] if group.is_done else []
        return done

    def stop(self, now: float) -> list[Group]:
        """The same, and note how far the other answers are."""
        done = self.advance(now)
        for end, _, group, place in self._rows:
            group.left[place] = end - self.num_steps
        return done


def draw(engines: Sequence[Engine], lists: Sequence[list[Group]], wanted: int, max_rows: int) -> list[Group]:
    """`wanted` groups, finished, among them all that are carried. An engine takes the next of its list when it has
    room, and all stop when there are enough; one list for several engines is one queue."""
    groups = list(dict.fromkeys(itertools.chain(*lists)))
    done = [group for group in groups if group.is_done]  # in the step before, which did not need them
    num_owed = sum(group.is_carried and not group.is_done for group in groups)
    queues = {id(own): deque(group for group in own if not group.is_done) for own in lists}
    events = [(engine.now, index) for index, engine in enumerate(engines)]
    while events:
        now, index = heapq.heappop(events)
        engine, queue = engines[index], queues[id(lists[index])]
        found = engine.advance(now)
        done += found
        num_owed -= sum(group.is_carried for group in found)
        if len(done) >= wanted and not num_owed:
            done += itertools.chain.from_iterable([other.stop(now) for other in engines])
            break
        if queue and engine.num_rows + len(queue[0].lengths) <= max_rows:
            engine.fill(queue.popleft())
            heapq.heappush(events, (engine.now, index))
        elif engine.num_rows:
            heapq.heappush(events, (engine.next_end(), index))
    return sorted(done, key=lambda group: not group.is_carried)[:wanted]
