"""Which rank runs which groups of a step, and in which rows: by cost, over all ranks at once.

Rows at the same place on all ranks wait for each other at every block's all-gather, so an update takes

    sum over places k of (row_s + max over ranks r of cost[r, k])

and that sum is what the plan makes small. Every rank plans alone, from the same sizes, and gets the same plan: only
integers, sums in a fixed order and correctly rounded operations decide.

`update_rows.py` gathers the sizes, moves the groups (exchange.py) and packs the rows.
Groups have global indices: those of rank 0 first, each rank's in their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vcr1_fast.learner.packing import assign_rows
from vcr1_fast.learner.row_cost import GroupSize, RowCost

# A group that leaves its rank has to save this share of one rank's work, divided by the number of ranks: it keeps two
# of them for a moment (a clip of 3,600 tokens is 17 MB as bytes), while the ranks exchange at the same time.
MOVE_PRICE = 8e-3
ROUNDING = 1e-9  # of costs in mean rows
POWER_DOUBLINGS = 5  # the search takes the 32nd power mean of a place's rows for their maximum


@dataclass(frozen=True)
class PlannedGroup:
    """One group that goes through the model."""

    home: int  # rank that has it
    num_tokens: int  # in a packed row
    cost_s: float


@dataclass(frozen=True)
class StepPlan:
    """One update. The longest row of each rank comes first, so a rank without a last row runs placeholders there."""

    members: tuple[int, ...]  # all groups of the update, those that only count in the denominators too
    rows: tuple[tuple[tuple[int, ...], ...], ...]  # [rank][place] -> the groups of a row, in their order
    too_large: tuple[int, ...]  # groups left out because they are above the limit
    work_s: float  # of all rows
    elapsed_s: float  # from the first row to the end of the last one

    @property
    def available_s(self) -> float:
        """Of all ranks; `work_s` over it is the busy fraction."""
        return self.elapsed_s * len(self.rows)

    @property
    def rank_of(self) -> dict[int, int]:
        """Group -> the rank that runs it."""
        return {group: rank for rank, rows in enumerate(self.rows) for row in rows for group in row}


def plan_step(
    sizes: Sequence[Sequence[GroupSize]],
    num_updates: int,
    cost: RowCost,
    row_tokens: int,
    max_group_tokens: int | None = None,
) -> list[StepPlan]:
    """The plans of one rollout's updates. Update i takes the i-th part of each rank's groups, in their order.

    Args:
        sizes: of each rank's groups.
        row_tokens: packed tokens of a row; a larger group has a row of its own.
        max_group_tokens: a group above it is run by no rank. It stays in the denominators.
    """
    updates: list[list[tuple[int, int, GroupSize]]] = [[] for _ in range(num_updates)]
    index = 0
    for home, mine in enumerate(sizes):
        share = max(1, math.ceil(len(mine) / num_updates))
        for position, size in enumerate(mine):
            updates[position // share].append((index, home, size))
            index += 1
    return [_plan_update(update, len(sizes), cost, row_tokens, max_group_tokens) for update in updates]


def _plan_update(
    groups: Sequence[tuple[int, int, GroupSize]],
    num_ranks: int,
    cost: RowCost,
    row_tokens: int,
    max_group_tokens: int | None,
) -> StepPlan:
    run = [group for group in groups if group[2].is_run]
    limit = math.inf if max_group_tokens is None else max_group_tokens
    fitting = [group for group in run if group[2].num_tokens <= limit]
    planned = [PlannedGroup(home, size.num_tokens, cost.seconds(size)) for _, home, size in fitting]
    rows = plan_rows(planned, num_ranks, row_tokens)
    return StepPlan(
        members=tuple(index for index, _, _ in groups),
        rows=tuple(tuple(tuple(fitting[g][0] for g in row) for row in mine) for mine in rows),
        too_large=tuple(index for index, _, size in run if size.num_tokens > limit),
        work_s=math.fsum(group.cost_s for group in planned),
        elapsed_s=elapsed_s([[_row_s(planned, row) for row in mine] for mine in rows], cost.row_s),
    )


def elapsed_s(costs_s: Sequence[Sequence[float]], row_s: float) -> float:
    """Of rows with these costs, [rank][place], the ranks in step with each other."""
    places = range(max(map(len, costs_s), default=0))
    return math.fsum(row_s + max(mine[k] for mine in costs_s if k < len(mine)) for k in places)


def plan_rows(groups: Sequence[PlannedGroup], num_ranks: int, row_tokens: int) -> list[list[list[int]]]:
    """[rank][place] -> positions in `groups`: as many places as whole rows need, groups at home where that is as good.

    Rows begin as each rank's own groups and are then evened out by moving and swapping groups.
    """
    if not groups:
        return [[] for _ in range(num_ranks)]
    full = assign_rows([group.num_tokens for group in groups], row_tokens)
    num_places = math.ceil(len(full) / num_ranks)
    at_home = _rows_at_home(groups, num_ranks, num_places, row_tokens)
    if at_home is None:  # the homes are too uneven for so few rows
        full.sort(key=lambda row: (-_row_s(groups, row), row))
        at_home = [0] * len(groups)
        for k, row in enumerate(full):
            for g in row:
                at_home[g] = (k % num_ranks) * num_places + k // num_ranks
    rows: list[list[list[int]]] = [[[] for _ in range(num_places)] for _ in range(num_ranks)]
    for g, row in enumerate(_Search(groups, at_home, num_ranks, num_places, row_tokens).run()):
        rows[row // num_places][row % num_places].append(g)
    # Among all orders of each rank's rows the descending one has the least sum of maxima.
    return [sorted((row for row in mine if row), key=lambda row: (-_row_s(groups, row), row)) for mine in rows]


def _row_s(groups: Sequence[PlannedGroup], row: Sequence[int]) -> float:
    return math.fsum(groups[g].cost_s for g in row)


def _rows_at_home(groups: Sequence[PlannedGroup], num_ranks: int, num_places: int, row_tokens: int) -> list[int] | None:
    """Row of each group, rank x num_places + place: the emptiest row of its rank, or of all ranks, that has room.

    None where this greedy way finds no room for one.
    """
    cost_s, tokens = [0.0] * (num_ranks * num_places), [0] * (num_ranks * num_places)
    row_of = [-1] * len(groups)
    for g in sorted(range(len(groups)), key=lambda g: (-groups[g].num_tokens, g)):
        group = groups[g]
        own = range(group.home * num_places, (group.home + 1) * num_places)
        for candidates in (own, range(len(tokens))):
            room = [r for r in candidates if not tokens[r] or tokens[r] + group.num_tokens <= row_tokens]
            if room:
                row = min(room, key=lambda r: (cost_s[r], r))
                cost_s[row] += group.cost_s
                tokens[row] += group.num_tokens
                row_of[g] = row
                break
        else:
            return None
    return row_of


class _Search:
    """Evens the rows out: the costliest row of a place gives a group away, or swaps it for a cheaper one, as long as
    that makes the sum over places of the power mean smaller.

    The power mean stands for the maximum because where several rows are the largest, making one of them smaller
    changes no maximum. A group is given away by swapping it with nothing: behind the groups come as many "nothings"
    as there are rows, one in each, without cost and tokens. Letters: E groups and nothings, B rows, K places.
    """

    def __init__(
        self, groups: Sequence[PlannedGroup], row_of: Sequence[int], num_ranks: int, num_places: int, row_tokens: int
    ) -> None:
        num_rows = num_ranks * num_places
        self.num_groups, self.num_places, self.row_tokens = len(groups), num_places, row_tokens
        mean_s = math.fsum(group.cost_s for group in groups) / num_rows
        self.price = MOVE_PRICE / num_ranks * num_places  # of a move, in mean rows
        nothings = np.arange(num_rows)
        self.row_E = np.concatenate([np.array(row_of), nothings])
        self.cost_E = np.array([group.cost_s / mean_s for group in groups] + [0.0] * num_rows)
        self.tokens_E = np.array([group.num_tokens for group in groups] + [0] * num_rows)
        self.home_E = np.concatenate([np.array([group.home for group in groups]), nothings // num_places])
        self.cost_B = np.bincount(self.row_E, self.cost_E, num_rows)
        self.tokens_B = np.bincount(self.row_E, self.tokens_E, num_rows).astype(np.int64)

    def run(self) -> list[int]:
        """Row of each group. Each step lowers the sum by more than a set amount, so there are finitely many."""
        while True:
            by_place = self.cost_B.reshape(-1, self.num_places)
            costliest = by_place.argmax(axis=0) * self.num_places + np.arange(self.num_places)
            power_B = _power(self.cost_B)
            sum_K = power_B.reshape(by_place.shape).sum(axis=0)
            swaps = [self._best_swap(int(row), power_B, sum_K, self.cost_B[costliest]) for row in costliest]
            gain, given, taken = max(swaps)
            if gain <= self.price / 2:
                return self.row_E[: self.num_groups].tolist()
            self._swap(given, taken)

    def _best_swap(
        self, row: int, power_B: np.ndarray, sum_K: np.ndarray, largest_K: np.ndarray
    ) -> tuple[float, int, int]:
        """(gain, group of `row`, group or nothing of another row) of the swap that gains most; gain 0 for none.

        No other row may become costlier than the costliest of its place is.
        """
        mine = np.flatnonzero(self.row_E[: self.num_groups] == row)[:, None]
        less = self.cost_E[mine] - self.cost_E  # what `row` gets cheaper
        spare = largest_K[self.row_E % self.num_places] - self.cost_B[self.row_E]
        allowed = (less > ROUNDING) & (less <= spare + ROUNDING)
        allowed &= self._has_room(self.row_E, self.tokens_E, self.tokens_E[mine])
        allowed &= (self.tokens_E == 0) | self._has_room(row, self.tokens_E[mine], self.tokens_E)
        which, taken = np.nonzero(allowed)
        if not len(taken):
            return 0.0, -1, -1
        given, other = mine[which, 0], self.row_E[taken]
        less = less[which, taken]
        place, other_place = row % self.num_places, other % self.num_places
        is_same = place == other_place
        fallen = _power(self.cost_B[row] - less) - power_B[row]
        risen = _power(self.cost_B[other] + less) - power_B[other]
        gain = _root(sum_K[place]) - _root(np.maximum(sum_K[place] + fallen + is_same * risen, 0.0))
        gain += np.where(is_same, 0.0, _root(sum_K[other_place]) - _root(sum_K[other_place] + risen))
        gain -= self.price * (self._num_moved(given, row, other) + self._num_moved(taken, other, row))
        best = int(gain.argmax())
        return float(gain[best]), int(given[best]), int(taken[best])

    def _has_room(self, row: int | np.ndarray, leaving: np.ndarray, coming: np.ndarray) -> np.ndarray:
        """Whether `row` holds what comes once that has left; an empty row holds a group of any size."""
        rest = self.tokens_B[row] - leaving
        return (rest == 0) | (rest + coming <= self.row_tokens)

    def _num_moved(self, entry: np.ndarray, old_row: int | np.ndarray, new_row: int | np.ndarray) -> np.ndarray:
        """1 where a group leaves its home, -1 where it comes back; 0 for a nothing."""
        home = self.home_E[entry]
        change = (home != new_row // self.num_places).astype(int) - (home != old_row // self.num_places)
        return change * (entry < self.num_groups)

    def _swap(self, given: int, taken: int) -> None:
        row, other = self.row_E[given], self.row_E[taken]
        for entry, old, new in ((given, row, other), (taken, other, row)):
            self.cost_B[old] -= self.cost_E[entry]
            self.cost_B[new] += self.cost_E[entry]
            self.tokens_B[old] -= self.tokens_E[entry]
            self.tokens_B[new] += self.tokens_E[entry]
            if entry < self.num_groups:  # a nothing stays: every row has one
                self.row_E[entry] = new


def _power(x: np.ndarray) -> np.ndarray:
    for _ in range(POWER_DOUBLINGS):
        x = x * x
    return x


def _root(x: np.ndarray) -> np.ndarray:
    for _ in range(POWER_DOUBLINGS):
        x = np.sqrt(x)
    return x
