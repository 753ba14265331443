"""`python -m bench rollouts`: the share of an engine's decode slots that draws answers, and what that gives.

Engines of 7B on H100 by the rates of fake_gpu/predict.py: EVERY SPEED HERE IS PREDICTED, NONE MEASURED. Lengths are of
tests/bench/data, see LENGTHS, and the same for all ways. The update goes at the tokens a second that `bench predict`
has for such groups, and is shared out evenly.

    tokens drawn a second and GPU = full batch x share of it x (1 - share of prompts - share of waiting)
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from bench.columns import heads_of, print_rows
from bench.engines import Engine, Group, decode_seconds, draw
from bench.predict_points import RESULTS
from bench.update_meter import ROOT
from vcr1_fast.fake_gpu.predict import H100_RATES

GROUP = 8
ROWS = 128  # of an engine: what 131,072 tokens of KV cache beside a learner hold, at 3.8k of a prompt and 500 an answer
PROMPT, MIXED = 3770, (1000, 15000)  # tokens; mixed: log-uniform between
WARM = 3  # steps that are not counted: what is left over must be there first
# file, its key, factor, most. 149 tokens are the mean that VideoAuto-R1 (arXiv 2601.05175) reports of answers with
# reasoning; of a thousand or so are those that EasyVideoR1 (arXiv 2604.16893) trains on
LENGTHS = {
    "form": ("bench/data/answer_lengths.json", "form", 149 / 31.9, 1024),  # recorded of a tiny model
    "service": ("bench/data/answer_lengths.json", "service", 1.0, 1024),  # recorded of a text service
    "reasoning": ("learner/data/charades_groups.json", "groups", 149 / 344, 1024),  # the spread is made up
    "long": ("learner/data/charades_groups.json", "groups", 1000 / 344, 4096),  # the same
}


class Way(NamedTuple):
    deal: str  # of the groups, see WAYS
    extra: float = 0.0  # rollout.over_provision
    has_lag: bool = False  # rollout.max_policy_lag 1


AS_IT_IS, MORE = "each its own", "0.25 more"
WAYS = {
    AS_IT_IS: Way("own"),
    "one queue": Way("queue"),
    MORE: Way("own", 0.25),
    "0.25 more, one queue": Way("queue", 0.25),
    "0.25 more, one end": Way("one end", 0.25),
    "0.25 more, one end, evened": Way("evened", 0.25),
    "lag 1": Way("own", 0.0, True),
    "0.25 more, lag 1": Way("own", 0.25, True),
}
SHARES = {
    "slots": (
        "slots",
        "decode steps x rows that draw a token, of rows that the step fills at most; now, with 0.25 more",
    ),
    "of_full": ("of full", "tokens a second of decoding, of those if all these rows drew, and no other; the same two"),
    "prompts": ("prompts", "share of the rollout in which a mean engine fills prompts; the same two"),
    "waiting": ("waiting", "in which it has ended, and others have not; the same two"),
}
COLUMNS = {
    "name": ("case", "lengths of answers, groups a GPU in a step, GPUs, and what is unusual"),
    "rows": (
        "rows",
        "of an engine: what it has room for, or what a step gives it, if less; over-provisioning gives more",
    ),
    "full": ("full", "PREDICTED: answer tokens a second of decoding while all these rows draw"),
    **SHARES,
    "drawn_per_s": ("drawn/s", "PREDICTED: answer tokens learned from, a second of the rollout and GPU"),
    "tokens_per_s": ("tokens/s", "PREDICTED: the same, a second of the whole step"),
    "one queue": ("one queue", "what tokens/s gains when an engine with room takes the next group of all"),
    MORE: (MORE, "by rollout.over_provision"),
    "0.25 more, one queue": ("both", "by one queue and over-provisioning"),
    "0.25 more, one end": ("one end", "by over-provisioning, where a step ends when all engines together have enough"),
    "0.25 more, one end, evened": ("evened", "the same where new groups go to the engine with the fewest left"),
    "lag 1": ("lag 1", "by rollout.max_policy_lag, engine and update taking turns on a GPU"),
    "0.25 more, lag 1": ("0.25 + lag", "by over-provisioning and lag"),
}
COLUMN_HEADS = heads_of(COLUMNS)


@dataclass(frozen=True)
class Case:
    lengths: str
    groups: int  # of each GPU in a step
    gpus: int = 8
    max_rows: int = ROWS
    is_mixed: bool = False  # prompts of unequal lengths
    slowest: float = 1.0  # speed of one of the engines

    @property
    def name(self) -> str:
        unusual = [f"{self.max_rows} rows"] * (self.max_rows != ROWS) + ["mixed prompts"] * self.is_mixed
        unusual += [f"one at {self.slowest}"] * (self.slowest < 1)
        return ", ".join([self.lengths, f"{self.groups} x {self.gpus}", *unusual])

    def rows(self, extra: float) -> int:
        """That a step fills at most."""
        return min(self.max_rows, GROUP * (self.groups + math.ceil(extra * self.groups)))


def cases() -> list[Case]:
    """64 groups on a GPU are those of configs/*throughput_8xh100 and of the 2 nodes."""
    found: list[Case] = []
    for gpus in (8, 64):
        found += [Case("reasoning", groups, gpus) for groups in (1, 8, 16, 32, 64)]
        found += [Case("reasoning", 32, gpus, max_rows=256)]
        found += [Case(lengths, groups, gpus) for lengths in ("form", "service", "long") for groups in (8, 64)]
    return [*found, Case("reasoning", 8, is_mixed=True), Case("reasoning", 8, slowest=0.8)]


def recorded(lengths: str) -> list[list[int]]:
    """Groups of answers of so many tokens."""
    file, key, factor, most = LENGTHS[lengths]
    data = json.loads((ROOT / "tests" / file).read_text(encoding="utf-8"))[key]
    groups = [row["answer_tokens"] for row in data] if key == "groups" else data["groups"]
    return [[min(round(factor * tokens), most) for tokens in group] for group in groups]


def new_groups(case: Case, count: int, rng: random.Random) -> list[Group]:
    """Drawn with replacement."""
    shortest, longest = MIXED if case.is_mixed else (PROMPT, PROMPT)
    prompts = [round(shortest * (longest / shortest) ** rng.random()) for _ in range(count)]
    lengths = rng.choices(recorded(case.lengths), k=count)
    return [Group(prompt, own, list(own)) for prompt, own in zip(prompts, lengths, strict=True)]


def deal(held: Sequence[list[Group]], fresh: Sequence[Group], is_even: bool) -> None:
    """As many of these to each engine, or the next to the one with the fewest answers to draw."""
    loads = [(is_even * sum(map(bool, chain(*(group.left for group in own)))), at) for at, own in enumerate(held)]
    heapq.heapify(loads)
    for group in fresh:
        load, at = loads[0]
        heapq.heapreplace(loads, (load + GROUP, at))
        held[at].append(group)


Step = tuple[list[Engine], list[Group]]  # how each drew, and what the step learns from


def simulate(case: Case, way: Way, num_steps: int, seed: int) -> list[Step]:
    rng, steps = random.Random(seed), []
    num_extra = math.ceil(way.extra * case.groups)
    held: list[list[Group]] = [[] for _ in range(case.gpus)]  # of each engine: what it goes on with
    for step in range(num_steps):
        fresh = new_groups(case, (case.groups + (0 if step else num_extra)) * case.gpus, rng)
        if way.deal == "queue":
            held = [[*held[0], *fresh]] * case.gpus
        else:
            deal(held, fresh, is_even=way.deal == "evened")
        engines = [Engine(1.0 if index else case.slowest) for index in range(case.gpus)]
        teams = [[index] for index in range(case.gpus)] if way.deal == "own" else [list(range(case.gpus))]
        done: list[Group] = []
        for team in teams:
            drawing = [engines[index] for index in team]
            done += draw(drawing, [held[index] for index in team], case.groups * len(team), case.max_rows)
        steps.append((engines, done))
        taken = set(done)
        left = {id(own): [group for group in own if group not in taken] for own in held}
        held = [left[id(own)] for own in held]
        for group in chain(*held):
            group.is_carried = True
    return steps


def periods(seconds: np.ndarray, update_s: np.ndarray, *, has_lag: bool) -> np.ndarray:
    """[S - 1] seconds from one update to the next. With a lag an engine that is done begins the next step's groups
    while the others go on; it stands still during the update."""
    left, found = seconds[0], []
    for step in range(len(seconds) - 1):
        longest = float(left.max())
        found.append(longest + update_s[step])
        left = np.maximum(seconds[step + 1] - has_lag * (longest - left), 0.0)
    return np.array(found)


def shares(case: Case, extra: float, steps: Sequence[Step]) -> dict[str, float]:
    """How the engines' time and slots were used, and what a second of it gave."""
    engines = [engine for drawn, _ in steps for engine in drawn]
    rollout_s = [max(engine.now for engine in drawn) for drawn, _ in steps]
    held_s = case.gpus * sum(rollout_s)
    tokens, rows = sum(engine.num_tokens for engine in engines), case.rows(extra)
    context = sum(engine.num_read for engine in engines) / tokens
    full = rows / decode_seconds(rows, rows * context)
    learned = sum(sum(group.lengths) for _, done in steps for group in done)
    return {
        "full": round(full, 1),
        "slots": round(tokens / rows / sum(engine.num_steps for engine in engines), 4),
        "of_full": round(tokens / sum(engine.decode_s for engine in engines) / full, 4),
        "prompts": round(sum(engine.fill_s for engine in engines) / held_s, 4),
        "waiting": round(1 - sum(engine.now for engine in engines) / held_s, 4),
        "drawn_per_s": round(learned / held_s, 1),
        "rollout_s": round(sum(rollout_s) / len(steps), 3),
    }


def tokens_per_s(steps: Sequence[Step], update_rate: float, has_lag: bool) -> float:
    """Learned from after the first WARM steps, a second of the whole step and GPU. `update_rate`: packed tokens."""
    num_gpus = len(steps[0][0])
    seconds = np.array([[engine.now for engine in engines] for engines, _ in steps])
    answers = np.array([sum(sum(group.lengths) for group in done) for _, done in steps])
    packed = answers + [sum(group.prompt - GROUP for group in done) for _, done in steps]
    step_s = periods(seconds, packed / num_gpus / update_rate, has_lag=has_lag)
    return float(answers[WARM:-1].sum() / step_s[WARM:].sum() / num_gpus)


def rows_of(case: Case, update_rate: float, num_steps: int, seed: int) -> list[dict[str, Any]]:
    """One for each way."""
    rows: list[dict[str, Any]] = []
    drawn: dict[Way, list[Step]] = {}
    for name, way in WAYS.items():
        plain = way._replace(has_lag=False)
        if plain not in drawn:
            drawn[plain] = simulate(case, plain, WARM + num_steps + 1, seed)
        rate = round(tokens_per_s(drawn[plain], update_rate, way.has_lag), 1)
        first = rows[0]["tokens_per_s"] if rows else rate
        row = {"name": case.name, "way": name, "tokens_per_s": rate, "gain": round(rate / first - 1, 4)}
        rows.append(row | {"rows": case.rows(way.extra)} | shares(case, way.extra, drawn[plain][WARM:]))
    return rows


def in_one_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A case as COLUMNS shows it."""
    by_way = {row["way"]: row for row in rows}
    first, more = by_way[AS_IT_IS], by_way[MORE]
    both = {key: f"{100 * first[key]:.0f}, {100 * more[key]:.0f} %" for key in SHARES}
    gains = {way: f"{100 * row['gain']:+.0f} %" for way, row in by_way.items() if way != AS_IT_IS}
    return {key: first.get(key) for key in COLUMNS} | both | gains


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps",
        type=int,
        default=32,
        help=f"of each way on 8 GPUs, fewer on more; {WARM} are not counted",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the lengths")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row for each case and way, and in `cases` one for each case."""
    predicted = json.loads((RESULTS / "predict_cpu.json").read_text(encoding="utf-8"))["cases"]
    update_rate = predicted["group_3k8_7b_8"]["tokens_per_s_per_gpu"]
    by_case = [rows_of(case, update_rate, max(arguments.steps * 8 // case.gpus, 1), arguments.seed) for case in cases()]
    listed = [in_one_row(rows) for rows in by_case]
    print_rows(listed, COLUMNS, "answer tokens learned from, PREDICTED, none was measured")
    return {
        "rates": H100_RATES.describe(),
        "update_tokens_per_s": update_rate,
        "steps": arguments.steps,
        "rows": list(chain(*by_case)),
        "cases": listed,
    }
