"""The compiled module `vcr1_fast._native`, if it was built, and which half of it computes a batch.

Whether it is there is decided at import; `doctor` prints `status()`. Overlaps and advantages are computed by the CPU
half until a run chooses the CUDA half at its start (`native_cuda.choose_half`); the run prints `in_use()`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

_REBUILD = "VCR1_NATIVE=cpu pip install --no-deps -e . shows why it does not build"


class Half(Protocol):
    def __call__(self, name: str, inputs: Sequence[Any], out: Any) -> None:
        """The module's batch function `name`: contiguous NumPy arrays, numbers and strings in, float64 `out` filled.

        Raises ValueError for arrays that do not fit each other.
        """
        ...


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("vcr1_fast._native"), ""
    except ModuleNotFoundError:
        return None, f"there is no vcr1_fast._native; {_REBUILD}"
    except ImportError as error:  # built for another Python or C++ library
        return None, f"{error}; {_REBUILD}"


module, _reason = _load()  # None: the plain Python loops are used


def is_available() -> bool:
    """Whether the CPU half can be called."""
    return module is not None


def has_cuda() -> bool:
    """Whether the CUDA half was compiled in; says nothing about a GPU being present."""
    return module is not None and bool(module.has_cuda)


def unavailable_reason() -> str | None:
    """Why `is_available()` is False, and what to do; None when it is True."""
    return None if is_available() else _reason


def status() -> str:
    """What is usable: "CPU and CUDA", "CPU" or "not built (reason)"."""
    if not is_available():
        return f"not built ({_reason})"
    return "CPU and CUDA" if has_cuda() else "CPU"


def on_cpu(name: str, inputs: Sequence[Any], out: Any) -> None:
    """See `Half`."""
    getattr(module, name)(*inputs, out)


_half: Half = on_cpu
_in_use = "C++" if is_available() else status()


def use(half: Half, label: str) -> None:
    """Compute every later batch by `half`; `label` is what a run says of it."""
    global _half, _in_use
    _half, _in_use = half, label


def in_use() -> str:
    """What overlaps and advantages are computed by, for the line a run prints at its start."""
    return _in_use


def compute(name: str, inputs: Sequence[Any], out: Any) -> None:
    """See `Half`; by the half in use."""
    _half(name, inputs, out)
