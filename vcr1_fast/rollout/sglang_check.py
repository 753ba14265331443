"""Reads weights back inside SGLang's own process and compares them with what was sent: a "custom weight loader".

SGLang skips names that it does not know without a word, fuses some weights, and ties others. So the table of names is
not trusted: after the first update of an engine, every weight sent must stand in the model bit for bit, and every
weight of the model must have been sent. Called by SGLang, for sglang_worker.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

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
_covered: dict[int, int] = {}  # address of a parameter's storage: number of values seen since the first bucket


def compare(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Write what is wrong as a JSON list of sentences into the file that the last entry, JSON in bytes, names."""
    *weights, (_, order_B) = named_tensors
    order = json.loads(bytes(order_B.cpu().tolist()).decode())
    if order["is_first"]:
        _covered.clear()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wrong = [problem for name, sent in weights if (problem := _compare_one(parameters, name, sent))]
    if order["is_last"]:
        wrong += _not_sent(parameters)
    Path(order["path"]).write_text(json.dumps(wrong[:MAX_REPORTED]), encoding="utf-8")


def _compare_one(parameters: dict[str, nn.Parameter], name: str, sent: Tensor) -> str:
    """What is wrong with one weight, or an empty string.

    SGLang makes some sides longer: the vocabulary to a multiple of 64, the vision tower's MLP to one of 8, on a CPU to
    one of 32. What is sent must stand at the front, and everything behind it must be zero.
    """
    target, share = name, "whole"
    for part, (fused, which) in FUSED.items():
        if part in name and name.replace(part, fused) in parameters:
            target, share = name.replace(part, fused), which
    if target not in parameters:
        return f"{name!r} is not a weight of SGLang's model"
    parameter = parameters[target].detach()
    total, rows = parameter.shape[0], sent.shape[0]
    region = {
        "whole": parameter,
        "first": parameter[:rows],
        "last but one": parameter[total - 2 * rows : total - rows],
        "last": parameter[total - rows :],
        "first half": parameter[: total // 2],
        "second half": parameter[total // 2 :],
    }[share]
    # The patch convolution is kept as a matrix: its rows are compared, not the shape of a row.
    wanted = sent.reshape(rows, -1) if sent.ndim > region.ndim else sent
    held = region[tuple(slice(0, size) for size in wanted.shape)]
    if held.shape != wanted.shape or not torch.equal(held, wanted.to(held)):
        return f"{name!r} does not stand in SGLang's {target!r} as it was sent"
    if region.numel() > held.numel() and int(region.count_nonzero()) != int(held.count_nonzero()):
        return f"SGLang's {target!r} is longer than {name!r} and not zero there"
    _covered[parameter.data_ptr()] = _covered.get(parameter.data_ptr(), 0) + region.numel()
    return ""


def _not_sent(parameters: dict[str, nn.Parameter]) -> list[str]:
    missing = {name: p.numel() - _covered.get(p.data_ptr(), 0) for name, p in parameters.items()}
    return [
        f"{count} of {parameters[name].numel()} values of {name!r} were not sent"
        for name, count in missing.items()
        if count > 0
    ]
