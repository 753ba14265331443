"""The checkpoint with the best held-out score: which one it is, on disk, so that a run that goes on knows it.

    output_dir/checkpoints/best.json    its name, step and score
    output_dir/checkpoints/best         a link to it, for eval, export and train.resume

Called by saver.py. With checkpoint.keep_best unset all of it does nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vcr1_fast.run.checkpoint_files import CHECKPOINTS_FOLDER
from vcr1_fast.settings.config import ConfigError

RECORD, LINK = "best.json", "best"
_LOG = logging.getLogger(__name__)


class BestCheckpoint:
    """`name`: of the best checkpoint's folder so far, "" without one."""

    def __init__(self, output_dir: Path, metric: str | None, mode: Literal["max", "min"]) -> None:
        self._folder = output_dir.absolute() / CHECKPOINTS_FOLDER
        self._metric, self._sign = metric, 1.0 if mode == "max" else -1.0
        self._scores: dict[str, float] = {}  # of steps whose checkpoint may still be written
        self._record: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((self._folder / RECORD).read_text(encoding="utf-8"))
            if metric and record["metric"] == metric and (self._folder / record["checkpoint"]).is_dir():
                self._record = record

    @property
    def name(self) -> str:
        return self._record.get("checkpoint", "")

    def note(self, step: int, scores: Mapping[str, float]) -> None:
        """The scores after a step. Raises ConfigError when the metric is not among them."""
        if self._metric is None:
            return
        metric = self._metric.removeprefix("eval/")
        if metric not in scores:
            names = ", ".join(f"eval/{name}" for name in scores)
            raise ConfigError(f"checkpoint.keep_best is {self._metric}, but the held-out scores are {names}: take one")
        self._scores[f"step_{step:06d}"] = scores[metric]

    def forget(self, name: str) -> None:
        """A checkpoint that is replaced by another one of its step."""
        if name == self.name:
            self._record = {}
            for left in (RECORD, LINK):
                with contextlib.suppress(OSError):
                    (self._folder / left).unlink()

    def settle(self) -> None:
        """Record the best of those that have both a score and a folder. What cannot be written is warned about."""
        for name in [name for name in self._scores if (self._folder / name).is_dir()]:
            score = self._scores.pop(name)
            is_better = not self._record or self._sign * score > self._sign * self._record["score"]
            if math.isfinite(score) and is_better:
                self._record = {"checkpoint": name, "metric": self._metric, "score": score}
                self._write()

    def _write(self) -> None:
        try:
            new = self._folder / f"{RECORD}.new"
            new.write_text(json.dumps(self._record) + "\n", encoding="utf-8")
            new.replace(self._folder / RECORD)
            link = self._folder / f"{LINK}.new"
            link.unlink(missing_ok=True)
            link.symlink_to(self.name)
            link.replace(self._folder / LINK)
        except OSError as error:
            _LOG.warning("cannot note %s as the best checkpoint: %s", self.name, error)
