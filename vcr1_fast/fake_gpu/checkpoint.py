"""A checkpoint whose weights nobody has written: the loader reads a file like any other, and the file is a hole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vcr1_fast.learner.families import family_of


def write_checkpoint(folder: Path, hf_config: Any) -> None:
    """config.json and model.safetensors in bfloat16, zeros that take no room on disk (where files can have holes)."""
    (folder / "config.json").write_text(json.dumps(hf_config.to_dict()), encoding="utf-8")
    with torch.device("meta"):
        hf = family_of(hf_config).model_class(hf_config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in hf.named_parameters():  # a tied head once
        start, end = end, end + 2 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)
