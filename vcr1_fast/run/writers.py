"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio, as `train.log_to` names.

Each is one object of three methods, on rank 0 alone. What they raise their caller forgives (telemetry.py): a service
that is down ends no run. A run that goes on from a checkpoint goes on there, too, by the id that RUN/log_to.json keeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

if TYPE_CHECKING:
    import numpy as np

PROJECT = "vcr1-fast"  # of a run in a service, where WANDB_PROJECT or TRACKIO_PROJECT names no other
IDS_FILE = "log_to.json"  # in the folder of a run: writer -> the run's id there


@dataclass(frozen=True, slots=True)
class RunToLog:
    """What a writer is told when it is opened."""

    folder: Path  # of the run, which gives it its name
    config_yaml: str
    resume_step: int  # last step of the checkpoint that the run goes on from; 0: a new run


class Writer(Protocol):
    """May raise anything."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers of a step; more than once a step."""
        ...

    def log_media(self, step: int, texts: Mapping[str, str], pictures: Mapping[str, np.ndarray]) -> None:
        """Texts to be shown as they are, and pictures [H, W, 3] uint8."""
        ...

    def close(self) -> None: ...


class TensorBoardWriter:
    """Event files in RUN/tensorboard, the configuration among their texts."""

    def __init__(self, run: RunToLog) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 3 s, so not at import

        # purge_step hides events of that step and later; a new run may log step 0 (the score before training) anew
        purge_step = run.resume_step + 1 if run.resume_step else 0
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge_step)
        self.log_media(run.resume_step, {"config": run.config_yaml}, {})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_media(self, step: int, texts: Mapping[str, str], pictures: Mapping[str, np.ndarray]) -> None:
        for name, text in texts.items():
            self._writer.add_text(name, _as_it_is(text), step)
        for name, picture_HW3 in pictures.items():
            self._writer.add_image(name, picture_HW3, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in RUN/wandb for `wandb sync`."""

    def __init__(self, run: RunToLog) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - optional

        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.folder.name,
            id=_kept_id(run, "wandb"),
            resume="allow",
            dir=str(run.folder),
            config=yaml.safe_load(run.config_yaml),
            settings=wandb.Settings(console="off"),  # what the run prints is its own
        )
        # Its own counter never goes back, but a run that was killed does, to its last checkpoint.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def log_media(self, step: int, texts: Mapping[str, str], pictures: Mapping[str, np.ndarray]) -> None:
        shown = {name: self._wandb.Table(columns=["step", "text"], data=[[step, text]]) for name, text in texts.items()}
        shown |= {name: self._wandb.Image(picture_HW3) for name, picture_HW3 in pictures.items()}
        self._run.log({**shown, "step": step})

    def close(self) -> None:
        self._run.finish()


class TrackioWriter:
    """A run of Trackio, on this machine unless its own variables say otherwise; `trackio show` opens it."""

    def __init__(self, run: RunToLog) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # it greets on stdout, whose last line is the command's result
            import trackio  # pyright: ignore[reportMissingImports] - optional

            self._trackio: Any = trackio
            trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=f"{run.folder.name}-{_kept_id(run, 'trackio')}",  # its runs are told apart by their names
                resume="allow",
                config=yaml.safe_load(run.config_yaml),
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def log_media(self, step: int, texts: Mapping[str, str], pictures: Mapping[str, np.ndarray]) -> None:
        shown: dict[str, Any] = {name: self._trackio.Markdown(_as_it_is(text)) for name, text in texts.items()}
        shown |= {name: self._trackio.Image(picture_HW3) for name, picture_HW3 in pictures.items()}
        self._trackio.log(shown, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()


WRITERS: dict[str, Callable[[RunToLog], Writer]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
    "trackio": TrackioWriter,
}


def _as_it_is(text: str) -> str:
    """Markdown that shows a text in fixed width; what is in it, such as a model's answer, is no markup there."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _kept_id(run: RunToLog, name: str) -> str:
    """The run's id in a service: that of its earlier part, for a new run a new one, which is kept. Raises OSError."""
    file = run.folder / IDS_FILE
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ids = {}
    if not run.resume_step or not isinstance(ids.get(name), str):
        ids[name] = secrets.token_hex(4)
        file.write_text(json.dumps(ids) + "\n", encoding="utf-8")
    return ids[name]
