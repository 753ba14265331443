"""Settings of a synthetic data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vcr1_fast.settings.config import ConfigError

Kind = Literal["grounding", "tracking", "grounded_qa", "choice", "quality", "image", "text"]
KINDS: tuple[Kind, ...] = ("grounding", "tracking", "grounded_qa", "choice", "quality")  # those with a clip
ALL_KINDS: tuple[Kind, ...] = (*KINDS, "image", "text")

COLOURS: dict[str, tuple[int, int, int]] = {  # RGB; far apart, so that chroma subsampling keeps them apart
    "red": (225, 35, 40),
    "green": (40, 190, 70),
    "blue": (45, 80, 235),
    "yellow": (245, 215, 40),
    "purple": (150, 40, 200),
    "white": (250, 250, 250),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "diamond")
NUM_INSTANTS = 8  # boxes of a tracking answer, as in GOT-10k of VideoChat-R1


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """A synthetic data set: clips of up to five kinds, one question each.

    grounding: when does an object appear? tracking: where is it? grounded_qa: what colour is it, and when?
    choice: in which part of the clip is it? quality: are the pictures good? And two for mixtures, only where `kinds`
    names them. image: what colour is it in this image? text: a question that shows nothing.
    """

    output_dir: str = "runs/synth"
    """Folder to write: videos/ (images too), train_*.jsonl, eval_*.jsonl."""
    kinds: tuple[Kind, ...] = KINDS
    """Kinds of clips and questions to write."""
    num_train: int = 256
    """Clips to train on, of each kind."""
    num_eval: int = 64
    """Held-out clips of each kind."""
    width_px: int = 84
    """Width of the videos, even."""
    height_px: int = 84
    """Height of the videos, even."""
    duration_s: float = 8.0
    """Length of every clip."""
    fps: float = 8.0
    """Frames per second of the files."""
    seed: int = 0
    """The same settings and seed give the same pixels and the same annotations."""
    num_distractors: int = 1
    """Small objects that pass through a clip; their colours differ from the colour of the object asked about."""
    time_step_s: float = 1.0
    """Events begin and end at multiples of this."""
    noise: float = 4.0
    """Standard deviation of the sensor noise, in grey levels of 255."""
    camera_jitter_px: float = 1.0
    """How far the camera sways from its rest position."""
    label_lag_s: float = 0.0
    """Late labels: events of the training annotations begin and end up to this much too late, as a hand that reacts."""
    label_slack_frac: float = 0.0
    """Loose labels: boxes of a track of the training annotations are up to this fraction of the frame too large on each
    side, all of them alike; the first is exact."""
    label_careless_frac: float = 0.0
    """Careless labels: so many of the training questions about green, purple and white objects, and about parts of a
    clip after its beginning, are answered with the first option, and so many damaged clips are called good."""

    def __post_init__(self) -> None:
        for name in ("width_px", "height_px"):
            value = getattr(self, name)
            _require(name, value, value >= 32 and value % 2 == 0, "an even number >= 32 (yuv420p halves both sides)")
        counts, levels = ("num_train", "num_eval", "num_distractors"), ("noise", "camera_jitter_px")
        for name in (*counts, *levels, "label_lag_s", "label_slack_frac"):
            value = getattr(self, name)
            _require(name, value, value >= 0, "a number >= 0")
        _require("label_careless_frac", self.label_careless_frac, 0 <= self.label_careless_frac <= 1, "0 to 1")
        _require("kinds", self.kinds, len(set(self.kinds)) == len(self.kinds) > 0, "at least one, each once")
        _require("fps", self.fps, self.fps > 0, "a positive number of frames per second")
        _require("time_step_s", self.time_step_s, self.time_step_s > 0, "a positive number of seconds")
        shortest_s = max(2.0, 2 * self.time_step_s)  # an event of one step has a place to begin
        _require("duration_s", self.duration_s, self.duration_s >= shortest_s, f"at least {shortest_s:g} seconds")
        most = len(COLOURS) - 1
        _require("num_distractors", self.num_distractors, self.num_distractors <= most, f"at most {most}")

    @property
    def num_frames(self) -> int:
        """Frames of every file."""
        return max(2, round(self.duration_s * self.fps))


def _require(name: str, value: object, ok: bool, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value}, wanted {wanted}")
