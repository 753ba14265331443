"""Settings of annotation files: which, how they are read, and what of them is trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from vcr1_fast.settings.error import require, require_least

AnnotationFormat = Literal[
    "auto",
    "rows",
    "charades",
    "got10k",
    "nextgqa",
    "nextgqa_choice",
    "vidtab",
    "timelens_bench",
    "timelens_100k",
]


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """An annotation file with settings of its own, where those of the section `data` do not fit it."""

    path: str
    """The annotation file."""
    video_root: str | None = None
    """Folder that its relative video paths start from. Default: data.video_root."""
    format: AnnotationFormat | None = None
    """Its schema. Default: data.format."""
    task: str | None = None
    """Read it for this task alone: rows of other tasks are left out, and a NExT-GQA file gives plain questions for
    multiple_choice. Default: the task that the schema or each row says."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Annotation files."""

    train: tuple[str | DataFile, ...] = ()
    """Annotation files (JSON, JSONL, CSV or parquet) to train on; several files are shuffled together. Each is a path,
    or {path: ..., video_root: ..., format: ..., task: ...} where it differs from the settings below."""
    eval: tuple[str | DataFile, ...] = ()
    """Held-out annotation files, written like data.train."""
    video_root: str | None = None
    """Folder that relative video paths start from. Default: the folder of the annotation file."""
    format: AnnotationFormat = "auto"
    """Schema of the annotation files. auto: seen from the content of each. rows: our own; charades: ActivityNet too."""

    mixture: dict[str, float] = field(default_factory=dict)
    """Weight of each task, such as {temporal_grounding: 2, object_tracking: 1}: exact in every 100 prompts, 0 leaves
    a task out. Empty: every example equally often."""
    reward_range: tuple[float, float] | None = None
    """[lowest, highest] mean reward in data.rewards of an example to train on; the others are left out."""
    rewards: str | None = None
    """rewards.jsonl of an earlier run, for data.reward_range."""
    only: str | None = None
    """JSONL file: of data.train the examples whose id stands in one of its lines, such as `vcr1-fast select` writes."""
    duration_range_s: tuple[float, float] | None = None
    """[shortest, longest] video in seconds to train on, by the annotation; where it does not say, the video is kept."""
    max_query_words: int | None = None
    """Examples of data.train whose query has more words are left out."""
    excluded_words: tuple[str, ...] = ()
    """Examples of data.train whose query holds one of these words, in any case, are left out; such as [hear, sound]."""
    max_prompt_tokens: int | None = None
    """An example whose prompt, video included, has more tokens is left out and counted. Default: what the positions of
    the model leave beside the longest answer; that is also the limit of an evaluation with an eval.video of its own."""
    quarantine: str | None = None
    """Further list of files not to read, such as quarantine.jsonl of an earlier run. The run's own list is
    quarantine.jsonl in train.output_dir."""
    retry_quarantined: bool = False
    """Try the files of both lists again; those that are good by now leave the run's own list."""

    def sources(self, name: Literal["train", "eval"]) -> list[DataFile]:
        """The files of `train` or `eval`, each with what it leaves open taken from this section."""
        files = [DataFile(path=file) if isinstance(file, str) else file for file in getattr(self, name)]
        return [
            replace(file, video_root=file.video_root or self.video_root, format=file.format or self.format)
            for file in files
        ]

    def __post_init__(self) -> None:
        for name in ("train", "eval"):
            is_named = all(file if isinstance(file, str) else file.path for file in getattr(self, name))
            require(is_named, f"data.{name} holds an empty path, wanted the name of a file")
        for task, weight in self.mixture.items():
            require(0 <= weight < math.inf, f"data.mixture.{task} is {weight}, wanted a finite number >= 0")
        require(
            not self.mixture or sum(self.mixture.values()) > 0,
            "data.mixture gives every task weight 0, wanted at least one above 0",
        )
        require_least(self, "data", 1, "max_prompt_tokens", "max_query_words", note=", or nothing")
        require(
            self.duration_range_s is None or 0 <= self.duration_range_s[0] <= self.duration_range_s[1],
            f"data.duration_range_s is {self.duration_range_s}, wanted [shortest, longest] in seconds",
        )
        require(
            self.reward_range is None or self.reward_range[0] <= self.reward_range[1],
            f"data.reward_range is {self.reward_range}, wanted [lowest, highest]",
        )
