"""The tiny model's settings as the published checkpoints have them, which every release of transformers reads.

transformers 5 saves `rope_parameters` and nested sections, which 4.x does not read; those of Qwen2.5-VL-7B-Instruct
are flat, with `rope_theta` and `rope_scaling`, and their tokenizer lists `additional_special_tokens`. An export keeps
the starting model's files, so what is written here decides where the exports of a first try can be loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_OF_SECTIONS = ("dtype", "model_type", "layer_types")  # what 4.x has once, above, or computes
_OLDEST = {"qwen2_5_vl": "4.51.3", "qwen3_vl": "4.57.0"}  # releases that the exports are tried with
_OF_RELEASE = ("backend", "is_local", "local_files_only")


def write_as_published(folder: Path) -> None:
    """Rewrite config.json and tokenizer_config.json that transformers 5 saved. Raises KeyError for others."""
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    _write(config, published_config(json.loads(config.read_text(encoding="utf-8"))))
    _write(tokenizer, published_tokenizer(json.loads(tokenizer.read_text(encoding="utf-8"))))


def published_config(saved: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 -> that of 4.x: of Qwen2.5-VL the text's settings beside those of the model, of
    Qwen3-VL below `text_config`; `rope_theta` and `rope_scaling` in both."""
    whole = dict(saved)
    is_flat = whole["model_type"] == "qwen2_5_vl"
    text, vision = dict(whole.pop("text_config")), dict(whole.pop("vision_config"))
    rope = text.pop("rope_parameters")
    vision.pop("rope_parameters")
    dtype = whole.pop("dtype")
    text, vision = ({k: v for k, v in part.items() if k not in _OF_SECTIONS} for part in (text, vision))
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]} if is_flat else rope
    return {
        **(text if is_flat else {"text_config": text | {"model_type": "qwen3_vl_text"}}),
        **whole,
        "torch_dtype": dtype,
        "vision_config": vision | {"model_type": whole["model_type"]},
        "transformers_version": _OLDEST[whole["model_type"]],
    }


def published_tokenizer(saved: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json of transformers 5 -> that of 4.x."""
    kept = {key: value for key, value in saved.items() if key not in _OF_RELEASE}
    special = kept.pop("extra_special_tokens")
    return kept | {"additional_special_tokens": special, "tokenizer_class": "PreTrainedTokenizerFast"}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
