"""What a caller can get wrong, named before anything runs: types, shapes, devices, and what a loss function returns.

Nothing here reads values of a tensor: that would wait for a GPU, and break a compiled graph.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from .loss_weights import Variant
from .token_vectors import LossFunction, TokenVectors

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensors(op: str, **values: Any) -> None:
    """TypeError when one is no tensor, ValueError when they do not lie on one device."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op} got {name} of type {type(value).__name__}, wanted a torch.Tensor")
    devices = {name: str(value.device) for name, value in values.items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op} got {where}, wanted one device for all")


def check_frames(rgb_FHW3: Tensor, patch_px: int) -> None:
    shape, block_px = tuple(rgb_FHW3.shape), 2 * patch_px
    is_clip = len(shape) == 4 and shape[0] >= 1 and shape[3] == 3
    if rgb_FHW3.dtype != torch.uint8 or not is_clip or shape[1] % block_px or shape[2] % block_px:
        raise ValueError(
            f"patchify got {rgb_FHW3.dtype} {shape}, wanted torch.uint8 [F >= 1, H, W, 3] with H and W multiples of "
            f"{block_px}"
        )


def check_target_dtype(target_N: Tensor) -> None:
    if target_N.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"target is {target_N.dtype}, wanted int32 or int64")


def check_logits(logits_NV: Tensor, target_N: Tensor) -> None:
    """Raises ValueError or TypeError naming what is wrong with logits [..., V] and their targets [...]."""
    check_tensors("the loss of logits", logits=logits_NV, target=target_N)
    if logits_NV.dtype not in FLOAT_DTYPES:
        raise TypeError(f"logits are {logits_NV.dtype}, wanted bfloat16, float16, float32 or float64")
    if logits_NV.ndim < 1 or logits_NV.shape[-1] < 1:
        raise ValueError(f"logits have shape {tuple(logits_NV.shape)}, wanted [..., V] with V >= 1")
    if target_N.shape != logits_NV.shape[:-1]:
        raise ValueError(f"logits have shape {tuple(logits_NV.shape)}, so target needs {tuple(logits_NV.shape[:-1])}, "
                         f"but it has {tuple(target_N.shape)}")  # fmt: skip
    check_target_dtype(target_N)


def check_loss(loss: LossFunction, tokens: TokenVectors, num_rows: int) -> None:
    """Raises TypeError for what is no loss function or no token vectors, ValueError for vectors of another length."""
    if not callable(loss):
        names = get_args(Variant)
        by_name = f"PolicyLoss({loss!r})" if loss in names else f"PolicyLoss of one of {', '.join(names)}"
        raise TypeError(
            f"loss is {loss!r}, wanted {by_name}, or a function (logprob, entropy, tokens) -> (scalar tensor, sums)"
        )
    if not isinstance(tokens, TokenVectors):
        raise TypeError(
            f"tokens are of type {type(tokens).__name__}, wanted a TokenVectors(advantage_N, weight_N, ...)"
        )
    if tokens.advantage_N.shape != (num_rows,):
        raise ValueError(f"tokens hold {tuple(tokens.advantage_N.shape)} advantages, wanted [{num_rows}], one per row")


def checked_result(result: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a loss function returned. TypeError unless it is (tensor, dict of tensors), ValueError for a loss [N]."""
    is_pair = isinstance(result, tuple) and len(result) == 2
    if not is_pair or not isinstance(result[0], Tensor) or not isinstance(result[1], dict):
        got = f"({', '.join(type(part).__name__ for part in result)})" if is_pair else type(result).__name__
        raise TypeError(f"the loss function returned {got}, wanted (scalar tensor, dict of tensors)")
    value, sums = result
    if value.ndim != 0:
        raise ValueError(f"the loss function returned a loss of shape {tuple(value.shape)}, wanted a scalar")
    for name, total in sums.items():
        if not isinstance(total, Tensor):
            raise TypeError(f"the loss function returned {name!r} of type {type(total).__name__}, wanted a tensor")
    return value, sums
