"""The values that flow through the trainer, one class each, in the order in which they are made.

    video file -> Frames -> Patches -> Prompt -> RolloutGroup -> PackedBatch -> loss

Shape letters: F frames, H W pixels, P patches, L prompt tokens, R completion tokens, G completions of one prompt,
T packed tokens, N scored tokens, S sequences (completions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from vcr1_kernels.prefix_attention import PrefixLayout

FinishReason = Literal["stop", "length", "aborted"]  # aborted: cut short on request, to be gone on with
MediaKind = Literal["video", "image"]
Interval = tuple[float, float]  # (start_s, end_s), seconds from the start of the video
Box = tuple[float, float, float, float]  # (x0, y0, x1, y1), corners as fractions of width and height, in [0, 1]


class SampleError(Exception):
    """One item cannot be used (unreadable video, broken annotation). The run goes on without it.

    `source` is the file (or file:row) to blame, `reason` one clear sentence.
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:  # crosses process borders intact
        return type(self), (self.source, self.reason)


class RunError(RuntimeError):
    """The run cannot go on, and neither a setting nor one item is to blame: a process that does not start, an engine
    that answers something else. The message says what happened and what to do."""


@dataclass(frozen=True, slots=True)
class IntervalTruth:
    """What temporal grounding asks for: when the event happens. Example: `IntervalTruth(((2.0, 4.5),))`."""

    intervals_s: tuple[Interval, ...]  # each start < end, inside [0, duration]


@dataclass(frozen=True, slots=True)
class TrackTruth:
    """What object tracking asks for: one box per instant; box 0 is given in the prompt."""

    boxes: tuple[Box, ...]  # corners in [0, 1]
    times_s: tuple[float, ...]  # the instant of each box, seconds; same length as boxes


@dataclass(frozen=True, slots=True)
class CaptionTruth:
    """What captioning asks for: the events of the video in words. At least one of the two is not empty."""

    events: tuple[str, ...]  # one short sentence each; empty: the judge splits the caption
    caption: str = ""  # the whole reference; empty: the events are the reference


@dataclass(frozen=True, slots=True)
class ChoiceTruth:
    """What a multiple-choice question asks for: the letter. Example: `ChoiceTruth("B", ("a cat", "a dog"))`."""

    letter: str  # "A" for options[0], "B" for options[1], ...
    options: tuple[str, ...]  # 2 to 26 texts, without their letters
    # recipe paper: as the file writes them, where that is not "(A) " and the text; not in repr, see PromptStream.digest
    written: tuple[str, ...] = field(default=(), repr=False, kw_only=True)
    # by which rule of tasks.benchmark_readers it is scored; no part of what is trained on, and so not of its digest
    scoring: str = field(default="videomme", kw_only=True, repr=False)


@dataclass(frozen=True, slots=True)
class GroundedChoiceTruth(ChoiceTruth):
    """A letter and the evidence for it. Example: `GroundedChoiceTruth("A", ("a cat", "a dog"), ((2.0, 4.5),))`."""

    intervals_s: tuple[Interval, ...]  # when the video shows it; each start < end, inside [0, duration]
    scoring: str = field(default="videochat_r1", kw_only=True, repr=False)


@dataclass(frozen=True, slots=True)
class LabelTruth:
    """What classification asks for: one label. Example: `LabelTruth("low", ("low", "high"))`."""

    label: str
    labels: tuple[str, ...] = ()  # all there are to choose from; empty where only the question says


@dataclass(frozen=True, slots=True)
class NumberTruth:
    """What a question for a number asks for. Example: `NumberTruth(4.0)`."""

    value: float  # > 0


@dataclass(frozen=True, slots=True)
class RefusedTruth:
    """A held-out annotation that cannot be used: nothing is asked, and it counts as a wrong answer."""

    reason: str


Truth = (
    IntervalTruth
    | TrackTruth
    | ChoiceTruth
    | GroundedChoiceTruth
    | LabelTruth
    | NumberTruth
    | CaptionTruth
    | RefusedTruth
)


