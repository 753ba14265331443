"""The architectures that can be trained, by the `model_type` of their config.json. Only `family_of` imports torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vcr1_fast.settings.error import ConfigError
from vcr1_fast.video.formats import FORMATS

if TYPE_CHECKING:
    from vcr1_fast.learner.families.family import ModelFamily

_CLASSES = {"qwen2_5_vl": "Qwen25VL", "qwen3_vl": "Qwen3VL"}  # model_type, a module here, and the family's class
MODEL_TYPES = tuple(FORMATS)


def family_of(config: Any) -> ModelFamily:
    """The family of a Hugging Face configuration (its `model_type`).

    Raises ConfigError for an architecture that is not known here.
    """
    model_type = getattr(config, "model_type", None)
    require_known(model_type, "the model's config.json")
    return getattr(importlib.import_module(f"{__name__}.{model_type}"), _CLASSES[str(model_type)])()


def assumed_type(name: str) -> str:
    """The family of a model that is not here, by its name."""
    return "qwen3_vl" if "qwen3" in name.lower() else "qwen2_5_vl"


def require_known(model_type: Any, file: object) -> None:
    """Raises ConfigError for a `model_type` without a family; `file`: where it stands."""
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"model_type in {file} is {model_type!r}, wanted {' or '.join(MODEL_TYPES)}: set model.path to the folder "
            "of such a checkpoint"
        )
