"""Every setting, typed, frozen and checked on construction. `vcr1-fast config FILE` prints the resolved values.

The string under a field is its help text on the command line. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vcr1_fast.types import SamplingParams


class ConfigError(ValueError):
    """A setting is wrong. The message says which, what it is, and what is wanted."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy."""

    path: str = "tiny"
    """Folder of a Hugging Face Qwen2.5-VL checkpoint, or `tiny` for the 1 M parameter model in the package."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of forward and backward; master weights stay float32. auto: bfloat16 on CUDA, float32 on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs. auto: CUDA when torch sees a GPU."""
    kernels: Literal["auto", "off"] = "auto"
    """auto: the fused head and shared-prefix attention of vcr1_kernels, on CUDA as Triton and flash attention. off: the
    plain torch definitions, for comparison."""
    gradient_checkpointing: bool = False
    """Recompute decoder layers in the backward pass: less memory, about one third more time."""
    freeze_vision: bool = False
    """Train the language model only."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Annotation files."""

    train: tuple[str, ...] = ()
    """Annotation files (JSON or JSONL) to train on; several files are shuffled together."""
    eval: tuple[str, ...] = ()
    """Held-out annotation files."""
    video_root: str | None = None
    """Folder that relative video paths start from. Default: the folder of the annotation file."""


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Which frames the model sees, and at what size (rules of the original Qwen2.5-VL recipe)."""

    reader: Literal["auto", "pyav", "decord"] = "auto"
    """auto: PyAV. decord runs in a worker process that is killed when it hangs."""
    fps: float = 2.0
    """Frames per second to sample."""
    min_frames: int = 4
    """At least this many frames (even)."""
    max_frames: int = 768
    """At most this many frames (even)."""
    total_pixels: int = 3584 * 28 * 28
    """Pixel budget of a whole video."""
    min_frame_pixels: int = 16 * 28 * 28
    """A frame is scaled up to at least this many pixels."""
    max_frame_pixels: int = 768 * 28 * 28
    """A frame is scaled down to at most this many pixels."""
    timeout_s: float = 60.0
    """A clip that takes longer to decode in the decord worker is given up and quarantined."""

    def __post_init__(self) -> None:
        _require(self.fps > 0, f"video.fps is {self.fps}, wanted a positive number of frames per second")
        for name in ("min_frames", "max_frames"):
            value = getattr(self, name)
            _require(value >= 2 and value % 2 == 0, f"video.{name} is {value}, wanted an even number >= 2")
        _require(
            self.min_frames <= self.max_frames,
            f"video.min_frames is {self.min_frames}, more than video.max_frames {self.max_frames}",
        )
        _require(
            28 * 28 <= self.min_frame_pixels <= self.max_frame_pixels,
            f"video.min_frame_pixels is {self.min_frame_pixels}, wanted between 784 and "
            f"video.max_frame_pixels {self.max_frame_pixels}",
        )


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """How answers are asked for and scored."""

    recipe: Literal["fixed", "paper"] = "fixed"
    """paper: prompts, parsers and rewards with the original's quirks, for comparison. fixed: repaired."""
    think: bool = True
    """Ask for a think block before the answer."""
    reward_weights: dict[str, float] = field(default_factory=lambda: {"format": 1.0, "iou": 1.0})
    """Weight of each reward part; parts not named count 1."""

    def __post_init__(self) -> None:
        for name, weight in self.reward_weights.items():
            _require(weight >= 0, f"task.reward_weights.{name} is {weight}, wanted a number >= 0")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are drawn for training."""

    engine: Literal["local"] = "local"
    """local: the Hugging Face model in this process."""
    group_size: int = 8
    """G, completions per prompt."""
    temperature: float = 1.0
    """Sampling temperature; log-probs everywhere are taken at this temperature."""
    top_p: float = 1.0
    """Nucleus sampling. Below 1 the log-probs are still those of the whole vocabulary."""
    max_new_tokens: int = 1024
    """Longest completion."""
    max_batch_rows: int = 256
    """Completions decoded together; bounds the KV cache."""

    def __post_init__(self) -> None:
        _require(self.group_size >= 1, f"rollout.group_size is {self.group_size}, wanted >= 1")
        _require(
            self.temperature > 0,
            f"rollout.temperature is {self.temperature}, wanted > 0 (greedy rollouts have no group variance)",
        )
        _require(0 < self.top_p <= 1, f"rollout.top_p is {self.top_p}, wanted in (0, 1]")
        _require(self.max_new_tokens >= 1, f"rollout.max_new_tokens is {self.max_new_tokens}, wanted >= 1")
        _require(
            self.max_batch_rows >= self.group_size,
            f"rollout.max_batch_rows is {self.max_batch_rows}, less than rollout.group_size {self.group_size}",
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
    scale_advantages: Literal["group", "batch", "none"] = "group"
    """Divide (reward - group mean) by the group's standard deviation, the step's, or nothing."""
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
        _require(0 <= self.clip_low < 1, f"algorithm.clip_low is {self.clip_low}, wanted in [0, 1)")
        _require(self.clip_high >= 0, f"algorithm.clip_high is {self.clip_high}, wanted >= 0")
        _require(self.beta >= 0, f"algorithm.beta is {self.beta}, wanted >= 0")
        _require(
            self.minibatches_per_rollout >= 1,
            f"algorithm.minibatches_per_rollout is {self.minibatches_per_rollout}, wanted >= 1",
        )
        has_clip = self.loss not in ("cispo", "sapo")
        _require(
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
        _require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}, wanted > 0")
        _require(self.max_grad_norm > 0, f"optimizer.max_grad_norm is {self.max_grad_norm}, wanted > 0")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}, wanted >= 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    output_dir: str = "runs/default"
    """Folder of this run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, quarantine.jsonl."""
    num_steps: int = 100
    """Rollouts to do (each followed by algorithm.minibatches_per_rollout updates)."""
    prompts_per_step: int = 8
    """Prompts per step over all ranks."""
    tokens_per_microbatch: int = 32768
    """Packed tokens that go through the model at once; a group larger than this goes alone."""
    seed: int = 0
    """Of data order, sampling and everything else random."""
    resume: str = "auto"
    """auto: continue from the newest checkpoint in output_dir if there is one. never: start anew (the folder
    must not hold checkpoints). Or the path of one checkpoint."""
    max_bad_sample_frac: float = 0.5
    """Stop with a summary when more than this fraction of the samples read so far could not be used."""

    def __post_init__(self) -> None:
        _require(self.num_steps >= 0, f"train.num_steps is {self.num_steps}, wanted >= 0")
        _require(self.prompts_per_step >= 1, f"train.prompts_per_step is {self.prompts_per_step}, wanted >= 1")
        _require(
            self.tokens_per_microbatch >= 1,
            f"train.tokens_per_microbatch is {self.tokens_per_microbatch}, wanted >= 1",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept on disk."""

    every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints to keep."""
    export: bool = True
    """Write a Hugging Face folder (safetensors, tokenizer, config) at the end."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"checkpoint.every is {self.every}, wanted >= 0")
        _require(self.keep >= 1, f"checkpoint.keep is {self.keep}, wanted >= 1")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out score."""

    every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    temperature: float = 0.0
    """0 is greedy."""
    max_new_tokens: int | None = None
    """Longest answer. Default: rollout.max_new_tokens."""
    max_examples: int | None = None
    """Evaluate only the first so many examples of each task."""


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised cold start (`vcr1-fast sft`)."""

    num_steps: int = 250
    """Optimizer steps."""
    examples_per_step: int = 16
    """Examples per step over all ranks."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sft: SftConfig = field(default_factory=SftConfig)

    def __post_init__(self) -> None:
        prompts, minibatches = self.train.prompts_per_step, self.algorithm.minibatches_per_rollout
        _require(
            prompts % minibatches == 0,
            f"train.prompts_per_step is {prompts}, but algorithm.minibatches_per_rollout is {minibatches}: "
            "make the first a multiple of the second",
        )

    def check_world_size(self, world_size: int) -> None:
        """Every rank takes the same share of each mini-batch.

        Raises ConfigError when prompts_per_step does not divide by ranks x mini-batches.
        """
        prompts, minibatches = self.train.prompts_per_step, self.algorithm.minibatches_per_rollout
        _require(
            prompts % (world_size * minibatches) == 0,
            f"train.prompts_per_step is {prompts}, but there are {world_size} ranks and "
            f"algorithm.minibatches_per_rollout is {minibatches}: make it a multiple of {world_size * minibatches}",
        )
        per_step = self.sft.examples_per_step
        _require(
            per_step % world_size == 0,
            f"sft.examples_per_step is {per_step}, but there are {world_size} ranks: make it a multiple of that",
        )
