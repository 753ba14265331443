"""Groups -> one optimizer update. The only `backward()` in the tree."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from vcr1_kernels.losses import Aggregation

from vcr1_fast.learner.device_batch import DeviceBatch
from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.learner.loading import empty_model, load_weights, move_values
from vcr1_fast.learner.lora import adapters_off, add_adapters
from vcr1_fast.learner.memory_sums import reduces_once, with_recompute
from vcr1_fast.learner.model import PolicyModel, resolve_dtype
from vcr1_fast.learner.model_size import read_model_size
from vcr1_fast.learner.objective import Objective, grpo_objective, sft_objective
from vcr1_fast.learner.optimizer import build_optimizer, build_schedule, clip_grad_norm
from vcr1_fast.learner.packing import placeholder
from vcr1_fast.learner.row_cost import GroupSize, RowCost, group_size
from vcr1_fast.learner.sharding import (
    World,
    all_max_float,
    all_max_int,
    all_reduce_sum,
    device_mesh,
    on_all_ranks,
    reduce_gradients,
    shard,
)
from vcr1_fast.learner.totals import Totals
from vcr1_fast.learner.update_rows import UpdateRows, plan_and_pack
from vcr1_fast.run.model_folder import model_folder
from vcr1_fast.settings.config import Config
from vcr1_fast.types import PackedBatch, RolloutGroup, RunError, SampleError


@dataclass(frozen=True)
class UpdateReport:
    """Sums over all ranks of one optimizer update, and what the optimizer did."""

    sums: dict[str, float]
    grad_norm: float
    learning_rate: float
    skipped: bool  # the gradient was not finite, weights are unchanged
    largest_gap: float = 0.0  # of |log-prob - the engine's|, over all tokens
    too_large: tuple[SampleError, ...] = ()  # groups of this rank above train.max_group_tokens, which were left out

    @property
    def has_signal(self) -> bool:
        """Whether the weights followed a gradient that is not 0."""
        return self.grad_norm > 0 and not self.skipped


def load_policy(
    config: Config,
    world: World,
    kernels: KernelChoice | None = None,
    *,
    is_trained: bool = True,
    mesh: DeviceMesh | None = None,
    suppressed_ids: Sequence[int] = (),
) -> PolicyModel:
    """The model of `config.model.path` with this rank's part of its weights: float32 where they are trained.
    `mesh`: see `sharding.shard`; `suppressed_ids`: see `PolicyModel`."""
    model, dtype = config.model, resolve_dtype(config.model, world.device)
    folder = model_folder(model.path)
    hf = empty_model(folder, torch.float32)
    if model.lora.rank:
        add_adapters(hf, model.lora, config.train.seed, dtype)
    policy = PolicyModel(hf, model, dtype, kernels, world.device, suppressed_ids)
    frozen = [weight for weight in policy.parameters() if not weight.requires_grad]
    if not is_trained:
        policy.requires_grad_(False)
        # FSDP computes with weights of the compute dtype however they are kept. One process computes in autocast,
        # and bfloat16 embeddings would give it other residuals than the policy's: a KL that does not begin at 0.
        frozen = list(policy.parameters()) if world.world_size > 1 else frozen
    for weight in frozen:
        weight.data = weight.data.to(dtype)
    move_values(hf, world.device)
    shard(policy, world, dtype, mesh)
    weights = (hf, folder, world.device, policy.family)
    on_all_ranks("loading the model's weights", lambda: load_weights(*weights), world)
    return policy.train()


def _fitted(config: Config, world: World) -> tuple[Config, bool]:
    """(`config` with what is recomputed decided, whether gradients wait for an update's last row), by what fits into
    the smallest of the GPUs: all ranks must do alike."""
    if world.device.type != "cuda":
        return config, config.train.reduce_gradients != "each_row"
    memory_gb = torch.cuda.get_device_properties(world.device).total_memory / 1e9
    smallest_gb, size = -all_max_float(-memory_gb, world), read_model_size(config.model.path)
    config = with_recompute(config, size, world.world_size, smallest_gb)
    return config, reduces_once(config, size, world.world_size, smallest_gb)


class Learner:
    """Policy, optimizer and schedule of one rank; all ranks call the same methods in the same order."""

    def __init__(
        self,
        config: Config,
        world: World,
        num_updates: int,
        kernels: KernelChoice | None = None,
        suppressed_ids: Sequence[int] = (),
    ) -> None:
        """Loads `config.model.path` with float32 master weights and shards it over the ranks.

        Args:
            num_updates: optimizer updates of the whole run, for the learning-rate schedule.
            kernels, suppressed_ids: as for `PolicyModel`.
        """
        config, reduces_all_at_once = _fitted(config, world)
        self.config, self.world, self.kernels = config, world, kernels
        self.dtype = resolve_dtype(config.model, world.device)  # that forward and backward compute in
        mesh = device_mesh(world, config.train.replicate) if world.world_size > 1 else None
        load = partial(load_policy, config, world, kernels, mesh=mesh, suppressed_ids=suppressed_ids)
        self.policy = load()
        has_copy = config.algorithm.beta > 0 and not config.model.lora.rank  # adapters can be switched off instead
        self.reference = load(is_trained=False) if has_copy else None
        gc.collect()
        torch.cuda.empty_cache()  # a colocated engine sizes itself by what is free, and cached memory is not
        self.optimizer = build_optimizer(self.policy, config.optimizer, self.policy.family.tower(self.policy.hf))
        self.schedule = build_schedule(self.optimizer, config.optimizer, num_updates)
        self.reduces_once = reduces_all_at_once
        self._num_skipped = 0  # updates in a row
        kind = (self.policy.family, self.policy.hf.config, config.model.is_tower_frozen)
        self._placeholder = placeholder(*kind, world.device, self.dtype)

    def update_grpo(self, groups: Sequence[RolloutGroup]) -> list[UpdateReport]:
        """All updates of one rollout: this rank's groups, split into `minibatches_per_rollout` equal parts.

        Each update is planned over all ranks, and groups go to the rank that runs them. Groups whose advantages are all
        0 still count in the denominators but go through the model only when a KL or entropy term needs them.
        """
        algorithm = self.config.algorithm
        runs_all = algorithm.beta > 0 or algorithm.entropy_coef != 0
        sizes = [group_size(g, algorithm.mask_truncated, is_run=runs_all or g.is_trainable) for g in groups]
        updates = self._rows(groups, sizes, algorithm.loss, algorithm.minibatches_per_rollout)
        minibatches = self._with_old_logprobs([update.rows for update in updates])

        def objective(batch: DeviceBatch) -> Objective:
            return grpo_objective(batch, self._reference_logprobs(batch), algorithm)

        temperature = self.config.rollout.temperature
        return [
            self._run(replace(update, rows=rows), objective, temperature)
            for update, rows in zip(updates, minibatches, strict=True)
        ]

    def _with_old_logprobs(self, minibatches: Sequence[Sequence[PackedBatch]]) -> list[list[PackedBatch]]:
        """The rows of one rollout with what their ratios are taken against.

        One update by answers of the newest weights: the current policy (None), whose ratio is 1. Otherwise what the
        engine reported, unless `sampling_correction` treats the engine apart: then the policy as it stands before the
        first of these updates, at the price of one more forward when there are several.
        """
        algorithm = self.config.algorithm
        is_single, is_corrected = len(minibatches) == 1, algorithm.sampling_correction != "none"
        if is_single and (is_corrected or self.config.rollout.most_updates_behind == 0):
            return [list(rows) for rows in minibatches]
        if not is_corrected:
            return [[replace(row, old_logprob_N=row.engine_logprob_N) for row in rows] for rows in minibatches]
        result: list[list[PackedBatch]] = []
        with torch.no_grad():
            for rows in minibatches:
                result.append([])
                for batch, is_real in self._with_placeholders(rows, all_max_int(len(rows), self.world)):
                    logprob_N = self.policy(self.policy.device_batch(batch), self.config.rollout.temperature)[0]
                    if is_real:
                        result[-1].append(replace(batch, old_logprob_N=logprob_N))
        return result

    def update_sft(self, groups: Sequence[RolloutGroup]) -> UpdateReport:
        """One supervised update: each group holds the one completion to teach. Loss: mean over all taught tokens."""
        sizes = [group_size(group, mask_truncated=False, is_run=True) for group in groups]
        [update] = self._rows(groups, sizes, "dapo")
        return self._run(update, sft_objective, temperature=1.0)

    def _rows(
        self,
        groups: Sequence[RolloutGroup],
        sizes: Sequence[GroupSize],
        aggregation: Aggregation,
        num_updates: int = 1,
    ) -> list[UpdateRows]:
        cost = RowCost.of(self.policy.hf.config, self.config.model)
        return plan_and_pack(groups, sizes, aggregation, cost, self.config, self.world, num_updates)

    def _run(
        self, update: UpdateRows, objective: Callable[[DeviceBatch], Objective], temperature: float
    ) -> UpdateReport:
        report = self._update(update.rows, objective, temperature)
        return replace(report, sums=report.sums | update.sums, too_large=update.too_large)

    @torch.no_grad()
    def _reference_logprobs(self, batch: DeviceBatch) -> Tensor | None:
        if self.config.algorithm.beta == 0:
            return None
        if self.reference is not None:
            return self.reference(batch, self.config.rollout.temperature)[0]
        with adapters_off(self.policy):
            return self.policy(batch, self.config.rollout.temperature)[0]

    def _update(
        self, rows: Sequence[PackedBatch], objective: Callable[[DeviceBatch], Objective], temperature: float
    ) -> UpdateReport:
        totals = Totals(self.world.device)
        num_rows = all_max_int(len(rows), self.world)
        for index, (packed, is_real) in enumerate(self._with_placeholders(rows, num_rows)):
            batch = self.policy.device_batch(packed)
            wanted = objective(batch)
            loss, sums = self.policy(batch, temperature, wanted)
            reduce_gradients(self.policy, self.reduces_once, is_last=index == num_rows - 1)
            loss.backward()  # gradients add up over rows, and over ranks (sharding.shard sums them)
            counts = {"tokens_executed": packed.num_tokens, "tokens_unshared": packed.num_unshared_tokens}
            totals.add(sums | {"loss": loss.detach()}, counts, is_real, wanted.largest_gap)
        sums, largest_gap = totals.read()
        largest_gap = all_max_float(largest_gap, self.world)
        return self._apply(all_reduce_sum(sums, self.world), largest_gap, has_gradient=num_rows > 0)

    def _with_placeholders(self, rows: Sequence[PackedBatch], num_rows: int) -> Iterator[tuple[PackedBatch, bool]]:
        """The rows, and then placeholders (False) until there are as many as on the rank with most."""
        for index in range(num_rows):
            is_real = index < len(rows)
            yield rows[index] if is_real else self._placeholder, is_real

    def _apply(self, sums: dict[str, float], largest_gap: float, has_gradient: bool) -> UpdateReport:
        """Clip, step, schedule. A step in which no group has a gradient moves only the schedule."""
        learning_rate = float(self.schedule.get_last_lr()[0])
        grad_norm = clip_grad_norm(self.policy, self.config.optimizer.max_grad_norm) if has_gradient else 0.0
        skipped = not math.isfinite(grad_norm)
        if skipped:
            self.optimizer.zero_grad(set_to_none=True)
        self._num_skipped = self._num_skipped + 1 if skipped else 0
        self._check_skipped(grad_norm)
        self.optimizer.step()  # where there are no gradients this changes nothing, not even the moments
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateReport(sums, grad_norm, learning_rate, skipped, largest_gap)

    def _check_skipped(self, grad_norm: float) -> None:
        """Raises RunError, on every rank alike, where skipping has become all that is done."""
        limit = self.config.optimizer.max_skipped_updates
        if limit and self._num_skipped >= limit:
            raise RunError(
                f"{self._num_skipped} updates in a row were skipped because the gradient's norm was {grad_norm}: the "
                "weights, or what the loss divides by, are not finite any more. Go on from an earlier checkpoint "
                "(train.resume=PATH) with a lower optimizer.learning_rate, or raise optimizer.max_skipped_updates"
            )
