"""Types of the compiled module; docstrings are in csrc/module.cpp. `*_cuda` exist only where `has_cuda` is True."""

from typing import Any, Protocol

class _DLPack(Protocol):
    def __dlpack__(self, *, stream: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> Any: ...

has_cuda: bool

def interval_iou(
    predicted: _DLPack,
    predicted_offsets: _DLPack,
    truth: _DLPack,
    truth_offsets: _DLPack,
    hull: bool,
    out: _DLPack,
) -> None: ...
def track_iou(
    predicted: _DLPack,
    predicted_offsets: _DLPack,
    truth: _DLPack,
    truth_offsets: _DLPack,
    first_box: int,
    out: _DLPack,
) -> None: ...
def interval_iou_cuda(
    predicted: _DLPack,
    predicted_offsets: _DLPack,
    truth: _DLPack,
    truth_offsets: _DLPack,
    hull: bool,
    out: _DLPack,
    stream: int,
) -> None: ...
def track_iou_cuda(
    predicted: _DLPack,
    predicted_offsets: _DLPack,
    truth: _DLPack,
    truth_offsets: _DLPack,
    first_box: int,
    out: _DLPack,
    stream: int,
) -> None: ...
