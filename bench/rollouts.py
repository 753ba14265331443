"""`python -m bench rollouts`: answer tokens a second of a step by who answers which group, simulated for 7B on 8 H100.

Events of continuous batching, by the rates of fake_gpu/predict.py: EVERY SPEED HERE IS PREDICTED, NONE MEASURED. An
engine fills a group's prompt once, stops decoding meanwhile, and takes groups up to ROWS rows. A token of all its
rows takes the slower of bytes (weights, then keys and values of each row) and arithmetic; sampling and the scheduler
are left out. Lengths are drawn, the same for all ways; half of their log's variance is the prompt's. The update goes at
the tokens a second that `bench predict` has for such groups, and is shared out evenly.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.columns import heads_of, print_rows
from bench.predict_points import RESULTS
from vcr1_fast.fake_gpu.predict import H100_RATES, Rates
from vcr1_fast.learner.model_size import ModelSize, model_size
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config

SEVEN = model_size(whole_config(PUBLIC_SIZES["Qwen2.5-VL-7B"]), "Qwen2.5-VL-7B")
ENGINES, GROUP = 8, 8
ROWS = 128  # of an engine: what 131,072 tokens of KV cache beside a learner hold, at 3.8k of a prompt and 500 an answer
PROMPT, MIXED = 3770, (1000, 15000)  # tokens; mixed: log-uniform between
EXTRA = 0.2  # of over-provisioning
LENGTHS = {"short": (180.0, 0.35, 300), "long": (350.0, 0.9, 2048)}  # log-normal: median, deviation of the log; most
WARM = 5  # steps that are not counted: what is left over must be there first
AS_IT_IS = "each its own"
COLUMNS = {
    "name": ("case", "groups a GPU in a step, and what is unusual in them"),
    "way": (
        "way",
        "each its own: groups are dealt out to the engines beforehand; one queue: an engine with room takes the next; "
        "0.2 more: rollout.over_provision; lag 1: rollout.max_policy_lag, engine and update taking turns on a GPU",
    ),
    "tokens_per_s": ("tokens/s", "PREDICTED: answer tokens learned from, a second and GPU"),
    "gain": ("gain", "over each its own"),
    "rollout_s": ("rollout s", "until the last engine is done, mean over steps"),
    "idle": ("idle", "share of it in which a mean engine has ended already"),
    "update_s": ("update s", "of a step"),
}
GAINS = ("one queue", "0.2 more", "one queue + 0.2 more", "lag 1", "one queue + lag 1", "0.2 more + lag 1")
GAIN_COLUMNS = {key: COLUMNS[key] for key in ("name", "tokens_per_s")} | {w: (w, "gain of this way") for w in GAINS}
COLUMN_HEADS = heads_of(COLUMNS, GAIN_COLUMNS)


@dataclass(frozen=True)
class Case:
    name: str
    groups: int  # of each GPU in a step
    lengths: str
    is_mixed: bool = False  # prompts of unequal lengths
    slowest: float = 1.0  # speed of one of the engines


CASES = (
    Case("1 group, short", 1, "short"),
    Case("1 group, long", 1, "long"),
    Case("8 groups, short", 8, "short"),
    Case("8 groups, long", 8, "long"),
    Case("8 groups, long, mixed prompts", 8, "long", is_mixed=True),
    Case("8 groups, long, one engine at 0.8", 8, "long", slowest=0.8),
    Case("32 groups, short", 32, "short"),
    Case("32 groups, long", 32, "long"),
    Case("32 groups, long, one engine at 0.8", 32, "long", slowest=0.8),
)


@dataclass(eq=False)
class Group:
    prompt: int
    lengths: np.ndarray  # [G] tokens of its answers
    drawn: np.ndarray  # [G] of them
    is_carried: bool = False  # from the step before

    @property
    def is_done(self) -> bool:
        return bool((self.drawn == self.lengths).all())


def groups_of(case: Case, count: int, rng: np.random.Generator) -> list[Group]:
    median, deviation, most = LENGTHS[case.lengths]
    logs = rng.normal(0, deviation / 2**0.5, (count, 1)) + rng.normal(0, deviation / 2**0.5, (count, GROUP))
    lengths = np.clip(median * np.exp(logs), 16, most).astype(int)
    shortest, longest = MIXED if case.is_mixed else (PROMPT, PROMPT)
    prompts = shortest * (longest / shortest) ** rng.uniform(0, 1, count)
    return [Group(int(p), row, np.zeros(GROUP, int)) for p, row in zip(prompts, lengths, strict=True)]


class Engine:
    """One engine's rows, and the tokens that it draws until the next of them ends."""

    def __init__(self, speed: float = 1.0, rates: Rates = H100_RATES, size: ModelSize = SEVEN) -> None:
        self.now = 0.0
        self.groups: list[Group] = []
        self.ends = np.zeros(0)  # when each of the next tokens is there
        self._speed, self._rates, self._size = speed, rates, size
        self._weights = size.layers * size.layer_params
        self._attention_width = 4 * size.layers * size.heads_width
        # of answers under way: tokens left, tokens in the cache, place in its group
        self.row_B3 = np.zeros((0, 3), int)
        self._group_B: list[Group] = []

    def fill(self, group: Group) -> None:
        """Reads its prompt once; an answer that goes on is a request of its own, as in sglang_engine.py."""
        places = np.flatnonzero(group.drawn < group.lengths)
        left, cached = (group.lengths - group.drawn)[places], group.prompt + group.drawn[places]
        read = cached[cached > group.prompt] if group.drawn.any() else cached[:1]
        products = 2 * int(read.sum()) * (self._weights + 4 * self._size.tower_depth * self._size.tower_block_params)
        pairs = self._attention_width * int((read**2 / 2).sum())
        attention_s = self._rates.attention_seconds(pairs, is_backward=False, version="fa3")
        self.now += (products / self._rates.gemm_flop_s + attention_s) / self._speed
        self.groups.append(group)
        self.row_B3 = np.concatenate([self.row_B3, np.stack([left, cached, places], axis=1)])
        self._group_B += [group] * len(places)

    def begin_tokens(self) -> None:
        read = self._weights + self._size.vocab * self._size.hidden
        rows = len(self.row_B3)
        cached = self.row_B3[:, 1].sum() + rows * np.arange(1, self.row_B3[:, 0].min() + 1)
        bytes_s = (2 * read + self._size.kv_bytes_per_token * cached) / self._rates.memory_bytes_s
        flop_s = (2 * rows * read + self._attention_width * cached) / self._rates.gemm_flop_s
        self.ends = self.now + np.cumsum(np.maximum(bytes_s, flop_s)) / self._speed

    def settle(self, now: float, is_over: bool = False) -> list[Group]:
        """Note the tokens that are there by now; the groups that are finished, which leave."""
        count = int(np.searchsorted(self.ends, now, side="right"))
        self.row_B3[:, 0] -= count
        self.row_B3[:, 1] += count
        is_open_B = self.row_B3[:, 0] > 0
        for index in range(len(is_open_B)) if is_over else np.flatnonzero(~is_open_B):
            group, place = self._group_B[index], self.row_B3[index, 2]
            group.drawn[place] = group.lengths[place] - self.row_B3[index, 0]
        self.ends, self.now = np.zeros(0), max(now, self.now)
        if is_open_B.all():
            return []
        self.row_B3 = self.row_B3[is_open_B]
        self._group_B = list(itertools.compress(self._group_B, is_open_B))
        done = [group for group in self.groups if group.is_done]
        self.groups = [group for group in self.groups if not group.is_done]
        return done


