"""Groups -> one optimizer update. The only `backward()` in the tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vcr1_kernels.losses import Aggregation, token_weights

from vcr1_fast.config import Config
from vcr1_fast.learner.model import PolicyModel, load_hugging_face, resolve_dtype
from vcr1_fast.learner.objective import Objective, grpo_objective, sft_objective
from vcr1_fast.learner.optimizer import build_optimizer, build_schedule, clip_grad_norm
from vcr1_fast.learner.packing import assign_rows, num_packed_tokens, pack, placeholder
from vcr1_fast.learner.sharding import World, all_max_int, all_reduce_sum, shard
from vcr1_fast.types import PackedBatch, RolloutGroup


@dataclass(frozen=True)
class UpdateReport:
    """Sums over all ranks of one optimizer update, and what the optimizer did."""

    sums: dict[str, float]
    grad_norm: float
    learning_rate: float
    skipped: bool  # the gradient was not finite, weights are unchanged


class Learner:
    """Policy, optimizer and schedule of one rank; all ranks call the same methods in the same order."""

    def __init__(self, config: Config, world: World, num_updates: int) -> None:
        """Loads `config.model.path` with float32 master weights and shards it over the ranks.

        Args:
            num_updates: optimizer updates of the whole run, for the learning-rate schedule.
        """
        self.config, self.world = config, world
        dtype = resolve_dtype(config.model, world.device)
        self.policy = self._load(dtype)
        self.reference = self._load(dtype).requires_grad_(False) if config.algorithm.beta > 0 else None
        self.optimizer = build_optimizer(self.policy, config.optimizer)
        self.schedule = build_schedule(self.optimizer, config.optimizer, num_updates)
        self._placeholder = placeholder(self.policy.hf.config.video_token_id)

    def _load(self, dtype: torch.dtype) -> PolicyModel:
        hf = load_hugging_face(self.config.model.path, torch.float32, self.world.device)
        policy = PolicyModel(hf, self.config.model, dtype)
        shard(policy, self.world, dtype)
        return policy.train()

    def update_grpo(self, groups: Sequence[RolloutGroup]) -> list[UpdateReport]:
        """All updates of one rollout: this rank's groups, split into `minibatches_per_rollout` equal parts.

        Groups whose advantages are all 0 still count in the denominators but go through the model only when a KL or
        entropy term needs them.
        """
        num_minibatches = self.config.algorithm.minibatches_per_rollout
        share = math.ceil(len(groups) / num_minibatches)
        return [self._update_grpo_once(groups[i * share : (i + 1) * share]) for i in range(num_minibatches)]

    def _update_grpo_once(self, groups: Sequence[RolloutGroup]) -> UpdateReport:
        algorithm = self.config.algorithm
        weights = self._weights(groups, algorithm.loss, mask_truncated=algorithm.mask_truncated)
        has_other_terms = algorithm.beta > 0 or algorithm.entropy_coef != 0
        needed = [i for i, g in enumerate(groups) if g.is_trainable or has_other_terms]

        def objective(batch: PackedBatch) -> Objective:
            return grpo_objective(batch, self._reference_logprobs(batch), algorithm)

        rows = self._pack_rows([groups[i] for i in needed], [weights[i] for i in needed])
        return self._update(rows, objective, self.config.rollout.temperature)

    def update_sft(self, groups: Sequence[RolloutGroup]) -> UpdateReport:
        """One supervised update: each group holds the one completion to teach. Loss: mean over all taught tokens."""
        weights = self._weights(groups, "dapo", mask_truncated=False)
        return self._update(self._pack_rows(groups, weights), sft_objective, temperature=1.0)

    def _weights(
        self, groups: Sequence[RolloutGroup], aggregation: Aggregation, mask_truncated: bool
    ) -> list[list[float]]:
        """Loss weight of one token of each completion, with the denominators of all ranks."""
        lengths = [
            [0 if mask_truncated and c.finish_reason == "length" else c.num_tokens for c in g.completions]
            for g in groups
        ]
        flat = torch.tensor([n for group in lengths for n in group], dtype=torch.long)
        totals = all_reduce_sum({"sequences": float(flat.numel()), "tokens": float(flat.sum())}, self.world)
        weight_S = token_weights(
            flat,
            aggregation,
            int(totals["sequences"]),
            int(totals["tokens"]),
            self.config.rollout.max_new_tokens,
        )
        return [w.tolist() for w in weight_S.split([len(group) for group in lengths])]

    def _pack_rows(self, groups: Sequence[RolloutGroup], weights: list[list[float]]) -> list[PackedBatch]:
        sizes = [num_packed_tokens(group) for group in groups]
        rows = assign_rows(sizes, self.config.train.tokens_per_microbatch)
        return [pack([groups[i] for i in row], [weights[i] for i in row]) for row in rows]

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> Tensor | None:
        if self.reference is None:
            return None
        return self.reference(batch, self.config.rollout.temperature)[0]

    def _update(
        self, rows: list[PackedBatch], objective: Callable[[PackedBatch], Objective], temperature: float
    ) -> UpdateReport:
        totals: dict[str, float] = {"loss": 0.0}
        num_rows = all_max_int(len(rows), self.world)
        for index in range(num_rows):
            is_real = index < len(rows)
            batch = rows[index] if is_real else self._placeholder
            loss, sums = self.policy(batch, temperature, objective(batch))
            loss.backward()  # gradients add up over rows, and over ranks (sharding.shard sums them)
            counts = sums | {
                "loss": loss.detach(),
                "tokens_executed": torch.tensor(batch.num_tokens),
                "tokens_unshared": torch.tensor(batch.num_unshared_tokens),
            }
            for name, value in counts.items():  # every rank must have the same names, so a placeholder adds its 0
                totals[name] = totals.get(name, 0.0) + (float(value) if is_real else 0.0)
        return self._apply(all_reduce_sum(totals, self.world), has_gradient=num_rows > 0)

    def _apply(self, sums: dict[str, float], has_gradient: bool) -> UpdateReport:
        """Clip, step, schedule. A step in which no group has a gradient moves only the schedule."""
        learning_rate = float(self.schedule.get_last_lr()[0])
        grad_norm = clip_grad_norm(self.policy, self.config.optimizer.max_grad_norm) if has_gradient else 0.0
        skipped = not math.isfinite(grad_norm)
        if skipped:
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()  # where there are no gradients this changes nothing, not even the moments
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateReport(sums, grad_norm, learning_rate, skipped)
