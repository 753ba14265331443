"""Adds adapters to their matrices inside SGLang's own process: a "custom weight loader", for update.py.

SGLang can serve adapters beside the weights, for many users at once; a trainer has one adapter, changed every step.
Added up, it adds nothing to the drawing of answers, needs no kernels of its own, works in 0.5.17 as in 0.5.21, and
log-probs are those of the sums that the learner would have sent.

    W = W_0 + scale B A, summed in float32        W_0 [N, K]: as it was first sent, kept in host memory

Adding to W_0 each time and not to the last W keeps rounding errors from piling up over the steps. Only the standard
library and torch are imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vcr1_fast.rollout.sgl.check import MAX_REPORTED, checksum, place_of

_start: dict[str, Tensor] = {}  # W_0 by name
_factors: dict[str, Tensor] = {}  # A and B by name, of the load that is under way


@torch.no_grad()
def add_adapters(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Take one bucket of factors; after the last one, write every changed matrix into the model, in place.

    The entries are the bucket's bytes and the order, JSON in bytes: {path, is_first, is_last, is_fresh, scale, entries:
    [{name, dtype, shape, start, stop, checksum?}]}. is_fresh: the model holds W_0. What is wrong is written into the
    file `path` as a JSON list of sentences, and the model is then not changed.
    """
    flat_B, note = (tensor.cpu() for _, tensor in named_tensors)
    order = json.loads(bytes(note.tolist()).decode())
    if order["is_first"]:
        _factors.clear()
    if order["is_fresh"]:
        _start.clear()
    wrong: list[str] = []
    for entry in order["entries"]:
        factor = _factors[entry["name"]] = _cut_out(flat_B, entry)
        if "checksum" in entry and checksum(factor) != entry["checksum"]:
            wrong.append(f"{entry['name']!r} did not arrive as it was sent")
    if order["is_last"] and not wrong:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        stems = sorted({name.rsplit(".", 1)[0] for name in _factors})
        wrong = [problem for stem in stems if (problem := _add(parameters, stem, order["scale"]))]
        _factors.clear()
    Path(order["path"]).write_text(json.dumps(wrong[:MAX_REPORTED]), encoding="utf-8")


def _cut_out(flat_B: Tensor, entry: Mapping[str, Any]) -> Tensor:
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    return flat_B[entry["start"] : entry["stop"]].view(dtype).reshape(entry["shape"]).clone()


def _add(parameters: Mapping[str, nn.Parameter], stem: str, scale: float) -> str:
    """Write one matrix; what is wrong with it, or an empty string."""
    a_RK, b_NR = (_factors.get(f"{stem}.{factor}") for factor in ("lora_A", "lora_B"))
    if a_RK is None or b_NR is None:
        return f"of the adapter of {stem!r} only one factor came"
    place = place_of(parameters, f"{stem}.weight", [b_NR.shape[0], a_RK.shape[1]])
    if isinstance(place, str):
        return place
    held_NK = place.held
    start_NK = _start.get(stem)
    if start_NK is None:
        start_NK = torch.empty(held_NK.shape, dtype=held_NK.dtype, pin_memory=held_NK.is_cuda)
        _start[stem] = start_NK.copy_(held_NK)
    device = held_NK.device
    factors = (b_NR.to(device, torch.float32), a_RK.to(device, torch.float32))
    held_NK.copy_(torch.addmm(start_NK.to(device, torch.float32), *factors, alpha=scale))
    return ""
