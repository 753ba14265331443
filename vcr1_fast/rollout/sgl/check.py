"""Reads weights back inside SGLang's own process and compares them with what was sent: a "custom weight loader". A
second one empties the cache of what its tower made of videos.

SGLang skips names that it does not know without a word, fuses some weights, and ties others. So the table of names is
not trusted: after the first update of an engine, the checksum of every weight sent must be that of its place in the
model, and every weight of the model must have been sent. Called by SGLang, for update.py; the learner's side
takes `checksum` from here. Only the standard library and torch are imported.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MAX_REPORTED = 8
FUSED = {  # part of a checkpoint's name: (SGLang's name of it, which share of its rows)
    ".q_proj.": (".qkv_proj.", "first"),
    ".k_proj.": (".qkv_proj.", "last but one"),
    ".v_proj.": (".qkv_proj.", "last"),
    ".gate_proj.": (".gate_up_proj.", "first half"),
    ".up_proj.": (".gate_up_proj.", "second half"),
    ".attn.qkv.": (".attn.qkv_proj.", "whole"),  # of the vision tower, fused in the checkpoint already
}
RENAMED = {"model.language_model.": "model.", "model.visual.": "visual."}  # of Qwen3-VL's checkpoints
_PART_BYTES = 1 << 22  # summed at once: they, their places and the products fit into a CPU's cache
_covered: dict[int, int] = {}  # address of a parameter's storage: number of values seen since the first bucket


@torch.no_grad()
def checksum(tensor: Tensor) -> list[int]:
    """[sum of w_i, sum of (i + 1) w_i] modulo 2^64 over the 64-bit words w_i of the values, row-major, the last one
    filled up with zeros; any device.

    The first changes with every single word that changes, the second when words change places. One CPU core does 5 GB/s
    of bfloat16.
    """
    rows = tensor.detach().reshape(-1) if tensor.ndim < 2 else tensor.detach()
    row_bytes = max(1, rows[:1].numel() * rows.element_size())
    per_part = 8 * max(1, _PART_BYTES // (8 * row_bytes))  # whole words, whatever a row is
    num_words = -(-min(per_part, rows.shape[0]) * row_bytes // 8)
    place_N = torch.arange(1, num_words + 1, device=rows.device)
    sums_2 = torch.zeros(2, dtype=torch.int64, device=rows.device)  # wraps around as int64 does
    first = 0
    for part in rows.split(per_part):
        word_N = _words(part)
        plain = word_N.sum()
        sums_2[0] += plain
        sums_2[1] += (word_N * place_N[: word_N.numel()]).sum() + first * plain
        first += word_N.numel()
    return [value % (1 << 64) for value in sums_2.tolist()]


def _words(part: Tensor) -> Tensor:
    """Its bytes as int64; a copy where they do not lie so."""
    flat_B = part.contiguous().reshape(-1).view(torch.uint8)
    missing = -flat_B.numel() % 8
    if missing or flat_B.storage_offset() % 8:
        flat_B = nn.functional.pad(flat_B, (0, missing))
    return flat_B.view(torch.int64)


def compare(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Write what is wrong as JSON, a list of sentences, into a file.

    The last entry is the order, JSON in bytes: {file, is_first, is_last, entries: [{name, dtype, shape, checksum}]}.
    """
    order = json.loads(bytes(named_tensors[-1][1].cpu().tolist()).decode())
    if order["is_first"]:
        _covered.clear()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wrong = [problem for entry in order["entries"] if (problem := _compare_one(parameters, entry))]
    if order["is_last"]:
        wrong += _not_sent(parameters)
    Path(order["file"]).write_text(json.dumps(wrong[:MAX_REPORTED]), encoding="utf-8")


def _compare_one(parameters: dict[str, nn.Parameter], entry: Mapping[str, Any]) -> str:
    """What is wrong with one weight, or an empty string.

    SGLang makes some sides longer: the vocabulary to a multiple of 64, the vision tower's MLP to one of 8, on a CPU to
    one of 32. What is sent stands at the front, and the rest must be zero.
    """
    name, shape, dtype = entry["name"], list(entry["shape"]), getattr(torch, entry["dtype"])
    target, share = _place_of(parameters, name)
    if target not in parameters:
        return f"{name!r} is not a weight of SGLang's model"
    parameter = parameters[target].detach()
    total, rows = parameter.shape[0], shape[0]
    region = {
        "whole": parameter,
        "first": parameter[:rows],
        "last but one": parameter[total - 2 * rows : total - rows],
        "last": parameter[total - rows :],
        "first half": parameter[: total // 2],
        "second half": parameter[total // 2 :],
    }[share]
    if len(shape) > region.ndim:  # the patch convolution is kept as a matrix
        shape = [rows, torch.Size(shape[1:]).numel()]
    held = region[tuple(slice(0, size) for size in shape)]
    if list(held.shape) != shape:
        return f"SGLang's {target!r} has no place for {name!r} of shape {shape}"
    if checksum(held.to(dtype)) != entry["checksum"]:  # a model may hold a wider one than was sent
        return f"{name!r} does not stand in SGLang's {target!r} as it was sent"
    if region.numel() > held.numel() and int(region.count_nonzero()) != int(held.count_nonzero()):
        return f"SGLang's {target!r} is longer than {name!r} and not zero there"
    _covered[parameter.data_ptr()] = _covered.get(parameter.data_ptr(), 0) + region.numel()
    return ""


def _place_of(parameters: Mapping[str, nn.Parameter], name: str) -> tuple[str, str]:
    """SGLang's name of the parameter that a weight of a checkpoint goes to, and which share of its rows."""
    for part, short in RENAMED.items():
        name = short + name.removeprefix(part) if name.startswith(part) else name
    for part, (fused, share) in FUSED.items():
        if part in name and name.replace(part, fused) in parameters:
            return name.replace(part, fused), share
    return name, "whole"


def _not_sent(parameters: dict[str, nn.Parameter]) -> list[str]:
    missing = {name: p.numel() - _covered.get(p.data_ptr(), 0) for name, p in parameters.items()}
    return [
        f"{count} of {parameters[name].numel()} values of {name!r} were not sent"
        for name, count in missing.items()
        if count > 0
    ]


def forget_videos(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Empty the cache of video embeddings, which SGLang keeps when weights change. Raises RuntimeError where there is
    none: it would go on with those of older weights without a word."""
    for name in ("mm_schedule", "mm_utils"):  # the first one since 0.5.20
        try:
            module = importlib.import_module(f"sglang.srt.managers.{name}")
        except ImportError:
            continue
        cache = getattr(module, "embedding_cache", None)
        if cache is not None:
            return cache.clear()
    raise RuntimeError("SGLang's cache of video embeddings was not found: take a version that is supported")
