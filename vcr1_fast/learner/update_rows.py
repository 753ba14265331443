"""A rollout's groups -> this rank's packed rows of each of its updates: sizes, plan, exchange, weights, packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from vcr1_kernels.losses import Aggregation, token_weights

from vcr1_fast.learner.exchange import exchange
from vcr1_fast.learner.packing import pack
from vcr1_fast.learner.row_cost import GroupSize, RowCost
from vcr1_fast.learner.sharding import World, gather_all
from vcr1_fast.learner.step_plan import StepPlan, plan_step
from vcr1_fast.settings.config import Config
from vcr1_fast.types import PackedBatch, RolloutGroup, SampleError


@dataclass(frozen=True)
class UpdateRows:
    """What this rank does in one update."""

    rows: list[PackedBatch]
    plan: StepPlan
    too_large: tuple[SampleError, ...]  # of this rank's groups, those that no rank runs
    model_flop: float  # of all ranks' rows

    @property
    def sums(self) -> dict[str, float]:
        """Over all ranks, the same on each; `planned_work_s` over `planned_available_s` is the busy fraction."""
        return {
            "planned_work_s": self.plan.work_s,
            "planned_available_s": self.plan.available_s,
            "groups_too_large": float(len(self.plan.too_large)),
            "model_flop": self.model_flop,
        }


def plan_and_pack(
    groups: Sequence[RolloutGroup],
    sizes: Sequence[GroupSize],
    aggregation: Aggregation,
    cost: RowCost,
    config: Config,
    world: World,
    num_updates: int = 1,
) -> list[UpdateRows]:
    """Rows of each update, the i-th made of the i-th part of every rank's groups. A collective.

    Args:
        groups, sizes: this rank's.
    """
    train, gathered = config.train, gather_all(list(sizes), world)
    plans = plan_step(gathered, num_updates, cost, train.tokens_per_microbatch, train.max_group_tokens)
    homes = [rank for rank, theirs in enumerate(gathered) for _ in theirs]
    size_of = dict(enumerate(size for theirs in gathered for size in theirs))
    mine = dict(zip((i for i, rank in enumerate(homes) if rank == world.rank), groups, strict=True))
    rank_of = {index: rank for plan in plans for index, rank in plan.rank_of.items()}
    held = exchange(mine, homes, rank_of, world)
    updates = []
    for plan in plans:
        lengths = {i: size_of[i].counted for i in plan.members}
        weights = completion_weights(lengths, aggregation, config.rollout.max_new_tokens)
        rows = [pack([held[i] for i in row], [weights[i] for i in row]) for row in plan.rows[world.rank]]
        refused = [_refusal(mine[i], size_of[i], train.max_group_tokens) for i in plan.too_large if i in mine]
        flop = sum(cost.model_flop(size_of[i]) for i in plan.rank_of)
        updates.append(UpdateRows(rows, plan, tuple(refused), flop))
    return updates


def completion_weights(
    lengths: Mapping[int, Sequence[int]], aggregation: Aggregation, max_new_tokens: int
) -> dict[int, list[float]]:
    """Loss weight of one token of each completion, by group.

    Args:
        lengths: tokens of each completion that count, of all groups of the update over all ranks.
    """
    flat_S = torch.tensor([n for group in lengths.values() for n in group], dtype=torch.long)
    weight_S = token_weights(flat_S, aggregation, flat_S.numel(), int(flat_S.sum()), max_new_tokens)
    per_group = weight_S.split([len(group) for group in lengths.values()])
    return {index: weights.tolist() for index, weights in zip(lengths, per_group, strict=True)}


def _refusal(group: RolloutGroup, size: GroupSize, limit: int | None) -> SampleError:
    return SampleError(
        group.prompt.example.id,
        f"its prompt and answers are {size.num_tokens:,} packed tokens, wanted at most train.max_group_tokens, {limit}",
    )
