"""Copies between host and device and waits for the device, counted without a GPU: `meta` stands for the device.

An op on `meta` tensors computes nothing, but it is dispatched as it would be on a GPU, and one that has to read a value
there cannot run at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vcr1_kernels import linear_logprob

DEVICE = torch.device("meta")
# Ops of ours that call others: on `meta` their fakes would run, which do not
LOOPS: dict[str, Callable[..., Any]] = {
    "linear_logprob_forward": linear_logprob._forward._init_fn,
    "linear_logprob_backward": linear_logprob._backward._init_fn,
}
READS_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")


class Traffic:
    """Names of the ops, in order."""

    def __init__(self) -> None:
        self.copies: list[str] = []  # from host to device, blocking ones too
        self.blocking: list[str] = []
        self.waits: list[str] = []  # values of the device that the host needs before it goes on

    def see_copy(self, name: str, source: torch.device, target: torch.device, non_blocking: bool) -> None:
        if source.type == "cpu" and target == DEVICE:
            self.copies.append(name)
            if not non_blocking:
                self.blocking.append(name)
        elif source == DEVICE and target.type == "cpu":
            self.waits.append(name)


class _Ops(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if name in LOOPS:
            with self:
                return LOOPS[name](*args, **kwargs)
        tensors = [x for x in args if isinstance(x, Tensor)]
        if name == "_to_copy":
            target = kwargs.get("device") or args[0].device
            self.traffic.see_copy(name, args[0].device, target, bool(kwargs.get("non_blocking")))
            if args[0].device == DEVICE and target.type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif name == "copy_":
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self.traffic.see_copy(name, args[1].device, args[0].device, bool(non_blocking))
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and args[0].device == DEVICE:
            for index in args[1]:
                if index is not None and index.device.type == "cpu" and index.ndim:
                    self.traffic.see_copy(f"{name} by a host tensor", index.device, DEVICE, False)
                if index is not None and index.dtype == torch.bool:
                    self.traffic.waits.append(f"{name} by a mask")
        elif any(x.device == DEVICE for x in tensors) and (
            name in READS_VALUES or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        ):
            self.traffic.waits.append(name)
        return func(*args, **kwargs)


def _seen_constructor(traffic: Traffic, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor([...], device=device)` copies from pageable memory, which no dispatched op shows."""

    def construct(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(data, Tensor) and kwargs.get("device") is not None:
            traffic.see_copy(real.__name__, torch.device("cpu"), torch.device(kwargs["device"]), False)
        return real(data, *args, **kwargs)

    return construct


@contextlib.contextmanager
def watched() -> Iterator[Traffic]:
    traffic = Traffic()
    with (
        mock.patch.object(torch, "tensor", _seen_constructor(traffic, torch.tensor)),
        mock.patch.object(torch, "as_tensor", _seen_constructor(traffic, torch.as_tensor)),
        _Ops(traffic),
    ):
        yield traffic
