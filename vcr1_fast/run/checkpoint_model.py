"""A checkpoint of a run, in the middle of it or at its end -> the Hugging Face folder that an export would have made.

So that `vcr1-fast eval --model.path=RUN/checkpoints/step_000100` reads it like any other model, in every engine. What
was trained comes from the checkpoint, and so do its settings; the rest is of the model that the run began with.
"""

from __future__ import annotations

import gc
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from vcr1_fast.learner.sharding import World, gather_all
from vcr1_fast.run.checkpoint_files import STATE_FILE
from vcr1_fast.run.model_folder import CONFIG_FILE
from vcr1_fast.run.opened_checkpoint import open_checkpoint
from vcr1_fast.run.telemetry import say
from vcr1_fast.settings.config import Config


def with_model_of_checkpoint(config: Config, world: World) -> Config:
    """The settings with `model.path` at a model's folder, where it named a checkpoint of a run. A collective.

    The folder is made once, in eval/models below train.output_dir, named after step and contents. The number of ranks
    may be another one than at saving.
    Raises ConfigError when the checkpoint is damaged or the model that its run began with is not there or another one,
    OSError when the folder cannot be written.
    """
    checkpoint = Path(config.model.path).expanduser()
    if (checkpoint / CONFIG_FILE).is_file() or not (checkpoint / STATE_FILE).is_file():
        return config
    folder = folder_of_model(checkpoint, Path(config.train.output_dir))
    if not gather_all((folder / CONFIG_FILE).is_file(), world)[0]:
        open_checkpoint(checkpoint, world).export(folder, None, world)
        say(f"model of {checkpoint}: {folder}")
        gc.collect()
        torch.cuda.empty_cache()  # a colocated engine sizes itself by what is free, and cached memory is not
    return replace(config, model=replace(config.model, path=str(folder)))


def folder_of_model(checkpoint: Path, run: Path) -> Path:
    """Where the model of a checkpoint is written below a run's folder: named after step and contents."""
    name = f"{checkpoint.name}-{zlib.crc32((checkpoint / STATE_FILE).read_bytes()):08x}"
    return (run / "eval" / "models" / name).absolute()
