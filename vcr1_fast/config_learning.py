"""Settings of rollout, objective and optimizer: sections of `vcr1_fast.config`, to be imported from there.

The string under a field is its help text on the command line. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vcr1_fast.config_error import require
from vcr1_fast.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class SGLangConfig:
    """SGLang as the rollout engine, in processes of its own."""

    python: str | None = None
    """Interpreter of the environment that has SGLang, such as .venv-sglang/bin/python. Default: the current one."""
    num_workers: int = 1
    """Processes with an engine each."""
    mem_fraction_static: float = 0.6
    """Share of the memory that SGLang takes for weights and KV cache."""
    bucket_mb: int = 512
    """Weights are handed over in pieces of this size."""
    max_inflight: int = 64
    """Prompts that one worker has at once; bounds the pixels it holds."""
    timeout_s: float = 1800.0
    """Longest time for all answers to one prompt, waiting in the worker included, and for one bucket of weights."""
    start_timeout_s: float = 600.0
    """Longest start of a worker."""
    max_attempts: int = 3
    """Times that the answers to one prompt may fail before the run stops."""
    max_restarts: int = 3
    """Workers started again in a row, without one answer between, before the run stops."""
    backoff_s: float = 1.0
    """Pause before a worker is started again; doubles each time in a row, up to 30 s."""
    engine_args: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Further arguments of sglang.Engine, such as {attention_backend: triton, max_total_tokens: 65536}."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "bucket_mb", "max_inflight", "max_attempts"):
            require(getattr(self, name) >= 1, f"rollout.sglang.{name} is {getattr(self, name)}, wanted >= 1")
        for name in ("max_restarts", "backoff_s"):
            require(getattr(self, name) >= 0, f"rollout.sglang.{name} is {getattr(self, name)}, wanted >= 0")
        for name in ("timeout_s", "start_timeout_s"):
            require(getattr(self, name) > 0, f"rollout.sglang.{name} is {getattr(self, name)}, wanted more than 0")
        fraction = self.mem_fraction_static
        require(0 < fraction < 1, f"rollout.sglang.mem_fraction_static is {fraction}, wanted in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are drawn for training."""

    engine: Literal["local", "sglang"] = "local"
    """local: the Hugging Face model in this process. sglang: SGLang in processes of its own, see rollout.sglang."""
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    """Settings of engine sglang."""
    group_size: int = 8
    """G, completions per prompt."""
    temperature: float = 1.0
    """Sampling temperature; log-probs everywhere are taken at this temperature."""
    top_p: float = 1.0
    """Nucleus sampling. Below 1 the log-probs are still those of the whole vocabulary."""
    max_new_tokens: int = 1024
    """Longest completion."""
    max_batch_rows: int = 256
    """Most completions decoded together."""
    max_batch_tokens: int = 65536
    """Tokens in the KV cache of one batch, prompts (once for each group) and longest completions: bounds its memory. A
    7B model takes 13 GB for the default: 4 for the cache, 9 to fill it. A single group is always answered."""
    num_ground_truth: int = 0
    """1: the last answer of each group is the annotated one instead of a sampled one (TempSamp-R1)."""
    max_resample_rounds: int = 0
    """Rounds in which groups whose rewards are all equal are replaced by answers to further prompts (DAPO)."""

    def __post_init__(self) -> None:
        require(self.group_size >= 1, f"rollout.group_size is {self.group_size}, wanted >= 1")
        require(
            self.temperature > 0,
            f"rollout.temperature is {self.temperature}, wanted > 0 (greedy rollouts have no group variance)",
        )
        require(0 < self.top_p <= 1, f"rollout.top_p is {self.top_p}, wanted in (0, 1]")
        require(self.max_new_tokens >= 1, f"rollout.max_new_tokens is {self.max_new_tokens}, wanted >= 1")
        require(
            self.max_batch_rows >= self.group_size,
            f"rollout.max_batch_rows is {self.max_batch_rows}, less than rollout.group_size {self.group_size}",
        )
        require(self.max_batch_tokens >= 1, f"rollout.max_batch_tokens is {self.max_batch_tokens}, wanted >= 1")
        require(
            0 <= self.num_ground_truth <= min(1, self.group_size - 1),
            f"rollout.num_ground_truth is {self.num_ground_truth} and rollout.group_size is {self.group_size}, "
            "wanted 0, or 1 beside at least one sampled answer",
        )
        require(
            0 <= self.max_resample_rounds <= 100,
            f"rollout.max_resample_rounds is {self.max_resample_rounds}, wanted 0 .. 100",
        )

    def sampling(self, seed: int) -> SamplingParams:
        return SamplingParams(self.group_size, self.max_new_tokens, self.temperature, self.top_p, seed)


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """The GRPO objective (formulas in vcr1_kernels.losses)."""

    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"] = "grpo"
    """grpo, dr_grpo, dapo: clipped per token, averaged per sequence then over sequences, over a constant length, over
    all tokens. gspo: the ratio of the whole sequence is clipped. cispo: clipped weights on log-probs. sapo: a smooth
    gate instead of a clip."""
    scale_advantages: Literal["group", "batch", "none", "task"] = "group"
    """Divide (reward - group mean) by the group's standard deviation, the step's, nothing, or a moving average of the
    task's."""
    scale_decay: float = 0.99
    """Decay of that moving average per step."""
    clip_low: float = 0.2
    """Ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """Ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of ratio x |advantage| where the advantage is negative, such as 3.0; none: no bound."""
    entropy_coef: float = 0.0
    """Weight of the entropy, which is raised by it."""
    beta: float = 0.0
    """Weight of the KL to the starting weights; 0 loads no reference model."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL from sampled tokens."""
    minibatches_per_rollout: int = 1
    """Optimizer updates per rollout. At 1 the ratio is exactly 1 and engine log-probs are not needed."""
    mask_truncated: bool = False
    """Leave completions that hit max_new_tokens out of the loss."""

    def __post_init__(self) -> None:
        require(0 <= self.scale_decay < 1, f"algorithm.scale_decay is {self.scale_decay}, wanted in [0, 1)")
        require(0 <= self.clip_low < 1, f"algorithm.clip_low is {self.clip_low}, wanted in [0, 1)")
        require(self.clip_high >= 0, f"algorithm.clip_high is {self.clip_high}, wanted >= 0")
        require(self.beta >= 0, f"algorithm.beta is {self.beta}, wanted >= 0")
        require(
            self.minibatches_per_rollout >= 1,
            f"algorithm.minibatches_per_rollout is {self.minibatches_per_rollout}, wanted >= 1",
        )
        has_clip = self.loss not in ("cispo", "sapo")
        require(
            self.dual_clip is None or (self.dual_clip > 1 and has_clip),
            f"algorithm.dual_clip is {self.dual_clip} with loss {self.loss}, wanted > 1 (a ratio of 1 must not be cut) "
            "and a loss that clips: grpo, dr_grpo, dapo or gspo",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW on float32 master weights."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Linear rise from 0."""
    weight_decay: float = 0.0
    """Applied to matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: float = 1e-8
    """AdamW's denominator floor."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}, wanted > 0")
        require(self.max_grad_norm > 0, f"optimizer.max_grad_norm is {self.max_grad_norm}, wanted > 0")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}, wanted >= 0")
