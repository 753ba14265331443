"""AdamW, the learning-rate schedule, and gradient clipping.

In: a policy with float32 weights (plain or sharded) and `OptimizerConfig`. Out: a stock torch optimizer and scheduler.
Called once by the training loop and the supervised cold start; `clip_grad_norm` once per update.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vcr1_fast.learner.adamw_8bit import AdamW8bit, require_torchao
from vcr1_fast.settings.config import ConfigError, OptimizerConfig


def build_optimizer(policy: nn.Module, config: OptimizerConfig, tower: nn.Module | None = None) -> Optimizer:
    """AdamW over the trainable parameters, in two groups: matrices (decayed) and the rest (biases, norms: not). The
    vision tower has two more where its learning rate is another one.

    A matrix is any parameter of two or more dimensions, so embeddings and the patch convolution decay too.
    States take the parameters' float32, or 8 bits (optimizer.name). Call it after sharding: FSDP2 replaces the
    parameters. `tower`: a part of the policy. Raises TypeError for a trainable parameter that is not float32,
    ConfigError when nothing is trainable or torchao is wanted and not installed.
    """
    in_tower = {id(parameter) for parameter in tower.parameters()} if tower and config.vision_learning_rate else set()
    kinds = [(False, True), (False, False), (True, True), (True, False)]  # (of the tower, a matrix)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {kind: [] for kind in kinds}
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            raise TypeError(
                f"{name} is {parameter.dtype}, wanted float32: at a learning rate of {config.learning_rate:g} most "
                "updates would round to nothing; load the model in float32 and set model.compute_dtype instead"
            )
        groups[id(parameter) in in_tower, parameter.ndim >= 2].append(parameter)
    if not any(groups.values()):
        raise ConfigError("no parameter is trainable: unfreeze a part of the model")
    parts = [
        {"params": group, "weight_decay": config.weight_decay if is_matrix else 0.0}
        | ({"lr": config.vision_learning_rate} if of_tower else {})
        for (of_tower, is_matrix), group in groups.items()
        if group
    ]
    if config.name == "adamw_8bit":
        require_torchao()
        return AdamW8bit(parts, config.learning_rate, config.betas, config.eps)
    # Fused: on CUDA the foreach default keeps a temporary as large as the weights, 28 GB at 7B in float32; on a CPU
    # the default goes weight by weight, 6 ms for the packaged model where this takes 2.
    devices = {parameter.device.type for group in groups.values() for parameter in group}
    return AdamW(
        parts,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True if devices in ({"cuda"}, {"cpu"}) else None,
    )


def learning_rate_factor(update: int, config: OptimizerConfig, num_updates: int) -> float:
    """What the peak learning rate is multiplied by in update k = 1 .. N, with W = warmup_steps, N = num_updates.

        k <= W:              k / W                                 (update 1 is above 0, update W at the peak)
        constant:            1
        linear:              (N - k + 1) / (N - W)                 (update W + 1 at the peak, 0 after update N)
        cosine:              (1 + cos(pi (k - W - 1) / (N - W))) / 2

    After update N, linear and cosine give 0.
    """
    if update <= config.warmup_steps:
        return update / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done_frac = min(1.0, (update - config.warmup_steps - 1) / max(1, num_updates - config.warmup_steps))
    if config.schedule == "linear":
        return 1.0 - done_frac
    return (1.0 + math.cos(math.pi * done_frac)) / 2.0


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, num_updates: int) -> LambdaLR:
    """The schedule of `learning_rate_factor` over `num_updates` optimizer updates. Call `.step()` after each update."""
    # LambdaLR counts the updates done, so the update to come is one more.
    return LambdaLR(optimizer, lambda num_done: learning_rate_factor(num_done + 1, config, num_updates))


def clip_grad_norm(policy: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their global 2-norm (over parameters and ranks) is at most max_norm.

    Returns the norm before clipping, the same on every rank; 0.0 without gradients. A norm that is not finite is
    returned as it is and the gradients are left alone: the caller must skip the update. A collective when sharded.
    """
    with_grad = [parameter for parameter in policy.parameters() if parameter.grad is not None]
    if not with_grad:
        return 0.0
    total = nn.utils.get_total_norm([parameter.grad for parameter in with_grad if parameter.grad is not None])
    if isinstance(total, DTensor):
        total = total.full_tensor()
    norm = float(total)
    if math.isfinite(norm):
        nn.utils.clip_grads_with_norm_(with_grad, max_norm, total)
    return norm