def draw(engines: Sequence[Engine], groups: Sequence[Group], wanted: int) -> tuple[list[Group], list[Group]]:
    """(these, the others) once `wanted` groups are finished, among them all carried ones. Each engine takes the next
    when it has room; its `now` is then when it ended."""
    done = [group for group in groups if group.is_done]  # in the step before, which did not need them
    queue = deque(group for group in groups if not group.is_done)
    events = [(engine.now, index) for index, engine in enumerate(engines)]
    while events:
        now, index = heapq.heappop(events)
        engine = engines[index]
        done += engine.settle(now)
        if len(done) >= wanted and all(group.is_done for group in groups if group.is_carried):
            for other in engines:
                if other.groups:
                    done += other.settle(now, is_over=True)
            break
        if queue and len(engine.row_B3) + GROUP <= ROWS:
            engine.fill(queue.popleft())
        elif engine.groups:
            engine.begin_tokens()
        else:
            continue
        heapq.heappush(events, (float(engine.ends[-1]) if len(engine.ends) else engine.now, index))
    done.sort(key=lambda group: not group.is_carried)
    return done[:wanted], [group for group in groups if group not in done[:wanted]]


def simulate(case: Case, is_shared: bool, extra: float, num_steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """[S, E] seconds that each engine draws in a step, and [S, 2] tokens of the answers, and of the packed groups."""
    rng = np.random.default_rng(seed)
    fresh = groups_of(case, (math.ceil(extra * case.groups) + case.groups) * ENGINES, rng)
    carried: list[list[Group]] = [[]] if is_shared else [[] for _ in range(ENGINES)]
    seconds, tokens = [], []
    for _ in range(num_steps):
        engines = [Engine(case.slowest if index == 0 else 1.0) for index in range(ENGINES)]
        done: list[Group] = []
        for index, left in enumerate(carried):
            team = engines[index :: len(carried)]
            part, carried[index] = draw(team, [*left, *fresh[index :: len(carried)]], case.groups * len(team))
            done += part
        for group in itertools.chain(*carried):
            group.is_carried = True
        seconds.append([engine.now for engine in engines])
        answers = sum(int(group.drawn.sum()) for group in done)
        tokens.append((answers, answers + sum(group.prompt - GROUP for group in done)))
        fresh = groups_of(case, case.groups * ENGINES, rng)
    return np.array(seconds), np.array(tokens)


def periods(seconds: np.ndarray, update_s: np.ndarray, *, has_lag: bool) -> np.ndarray:
    """[S - 1] seconds from one update to the next. With a lag an engine that is done begins the next step's groups
    while the others go on; it stands still during the update."""
    left, found = seconds[0], []
    for step in range(len(seconds) - 1):
        longest = float(left.max())
        found.append(longest + update_s[step])
        left = np.maximum(seconds[step + 1] - has_lag * (longest - left), 0.0)
    return np.array(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=30, help=f"of each way, besides {WARM} that are not counted")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row for each case and way, and in `gains` one for each case."""
    predicted = json.loads((RESULTS / "predict_cpu.json").read_text(encoding="utf-8"))["cases"]
    update_rate = predicted["group_3k8_7b_8"]["tokens_per_s_per_gpu"]
    rows: list[dict[str, Any]] = []
    gains: list[dict[str, Any]] = []
    for case in CASES:
        gains.append({"name": case.name})
        for is_shared, extra in itertools.product((False, True), (0.0, EXTRA)):
            seconds, tokens = simulate(case, is_shared, extra, WARM + arguments.steps + 1, arguments.seed)
            seconds, tokens = seconds[WARM:], tokens[WARM:]
            update_s = tokens[:, 1] / ENGINES / update_rate
            for has_lag in (False, True):
                step_s = periods(seconds, update_s, has_lag=has_lag)
                rate = float(tokens[:-1, 0].sum() / step_s.sum() / ENGINES)
                way = " + ".join(["one queue"] * is_shared + ["0.2 more"] * bool(extra) + ["lag 1"] * has_lag)
                first = gains[-1].setdefault("tokens_per_s", round(rate, 1))
                gains[-1][way or AS_IT_IS] = f"{100 * (round(rate, 1) / first - 1):+.1f} %"
                row = {"name": case.name, "way": way or AS_IT_IS, "tokens_per_s": round(rate, 1)}
                row |= {"gain": round(rate / first - 1, 4), "rollout_s": round(float(seconds.max(1).mean()), 3)}
                row |= {"idle": round(float(1 - seconds.mean() / seconds.max(1).mean()), 4)}
                rows.append(row | {"update_s": round(float(update_s.mean()), 3)})
    print_rows(rows, COLUMNS, "answer tokens learned from, PREDICTED, none was measured")
    return {
        "rates": H100_RATES.describe(),
        "update_tokens_per_s": update_rate,
        "steps": arguments.steps,
        "rows": rows,
        "gains": gains,
    }
