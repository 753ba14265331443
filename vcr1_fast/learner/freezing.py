"""Which weights keep the values of `model.path`: `model.freeze_vision`, and patterns of their names (`model.freeze`).

Names are those of the published checkpoints, such as visual.patch_embed.proj.weight, model.layers.0.mlp.up_proj.weight
or lm_head.weight. With adapters, everything else is frozen anyway, and patterns mean theirs, ....q_proj.lora_A.
"""

from __future__ import annotations

import functools
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.lora import add_adapters, base_name
from vcr1_fast.learner.model_size import read_model_config
from vcr1_fast.settings.config import ConfigError, ModelConfig


def freeze(hf: nn.Module, config: ModelConfig) -> None:
    """Freeze what the settings say, in place.

    Raises ConfigError for a pattern without a weight, where nothing is left to train, and for patterns that leave
    nothing of the vision tower: a whole frozen one is the business of freeze_vision, which encodes each clip once.
    """
    family = family_of(hf.config)
    tower = family.tower(hf)
    if config.freeze_vision:
        tower.requires_grad_(False)
    has_trained_tower = any(weight.requires_grad for weight in tower.parameters())
    named = [(family.checkpoint_name(base_name(n)), w) for n, w in hf.named_parameters(remove_duplicate=False)]
    for pattern in config.freeze:
        matched = [weight for name, weight in named if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(
                f"model.freeze names {pattern!r}, but no weight is called so: names are {named[0][0]}, ..., "
                f"{named[-1][0]}, and * stands for any part of them"
            )
        for weight in matched:
            weight.requires_grad_(False)
    if not any(weight.requires_grad for _, weight in named):
        raise ConfigError("model.freeze leaves nothing to train: take a pattern out")
    if has_trained_tower and not any(weight.requires_grad for weight in tower.parameters()):
        raise ConfigError(
            "model.freeze takes in the whole vision tower: set model.freeze_vision=true instead, then each clip is "
            "encoded once for all steps"
        )


@functools.lru_cache(maxsize=4)
def num_trained(config: ModelConfig) -> int:
    """Weights that are trained, by the names and shapes alone. Raises as `freeze` does."""
    hf_config = AutoConfig.for_model(**read_model_config(config.path)[0])
    model_class: type[PreTrainedModel] = family_of(hf_config).model_class
    with torch.device("meta"):
        hf = model_class._from_config(hf_config)
    if config.lora.rank:
        add_adapters(hf, config.lora, seed=0)
    freeze(hf, config)
    return sum(weight.numel() for weight in hf.parameters() if weight.requires_grad)
