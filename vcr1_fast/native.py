"""The compiled module `vcr1_fast._native`, if it was built. Decided once, at import; `doctor` prints `status()`."""

from __future__ import annotations

import importlib
from types import ModuleType

_REBUILD = "VCR1_NATIVE=cpu pip install --no-deps -e . shows why it does not build"


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
