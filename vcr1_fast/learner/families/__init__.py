"""The architectures that can be trained, by the `model_type` of their config.json."""

from __future__ import annotations

from typing import Any

from vcr1_fast.learner.families.family import ModelFamily
from vcr1_fast.learner.families.qwen2_5_vl import Qwen25VL
from vcr1_fast.settings.error import ConfigError

FAMILIES: dict[str, ModelFamily] = {family.model_type: family for family in (Qwen25VL(),)}


def family_of(config: Any) -> ModelFamily:
    """The family of a Hugging Face configuration (its `model_type`).

    Raises ConfigError for an architecture that is not known here.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ConfigError(
            f"the model's config.json says model_type {model_type!r}, wanted one of {', '.join(FAMILIES)}: "
            "set model.path to the folder of such a checkpoint"
        )
    return FAMILIES[model_type]
