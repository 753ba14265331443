"""What follows from the model where settings are silent: how large it sees frames, and how it is told their time.

A folder of a model may hold `vcr1_fast_video.json`, such as {"max_frames": 16, "min_frame_pixels": 7056}, with settings
of the section video that it was taught with. The published checkpoints have none: what their preprocessor_config.json
bounds is the size of pictures. Exports keep the file; of a checkpoint it is that of the model which its run began with.
Without one the budgets of pixels are those of as many video tokens for every family, and times stand in the prompt
where a family reads them there alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from vcr1_fast.learner.families import assumed_type
from vcr1_fast.run.model_folder import CONFIG_FILE, STATE_FILE, VIDEO_FILE, named_folder, read_json
from vcr1_fast.settings.config import Config
from vcr1_fast.settings.error import ConfigError, require
from vcr1_fast.settings.video import VideoConfig
from vcr1_fast.video.formats import FORMATS, QWEN2_5_VL, VideoFormat

_PIXELS = ("total_pixels", "min_frame_pixels", "max_frame_pixels", "min_image_pixels", "max_image_pixels")
FRAME_SETTINGS = ("fps", "min_frames", "max_frames", *_PIXELS)
_BOUNDS = {  # one of a pair says nothing alone
    "min_frames": "max_frames",
    "min_frame_pixels": "max_frame_pixels",
    "min_image_pixels": "max_image_pixels",
}


def video_of_model(path: str, given: Collection[str]) -> dict[str, Any]:
    """Settings of the section video, by name, that follow from the model at `path` and are not `given`; {} for most.

    A bound is the user's together with its other half. Raises ConfigError when a file is damaged.
    """
    folder = _model_of(named_folder(path))
    video, file = _format_of(folder), folder / VIDEO_FILE
    ours: dict[str, Any] = {}
    if video is not None and video.factor_px != QWEN2_5_VL.factor_px:
        ours = {name: getattr(VideoConfig, name) // QWEN2_5_VL.factor_px**2 * video.factor_px**2 for name in _PIXELS}
    found: Mapping[str, Any] = read_json(file) if file.is_file() else {}
    for name, value in found.items():
        if name not in FRAME_SETTINGS or isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{file} has {name}: {value!r}, wanted numbers under {', '.join(FRAME_SETTINGS)}")
    taken = {*given, *(high for low, high in _BOUNDS.items() if low in given)}
    taken |= {low for low, high in _BOUNDS.items() if high in given}
    return {name: value for name, value in {**ours, **found}.items() if name not in taken}


def task_of_model(path: str) -> dict[str, Any]:
    """The same of the section task."""
    video = _format_of(_model_of(named_folder(path)))
    return {"timestamps": "text"} if video is not None and video.reads_times else {}


def check_model(config: Config) -> None:
    """Raises ConfigError where a setting contradicts the family of the model, which is here by now."""
    path = config.model.path
    model_type = _type_of(_model_of(named_folder(path)))
    if model_type not in FORMATS:
        return
    require(
        config.task.timestamps == "text" or not FORMATS[model_type].reads_times,
        f"task.timestamps is {config.task.timestamps}, but {path} is a {model_type}, which knows the time of frames "
        "only from words in the prompt: set task.timestamps to text, or leave it out",
    )


def _format_of(folder: Path) -> VideoFormat | None:
    """None where there is no model, or one of a family that is not known: the command that opens it says so."""
    return FORMATS.get(_type_of(folder))


def _type_of(folder: Path) -> str:
    if (folder / CONFIG_FILE).is_file():
        return str(read_json(folder / CONFIG_FILE).get("model_type"))
    return "" if folder.exists() else assumed_type(folder.name)  # of a model of the Hub that is still to be downloaded


def _model_of(folder: Path) -> Path:
    """Of a checkpoint, the model that its run began with; the command that opens it says what is wrong with one."""
    if not (folder / STATE_FILE).is_file():
        return folder
    try:
        return named_folder(str(yaml.safe_load(read_json(folder / STATE_FILE)["config_yaml"])["model"]["path"]))
    except (ConfigError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return folder
