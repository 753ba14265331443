"""Types of the compiled module; docstrings are in csrc/*_bindings.cpp. `*_cuda` exist only where `has_cuda` is True."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

class _DLPack(Protocol):
    def __dlpack__(self, *, stream: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> Any: ...

_IntervalKind = Literal["set", "hull", "iop"]
_Scale = Literal["group", "batch", "none"]
_Pick = Literal["first", "last"]
_Rule = Literal["fixed", "paper"]
_Period = tuple[float, float]

has_cuda: bool

def thread_limit() -> int: ...
def set_thread_limit(count: int) -> None: ...
def read_periods(texts: list[str], tag: str, pick: _Pick, rule: _Rule) -> list[_Period | None]: ...
def read_glues(texts: list[str], tag: str, pick: _Pick, rule: _Rule) -> list[list[_Period] | None]: ...
def read_box_lists(texts: list[str], tag: str, pick: _Pick, rule: _Rule) -> list[list[list[float | None]] | None]: ...
def read_paper_choices(texts: list[str], tag: str, pick: _Pick) -> list[str | None]: ...
def read_choices(
    texts: list[str], options: list[Sequence[str]], tag: str, pick: _Pick
) -> tuple[list[str | None], list[int]]: ...
def have_format(texts: list[str], blocks: list[str], rule: _Rule) -> list[bool]: ...
def interval_overlap(
    predicted: _DLPack,
    predicted_offsets: _DLPack,
    truth: _DLPack,
    truth_offsets: _DLPack,
    kind: _IntervalKind,
    out: _DLPack,
) -> None: ...
def track_overlap(
    predicted: _DLPack,
    predicted_offsets: _DLPack,
    truth: _DLPack,
    truth_offsets: _DLPack,
    first_box: int,
    out: _DLPack,
) -> None: ...
def group_advantages(
    rewards: _DLPack,
    group_offsets: _DLPack,
    scale: _Scale,
    advantages: _DLPack,
) -> None: ...
def interval_overlap_cuda(
    predicted: _DLPack,
    predicted_offsets: _DLPack,
    truth: _DLPack,
    truth_offsets: _DLPack,
    kind: _IntervalKind,
    out: _DLPack,
    stream: int,
) -> None: ...
def track_overlap_cuda(
    predicted: _DLPack,
    predicted_offsets: _DLPack,
    truth: _DLPack,
    truth_offsets: _DLPack,
    first_box: int,
    out: _DLPack,
    stream: int,
) -> None: ...
def group_advantages_cuda(
    rewards: _DLPack,
    group_offsets: _DLPack,
    scale: _Scale,
    advantages: _DLPack,
    stream: int,
) -> None: ...
