"""config.json of a model with fewer blocks. Imports no torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from vcr1_fast.learner.public_sizes import FULL_ATTENTION


def num_blocks(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(decoder layers, tower blocks with windows, tower blocks that see whole frames)."""
    text, tower = config.get("text_config") or config, config["vision_config"]
    depth = int(tower.get("depth", 32))
    num_full = len(tower.get("fullatt_block_indexes", FULL_ATTENTION))
    return int(text["num_hidden_layers"]), depth - num_full, num_full


def with_blocks(config: Mapping[str, Any], layers: int, windowed: int, full: int) -> dict[str, Any]:
    """The same model with so many blocks of each kind; those that see whole frames come last."""
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    text, tower = changed.get("text_config") or changed, changed["vision_config"]
    text["num_hidden_layers"] = text["max_window_layers"] = layers
    kinds = text.get("layer_types")
    if kinds:
        text["layer_types"] = [kinds[index % len(kinds)] for index in range(layers)]
    tower["depth"] = windowed + full
    if "deepstack_visual_indexes" in tower:  # whole frames in all blocks; as many of them give features
        tower["deepstack_visual_indexes"] = list(range(len(tower["deepstack_visual_indexes"])))
    else:
        tower["fullatt_block_indexes"] = list(range(windowed, windowed + full))
    return changed