@dataclass(frozen=True, slots=True)
class Example:
    """One question as an annotation file states it: about a video, several, images, all of these, or nothing shown."""

    id: str  # unique in a data set
    task: str  # name of a module in vcr1_fast.tasks, for example "temporal_grounding"
    video: str  # absolute path of the video, of several the first, see video/source_name.py; "" without one
    query: str  # the event or the object, in words
    duration_s: float  # seconds, > 0; infinity where the annotation does not say and the task does not need it
    truth: Truth
    reasoning: str = ""  # text of the think block for supervised cold start; never shown to the policy in GRPO
    categories: tuple[tuple[str, str], ...] = ()  # (axis, value) for tables of scores; an axis may come several times
    is_held_out: bool = field(default=False, repr=False)  # from data.eval, where recipe paper asks in another way
    # all that it shows, videos and images by name, where that is not its one video alone; see PromptStream.digest
    media: tuple[str, ...] = field(default=(), repr=False)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of all that it shows: images, then videos, unless marks in its text order them."""
        return self.media or ((self.video,) if self.video else ())

    @property
    def is_refused(self) -> bool:
        """Whether its annotation could not be used; only held-out examples may be."""
        return isinstance(self.truth, RefusedTruth)


@dataclass(frozen=True, slots=True)
class Frames:
    """Decoded frames, already at the size the model will see.

    Example: 8 s at 2 fps and 112 px: rgb_FHW3 [16, 112, 112, 3], times_s 0.0, 0.5, ... 7.5.
    """

    rgb_FHW3: torch.Tensor  # [F, H, W, 3] uint8; F even, of an image 1; H and W multiples of two patches
    times_s: torch.Tensor  # [F] float64, presentation time of each frame, seconds
    sampled_fps: float  # frames per second after sampling, > 0
    duration_s: float  # of the whole video
    reader: str  # name and version of what decoded it, for example "pyav 18.1"


@dataclass(frozen=True, slots=True)
class Patches:
    """Frames cut into vision-tower input, in the row order of the Hugging Face processors of Qwen's VL models."""

    values_PC: torch.Tensor  # [P, C] normalised; C = 3 channels x 2 frames x patch; [0, C] with embeddings
    grid_thw: tuple[int, int, int]  # (frame pairs, rows, columns) in patches; P is their product
    second_per_grid_s: float  # seconds between two temporal grid steps: 2 / sampled_fps
    num_frames: int
    duration_s: float
    embeddings_MD: torch.Tensor | None = None  # [M, W] what a frozen tower made of them, M = num_tokens
    pair_times_s: tuple[float, ...] = ()  # [t] mean of the presentation times of each pair's frames
    kind: MediaKind = "video"  # an image: a grid of one pair, its frame twice; 0 seconds

    @property
    def num_tokens(self) -> int:
        """Language-model tokens of it: 2 x 2 patches merge into one."""
        t, h, w = self.grid_thw
        return t * h * w // 4


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question as the model sees it: token ids, 3-D rotary positions, patches of the videos and images it shows."""

    example: Example
    token_ids_L: torch.Tensor  # [L] int64, placeholders expanded, ends with the assistant header
    position_ids_3L: torch.Tensor  # [3, L] int64: time, row, column
    media: tuple[Patches, ...]  # in the order of the prompt; empty: text alone

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """Of its videos and images, in order."""
        return [patches.grid_thw for patches in self.media]

    @property
    def next_position(self) -> int:
        """Position (same on all three axes) of the first completion token."""
        return int(self.position_ids_3L.max()) + 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn."""

    num_completions: int  # G
    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy; then log-probs are taken at temperature 1
    top_p: float = 1.0
    seed: int = 0  # the same seed, prompts and weights give the same tokens
    top_k: int = 0  # draw from the k most likely only, before top_p; 0: from all
    repetition_penalty: float = 1.0  # on the logits of tokens in prompt or completion; 1: none


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. The stop token, if one was drawn, is the last id."""

    token_ids_R: torch.Tensor  # [R] int64; R is 0 only in tests and where finish_reason is "aborted"
    logprobs_R: torch.Tensor  # [R] float32, log-softmax over the vocabulary of logits / temperature; NaN: unknown
    finish_reason: FinishReason
    text: str = ""  # decoded without special tokens

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids_R.numel())

    @property
    def is_sampled(self) -> bool:
        """Whether an engine drew it. A ground truth mixed into a group has no engine log-probs: they are NaN."""
        return not bool(self.logprobs_R.isnan().any())


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G answers to one prompt, with their rewards and advantages once these are known."""

    prompt: Prompt
    completions: tuple[Completion, ...]  # G of them
    policy_version: int  # of the weights that drew them; the oldest, where an answer was gone on with after an update
    reward_parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # part -> [G], each in [0, 1]
    rewards: tuple[float, ...] = ()  # [G], weighted sum of the parts, each shaped as task.shaping says
    advantages: tuple[float, ...] = ()  # [G]

    @property
    def is_trainable(self) -> bool:
        """A group whose answers all score alike has no policy gradient."""
        return any(a != 0.0 for a in self.advantages)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: groups laid out as `[prompt | c_1 | ... | c_G]` one after the other in a single row.

    A completion of R tokens feeds its first R - 1 ids; its R predictions come from the prompt's last row and from
    those R - 1 rows. `scored_row_N` gathers them, so the prompt's last row appears G times.
    """

    token_ids_T: torch.Tensor  # [T] int64
    position_ids_3T: torch.Tensor  # [3, T] int64
    layout: PrefixLayout  # where each prompt and completion lies; covers 0..T
    patches: tuple[Patches, ...]  # of all groups' prompts, in order; a group may have none
    scored_row_N: torch.Tensor  # [N] int64, row of the hidden states that predicts target_N
    target_N: torch.Tensor  # [N] int64
    sequence_N: torch.Tensor  # [N] int64, index of the completion, 0..S-1
    advantage_N: torch.Tensor  # [N] float32
    weight_N: torch.Tensor  # [N] float32, share of this token in the step's loss; sums to the step total over batches
    engine_logprob_N: torch.Tensor  # [N] float32, what the rollout engine reported; NaN where it drew nothing
    num_sequences: int  # S
    num_unshared_tokens: int  # tokens of the S separate rows this batch stands for
    old_logprob_N: torch.Tensor | None = None  # [N] float32, what ratios are taken against; None: the current policy

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids_T.numel())
