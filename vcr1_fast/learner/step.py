"""Groups -> one optimizer update. The only `backward()` in the tree."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vcr1_kernels.losses import Aggregation, token_weights

from vcr1_fast.learner.loading import empty_model, load_weights
from vcr1_fast.learner.lora import adapters_off, add_adapters
from vcr1_fast.learner.model import PolicyModel, resolve_dtype
from vcr1_fast.learner.objective import Objective, grpo_objective, sft_objective
from vcr1_fast.learner.optimizer import build_optimizer, build_schedule, clip_grad_norm
from vcr1_fast.learner.packing import assign_rows, num_packed_tokens, pack, placeholder
from vcr1_fast.learner.sharding import World, all_max_float, all_max_int, all_reduce_sum, on_all_ranks, shard
from vcr1_fast.run.model_folder import model_folder
from vcr1_fast.settings.config import Config
from vcr1_fast.types import PackedBatch, RolloutGroup


@dataclass(frozen=True)
class UpdateReport:
    """Sums over all ranks of one optimizer update, and what the optimizer did."""

    sums: dict[str, float]
    grad_norm: float
    learning_rate: float
    skipped: bool  # the gradient was not finite, weights are unchanged
    largest_gap: float = 0.0  # of |log-prob - the engine's|, over all tokens


class Learner:
    """Policy, optimizer and schedule of one rank; all ranks call the same methods in the same order."""

    def __init__(self, config: Config, world: World, num_updates: int) -> None:
        """Loads `config.model.path` with float32 master weights and shards it over the ranks.

        Args:
            num_updates: optimizer updates of the whole run, for the learning-rate schedule.
        """
        self.config, self.world = config, world
        self.dtype = resolve_dtype(config.model, world.device)  # that forward and backward compute in
        self.policy = self._load()
        has_copy = config.algorithm.beta > 0 and not config.model.lora.rank  # adapters can be switched off instead
        self.reference = self._load(is_trained=False) if has_copy else None
        gc.collect()
        torch.cuda.empty_cache()  # a colocated engine sizes itself by what is free, and cached memory is not
        self.optimizer = build_optimizer(self.policy, config.optimizer)
        self.schedule = build_schedule(self.optimizer, config.optimizer, num_updates)
        self._placeholder = placeholder(self.policy.hf.config.video_token_id)

    def _load(self, is_trained: bool = True) -> PolicyModel:
        """The model of `config.model.path` with this rank's part of its weights: float32 where they are trained."""
        model, world = self.config.model, self.world
        folder = model_folder(model.path)
        hf = empty_model(folder, torch.float32)
        if model.lora.rank:
            add_adapters(hf, model.lora, self.config.train.seed, self.dtype)
        policy = PolicyModel(hf, model, self.dtype, world.device)
        frozen = [weight for weight in policy.parameters() if not weight.requires_grad]
        if not is_trained:
            policy.requires_grad_(False)
            # FSDP computes with weights of the compute dtype however they are kept. One process computes in autocast,
            # and bfloat16 embeddings would give it other residuals than the policy's: a KL that does not begin at 0.
            frozen = list(policy.parameters()) if world.world_size > 1 else frozen
        for weight in frozen:
            weight.data = weight.data.to(self.dtype)
        shard(policy, world, self.dtype)
        on_all_ranks("loading the model's weights", lambda: load_weights(hf, folder, world.device), world)
        return policy.train()

    def update_grpo(self, groups: Sequence[RolloutGroup]) -> list[UpdateReport]:
        """All updates of one rollout: this rank's groups, split into `minibatches_per_rollout` equal parts.

        Groups whose advantages are all 0 still count in the denominators but go through the model only when a KL or
        entropy term needs them.
        """
        algorithm = self.config.algorithm
        share = math.ceil(len(groups) / algorithm.minibatches_per_rollout)
        minibatches = [
            self._grpo_rows(groups[i * share : (i + 1) * share]) for i in range(algorithm.minibatches_per_rollout)
        ]
        old_logprobs = self._old_logprobs(minibatches)

        def objective(batch: PackedBatch) -> Objective:
            return grpo_objective(batch, self._reference_logprobs(batch), algorithm, old_logprobs(batch))

        return [self._update(rows, objective, self.config.rollout.temperature) for rows in minibatches]

    def _grpo_rows(self, groups: Sequence[RolloutGroup]) -> list[PackedBatch]:
        """The groups of one update, packed."""
        algorithm = self.config.algorithm
        weights = self._weights(groups, algorithm.loss, mask_truncated=algorithm.mask_truncated)
        has_other_terms = algorithm.beta > 0 or algorithm.entropy_coef != 0
        needed = [i for i, g in enumerate(groups) if g.is_trainable or has_other_terms]
        return self._pack_rows([groups[i] for i in needed], [weights[i] for i in needed])

    def _old_logprobs(self, minibatches: Sequence[Sequence[PackedBatch]]) -> Callable[[PackedBatch], Tensor | None]:
        """What ratios are taken against, for the rows of one rollout.

        One update and no lag: the current policy (None), whose ratio is 1. Otherwise what the engine reported, unless
        `sampling_correction` treats the engine apart: then the policy as it stands before the first of these updates,
        at the price of one more forward when there are several.
        """
        algorithm = self.config.algorithm
        is_single, is_corrected = len(minibatches) == 1, algorithm.sampling_correction != "none"
        if is_single and (is_corrected or self.config.rollout.max_policy_lag == 0):
            return lambda batch: None
        if not is_corrected:
            return lambda batch: batch.engine_logprob_N
        known: dict[int, Tensor] = {}
        with torch.no_grad():
            for rows in minibatches:
                for batch, is_real in self._with_placeholders(rows):
                    logprob_N = self.policy(batch, self.config.rollout.temperature)[0]
                    if is_real:
                        known[id(batch)] = logprob_N
        return lambda batch: known.get(id(batch))  # not of a placeholder

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
        if self.config.algorithm.beta == 0:
            return None
        if self.reference is not None:
            return self.reference(batch, self.config.rollout.temperature)[0]
        with adapters_off(self.policy):
            return self.policy(batch, self.config.rollout.temperature)[0]

    def _update(
        self, rows: list[PackedBatch], objective: Callable[[PackedBatch], Objective], temperature: float
    ) -> UpdateReport:
        totals: dict[str, float] = {"loss": 0.0}
        largest_gap, num_rows = 0.0, 0
        for batch, is_real in self._with_placeholders(rows):
            num_rows += 1
            wanted = objective(batch)
            loss, sums = self.policy(batch, temperature, wanted)
            if is_real and wanted.largest_gap is not None:
                largest_gap = max(largest_gap, float(wanted.largest_gap.value))
            loss.backward()  # gradients add up over rows, and over ranks (sharding.shard sums them)
            counts = sums | {
                "loss": loss.detach(),
                "tokens_executed": torch.tensor(batch.num_tokens),
                "tokens_unshared": torch.tensor(batch.num_unshared_tokens),
            }
            for name, value in counts.items():  # every rank must have the same names, so a placeholder adds its 0
                totals[name] = totals.get(name, 0.0) + (float(value) if is_real else 0.0)
        largest_gap = all_max_float(largest_gap, self.world)
        return self._apply(all_reduce_sum(totals, self.world), largest_gap, has_gradient=num_rows > 0)

    def _with_placeholders(self, rows: Sequence[PackedBatch]) -> Iterator[tuple[PackedBatch, bool]]:
        """The rows, and then placeholders (False) until every rank had equally many."""
        for index in range(all_max_int(len(rows), self.world)):
            is_real = index < len(rows)
            yield rows[index] if is_real else self._placeholder, is_real

    def _apply(self, sums: dict[str, float], largest_gap: float, has_gradient: bool) -> UpdateReport:
        """Clip, step, schedule. A step in which no group has a gradient moves only the schedule."""
        learning_rate = float(self.schedule.get_last_lr()[0])
        grad_norm = clip_grad_norm(self.policy, self.config.optimizer.max_grad_norm) if has_gradient else 0.0
        skipped = not math.isfinite(grad_norm)
        if skipped:
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()  # where there are no gradients this changes nothing, not even the moments
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateReport(sums, grad_norm, learning_rate, skipped, largest_gap)
