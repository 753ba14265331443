"""What SGLang's imports miss on a machine without CUDA; install.sh puts it into the environment of the CPU tests only.

Loaded by a .pth file in every process of that environment, because SGLang starts processes of its own. Two things:
the PyPI build of torchvision cannot load its CUDA library beside a CPU torch, so that two operators whose names it
needs at import are missing; and SGLang's rotary embedding falls back to an operator of vLLM, given here in torch.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Acts when `torchvision` or `vllm` is imported; an interpreter that imports neither pays nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            _define_torchvision_operators()
        if fullname in ("vllm", "vllm._custom_ops"):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=fullname == "vllm")
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "vllm._custom_ops":
            module.rotary_embedding = _rotary_embedding  # pyright: ignore[reportAttributeAccessIssue]


def _define_torchvision_operators() -> None:
    import torch

    if not _LIBRARIES:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)  # dropped, it would take its operators with it


def _rotary_embedding(
    positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, is_neox: bool = True
) -> None:
    """Turn `query` and `key` [T, heads * head_size] in place; `cos_sin_cache` [positions, rotary size], cosines first.

    Only the layout of Qwen is here: the two halves of the rotary part are the pairs.
    """
    import torch

    assert is_neox, "only the half-and-half layout is implemented"
    cos_T1R, sin_T1R = cos_sin_cache[positions.flatten()].unsqueeze(1).chunk(2, dim=-1)
    num_rotated = 2 * cos_T1R.shape[-1]
    for states in (query, key):
        if states is None:
            continue
        rows = states.view(positions.numel(), -1, head_size)[..., :num_rotated]
        first, second = rows.chunk(2, dim=-1)
        turned = torch.cat((first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R), dim=-1)
        rows.copy_(turned)


_LIBRARIES: list[Any] = []
sys.meta_path.insert(0, _Finder())
