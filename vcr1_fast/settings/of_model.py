"""What a model says about the frames that it was taught on: defaults of the section video, where settings are silent.

A folder of a model may hold `vcr1_fast_video.json`, such as {"max_frames": 16, "min_frame_pixels": 7056}. The published
checkpoints have none: what their preprocessor_config.json bounds is the size of pictures. Exports keep the file; of a
checkpoint it is that of the model which its run began with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from vcr1_fast.run.model_folder import STATE_FILE, VIDEO_FILE, named_folder, read_json
from vcr1_fast.settings.error import ConfigError

FRAME_SETTINGS = ("fps", "min_frames", "max_frames", "total_pixels", "min_frame_pixels", "max_frame_pixels")
_BOUNDS = {"min_frames": "max_frames", "min_frame_pixels": "max_frame_pixels"}  # one of a pair says nothing alone


def video_of_model(path: str, given: Collection[str]) -> dict[str, Any]:
    """Settings of the section video, by name, that the model at `path` has and that are not `given`; {} for most.

    A bound is the user's together with its other half. Raises ConfigError when the file is damaged.
    """
    file = _model_of(named_folder(path)) / VIDEO_FILE
    if not file.is_file():
        return {}
    found: Mapping[str, Any] = read_json(file)
    for name, value in found.items():
        if name not in FRAME_SETTINGS or isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{file} has {name}: {value!r}, wanted numbers under {', '.join(FRAME_SETTINGS)}")
    taken = {*given, *(high for low, high in _BOUNDS.items() if low in given)}
    taken |= {low for low, high in _BOUNDS.items() if high in given}
    return {name: value for name, value in found.items() if name not in taken}


def _model_of(folder: Path) -> Path:
    """Of a checkpoint, the model that its run began with; the command that opens it says what is wrong with one."""
    if not (folder / STATE_FILE).is_file():
        return folder
    try:
        return named_folder(str(yaml.safe_load(read_json(folder / STATE_FILE)["config_yaml"])["model"]["path"]))
    except (ConfigError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return folder
