"""Every setting, typed, frozen and checked on construction. `vcr1-fast config FILE` prints the resolved values.

The string under a field is its help text on the command line. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from vcr1_fast.settings.data import AnnotationFormat as AnnotationFormat
from vcr1_fast.settings.data import DataConfig as DataConfig
from vcr1_fast.settings.data import DataFile as DataFile
from vcr1_fast.settings.error import ConfigError as ConfigError
from vcr1_fast.settings.error import require, require_least
from vcr1_fast.settings.judge import JudgeConfig as JudgeConfig
from vcr1_fast.settings.learning import AlgorithmConfig, OptimizerConfig, RolloutConfig
from vcr1_fast.settings.video import EvalVideoConfig as EvalVideoConfig
from vcr1_fast.settings.video import VideoConfig as VideoConfig

MAX_REWARD_WEIGHT = 1e6  # infinity times a part of 0 is NaN, and squares of 1e300 are infinite


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) on matrices of the language model, instead of training all weights."""

    rank: int = 0
    """Rank of the adapters, such as 32; everything else, the vision tower too, is frozen then. 0: no adapters."""
    alpha: float = 64.0
    """The product of an adapter's two matrices counts alpha / rank times."""
    targets: tuple[str, ...] | None = None
    """Names of the matrices that get one, in every decoder layer, such as [q_proj, v_proj]. Default: all of them."""

    def __post_init__(self) -> None:
        require_least(self, "model.lora", 0, "rank", note=" (0: no adapters)")
        require(0 < self.alpha < math.inf, f"model.lora.alpha is {self.alpha}, wanted a finite number > 0")
        require(self.targets != (), "model.lora.targets is empty, wanted at least one matrix, such as [q_proj, v_proj]")

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied by; 0 without adapters."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy."""

    path: str = "tiny"
    """Folder of a Hugging Face checkpoint of Qwen2.5-VL or Qwen3-VL, or its id on the Hub, owner/name or
    owner/name@revision; `tiny`, `tiny3`: the 1 M parameter models in the package, one of each. For eval also a
    checkpoint of a run, RUN/checkpoints/step_000100."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of forward and backward; master weights stay float32. auto: bfloat16 on CUDA, float32 on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs. auto: CUDA when torch sees a GPU."""
    kernels: Literal["auto", "required", "off"] = "auto"
    """auto: the fused head, shared-prefix attention and the rest of vcr1_kernels, on CUDA with Liger's norms and MLPs;
    there each of them is compared with its plain path when a run starts, and one that does not hold is left out and
    named. required: the run then does not start. off: plain torch and transformers' own modules, for comparison."""
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What of decoder layers and tower blocks runs again in the backward pass. full: all, least memory, about one third
    more time. selective: all but matrix products and attention, about two thirds of what none keeps. auto: the
    first of none, selective and full whose worst step fits into the GPU; without one none."""
    compile: bool = False
    """torch.compile of each decoder layer, and of each tower block on CUDA, at its first use; what that takes is
    printed, and no other layout of a row is compiled anew. Not measured on a GPU: neither its gain nor its time."""
    freeze_vision: bool = False
    """Train the language model only."""
    freeze: tuple[str, ...] = ()
    """Weights that are not trained, by patterns of their names in the published checkpoint, such as
    [visual.patch_embed.*, model.embed_tokens.weight]; * stands for any part of a name."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train low-rank adapters of the language model only."""

    @property
    def is_tower_frozen(self) -> bool:
        """Whether the vision tower keeps the weights of `path`, so that a clip is encoded once for all steps."""
        return self.freeze_vision or self.lora.rank > 0


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """How answers are asked for and scored."""

    recipe: Literal["fixed", "paper"] = "fixed"
    """paper: parsers and rewards with the original's quirks, and prompts that ask for the same in words of our own (its
    words: task.prompts), for comparison. fixed: repaired."""
    think: bool = True
    """Ask for a think block before the answer."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Task to a text file with the words of its question, such as a published prompt, for train, sft and eval alike;
    {event}, {question}, {options}, ... stand for values of the example (docs/prompts.md). Default: built-in words."""
    video_first: bool | None = None
    """The video stands before the question in the prompt, in training and evaluation. Default: after it, as in
    VideoChat-R1, but before it in the rounds of eval.perception focus, as in VideoChat-R1.5."""
    timestamps: Literal["positions", "text"] = "positions"
    """How the model is told the time of frames. positions: by the time axis of M-RoPE, as Qwen2.5-VL is trained. text:
    in words before each pair of frames, <12.5 seconds>, as in TimeLens and Qwen3-VL, whose one way it is."""
    reward_weights: dict[str, float] = field(default_factory=lambda: {"format": 1.0, "iou": 1.0})
    """Weight of each reward part; parts not named count 1."""
    custom: tuple[str, ...] = ()
    """Tasks of your own, each as module:Class, such as my_task:Counting."""
    rewards: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Reward parts of your own: task to a list of module:function. The part has the function's name."""
    iou: Literal["plain", "boundary"] = "plain"
    """Part `iou` of temporal grounding. boundary: less the further its ends are off (Time-R1); scores stay plain."""
    grounding_answer: Literal["period", "list", "sentence"] = "period"
    """How temporal grounding is answered. list: by all periods of the event, [(start, end), ...], whose part `iou` is
    that of two sets of instants (VideoChat-R1.5). sentence: "The event happens in 1.5 - 4.0 seconds.", without tags and
    think block (TimeLens)."""
    max_intervals: int | None = None
    """Answers that list more periods than this have no readable list for the reward, in grounded QA and in temporal
    grounding by list; 3 in VideoChat-R1.5. Default: no limit."""
    shaping: dict[str, Literal["tempsamp_r1"]] = field(default_factory=dict)
    """Reward part to a function that it goes through on its way into the reward. tempsamp_r1: flat above 0.8, steep
    below."""
    temporal_contrast: bool = False
    """Adds the part `order`: 1 for correct answers if they are not better with the frames shuffled (T-GRPO, there
    weighted 0.3). Samples half as many answers again."""
    length_reward: Literal["none", "window", "overlong"] = "none"
    """Adds the part `length`, by tokens. window: 1 for a correct answer inside length_tokens if its group has another
    correct one (Video-R1, there weighted 0.2). overlong: 1 up to the first of length_tokens, falling to 0 at the second
    (DAPO)."""
    length_tokens: tuple[int, int] = (320, 512)
    """The two lengths that length_reward needs, in tokens."""
    reward_timeout_s: float = 300.0
    """Longest time of one call of code of yours that scores answers: functions of task.rewards, score and metrics of
    task.custom. They run in a process of their own, which is ended then. 0: in the trainer's process, without a limit.
    """
    max_failed_steps: int = 10
    """Steps in a row in which no group, or none of a task, could be scored, after which the run ends. Until then groups
    without a score are left out, and their questions come again later."""

    def __post_init__(self) -> None:
        for name, weight in self.reward_weights.items():
            require(
                0 <= weight <= MAX_REWARD_WEIGHT,
                f"task.reward_weights.{name} is {weight}, wanted a number in [0, {MAX_REWARD_WEIGHT:,.0f}]",
            )
        low, high = self.length_tokens
        require(0 <= low < high, f"task.length_tokens is {self.length_tokens}, wanted 0 <= first < second")
        require(
            0 <= self.reward_timeout_s < math.inf,
            f"task.reward_timeout_s is {self.reward_timeout_s}, wanted seconds >= 0 (0: no limit)",
        )
        require_least(self, "task", 1, "max_intervals", note=", or nothing")
        require_least(self, "task", 1, "max_failed_steps")
        require(
            self.iou == "plain" or self.grounding_answer != "list",
            f"task.iou is {self.iou} and task.grounding_answer is list: a list has no two ends, set one to its default",
        )
        require(
            not (self.think and self.grounding_answer == "sentence"),
            "task.grounding_answer is sentence, which has no think block: set task.think=false",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    output_dir: str = "runs/default"
    """Folder of this run: config.yaml, metrics.jsonl, rewards.jsonl, samples/, tensorboard/, checkpoints/,
    quarantine.jsonl, and at the end result.json and report.html."""
    num_steps: int = 100
    """Rollouts to do (each followed by algorithm.minibatches_per_rollout updates)."""
    prompts_per_step: int = 8
    """Prompts per step over all ranks."""
    tokens_per_microbatch: int = 32768
    """Packed tokens that go through the model at once; a group larger than this goes alone."""
    max_group_tokens: int | None = None
    """Packed tokens of the largest group that the GPUs can hold; above it, a group is left out of its update and its
    question is not asked again. Default: no limit."""
    reduce_gradients: Literal["auto", "once", "each_row"] = "auto"
    """When gradients are added up over GPUs in an update of several rows: once, after the last row, which takes 4 bytes
    more for each trained weight; after each row; or auto, once where the worst case then fits into the GPU."""
    replicate: int = 1
    """Copies of weights and moments among all GPUs, each split over an equal share of them (hybrid sharding, HSDP). 1:
    one, split over all GPUs. The number of nodes: each has one, so that between nodes only gradients travel, once an
    update, at the price of as many times the memory of weights, gradients and moments."""
    seed: int = 0
    """Of data order, sampling and everything else random."""
    resume: str = "auto"
    """auto: continue from the newest checkpoint in output_dir if there is one. never: start anew (the folder
    must not hold checkpoints). Or the path of one checkpoint."""
    log_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics, the configuration, samples and pictures of their clips go beside metrics.jsonl and samples/."""
    samples_every: int = 10
    """Steps between files samples/step_N.jsonl, the answers of up to 32 groups of that step; 0: never."""
    print_every: int = 10
    """Steps between answers that are printed, one each time; 0: never."""
    no_signal_steps: int = 10
    """Steps in a row in which no weight moved, after which the run shows three answers and says why that may be; 0:
    only at the end of a run that learned nothing."""
    profile_steps: tuple[int, int] | None = None
    """[first, last] step that torch's profiler follows; each rank writes a trace below profile/ in the run's folder,
    and on a GPU an account of its memory. They take longer than others."""
    watchdog_s: float = 1200.0
    """When no step ends for so long, every rank prints where each of its threads is, and the run goes on waiting: a
    collective gives up after 3,600 s. 20 minutes are several times the slowest step that a run should have; 0: never.
    """
    resume_changed: bool = False
    """Go on from a checkpoint although data, prompt files, seed or starting model are others than it was made with."""
    max_bad_sample_frac: float = 0.5
    """Stop with a summary when more than this fraction of the samples read so far could not be used."""

    def __post_init__(self) -> None:
        require_least(self, "train", 0, "num_steps")
        require_least(self, "train", 1, "replicate", "prompts_per_step", "tokens_per_microbatch", "max_group_tokens")
        require_least(self, "train", 0, "samples_every", "print_every", "watchdog_s", note=" (0: never)")
        require_least(self, "train", 0, "no_signal_steps", note=" (0: at the end)")
        first, last = self.profile_steps or (1, 1)
        require(1 <= first <= last, f"train.profile_steps is {[first, last]}, wanted [first, last], from 1 on")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept on disk."""

    every: int = 100
    """Steps between checkpoints; 0: only as every_minutes says, at the end, and when a signal ends the run."""
    every_minutes: float = 60.0
    """Longest time between checkpoints; a step that has begun is finished first. 0: no limit. A save of 99.5 GB (7B) at
    1 GB/s between steps then takes 3 % of the time, and a run that is killed once a day loses least at about this."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_best: str | None = None
    """Held-out score, as metrics.jsonl names it (eval/temporal_grounding/miou), by whose best value so far a checkpoint
    stays although newer ones come; the link checkpoints/best leads to it. Each score (eval.every) then has one."""
    keep_best_mode: Literal["max", "min"] = "max"
    """Whether the largest value of keep_best is the best one, or the smallest."""
    asynchronous: bool | None = None
    """Write checkpoints beside the steps that follow: a step waits for the copy of weights and moments to host memory,
    12 bytes a trained weight over all ranks. Default: where the memory of every machine has room for it. Such a run
    ends with its writer's error one step later."""
    export: bool = True
    """Write a Hugging Face folder (safetensors, tokenizer, config) at the end."""
    export_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights in it. auto: that of the weights in model.path."""

    def __post_init__(self) -> None:
        require_least(self, "checkpoint", 0, "every")
        require_least(self, "checkpoint", 1, "keep")
        require(
            0 <= self.every_minutes < math.inf,
            f"checkpoint.every_minutes is {self.every_minutes}, wanted a finite number >= 0 (0: no limit)",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out score."""

    every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    temperature: float = 0.0
    """0 is greedy."""
    max_new_tokens: int | None = None
    """Longest answer. Default: rollout.max_new_tokens."""
    repetition_penalty: float = 1.0
    """Logits of tokens that prompt or answer hold already are divided by it if positive, multiplied if negative, as in
    transformers; 1: off. Qwen2.5-VL's own generation settings, which the original's evaluation inherits, have 1.05.
    With rollout.engine sglang its scheduler then no longer works ahead of its GPU, also while training."""
    max_examples: int | None = None
    """Evaluate only the first so many examples of each task."""
    output_dir: str | None = None
    """Folder of samples.jsonl, scores.json and the answers so far, from which an interrupted `vcr1-fast eval` goes on.
    Default: below eval/ in train.output_dir, named after the model and a digest of what the answers depend on."""
    restart: bool = False
    """Drop the answers that the folder holds, such as those of other settings, instead of going on from them."""
    perceptions: int = 1
    """Rounds of `vcr1-fast eval` for questions with options: each but the last asks where the evidence is, and the next
    one looks closer there (VideoChat-R1.5). 1: asked once."""
    perception: Literal["focus", "crop"] = "focus"
    """How a round looks closer. focus: at the whole video, with frames 1.5 times as close together in the evidence
    (VideoChat-R1.5). crop: at the evidence alone, cut out with a margin, at twice the frame rate."""

    video: EvalVideoConfig = field(default_factory=EvalVideoConfig)
    """Settings of the section video for evaluation alone, so that it may see more than training."""

    def __post_init__(self) -> None:
        require_least(self, "eval", 1, "perceptions")
        require(
            self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
            f"eval.repetition_penalty is {self.repetition_penalty}, wanted more than 0 (1 is off)",
        )


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised cold start (`vcr1-fast sft`)."""

    num_steps: int = 250
    """Optimizer steps."""
    examples_per_step: int = 16
    """Examples per step over all ranks."""

    def __post_init__(self) -> None:
        require_least(self, "sft", 0, "num_steps")
        require_least(self, "sft", 1, "examples_per_step")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sft: SftConfig = field(default_factory=SftConfig)

    def __post_init__(self) -> None:
        _ = self.eval_video  # raises ConfigError where the two sections do not fit

    @property
    def num_updates(self) -> int:
        """Of the optimizer, in the whole run."""
        return self.train.num_steps * self.algorithm.minibatches_per_rollout

    @property
    def eval_video(self) -> VideoConfig:
        """The section video as evaluation sees it."""
        return self.eval.video.over(self.video)
