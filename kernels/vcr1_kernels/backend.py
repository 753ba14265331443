"""Which implementation of an op runs: its Triton kernel or its plain torch twin. Decided by the tensors.

`auto` takes Triton for CUDA tensors and the torch twin for CPU tensors, so a user's code is the same everywhere. With
TRITON_INTERPRET=1 in the environment before triton is imported, `backend="triton"` runs the kernels on CPU tensors,
in Triton's interpreter: slow, for tests of values.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]

MIN_CAPABILITY = (8, 0)  # bfloat16 and cp.async; the kernels are tuned for (9, 0)


def is_interpreted() -> bool:
    """Whether Triton kernels run in the interpreter (on the CPU)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable_reason() -> str | None:
    """Why the Triton kernels cannot run on a GPU here; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (the CUDA builds of torch bring it; pip install triton)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"compute capability is {capability[0]}.{capability[1]}, wanted 8.0 or newer"
    return None


def runs_triton(backend: Backend, tensor: Tensor) -> bool:
    """True when an op on `tensor` runs its Triton kernel, False when it runs its torch twin.

    Raises: ValueError for an unknown backend; RuntimeError when `triton` is asked for and cannot run on this tensor.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}, wanted auto, torch or triton")
    if backend == "torch" or (backend == "auto" and not tensor.is_cuda):
        return False
    if torch.compiler.is_compiling():
        return True  # the questions below are not for a graph; a kernel that cannot run raises when it is launched
    reason = None if is_interpreted() else unavailable_reason()
    if reason is None and not tensor.is_cuda and not is_interpreted():
        reason = "the tensor is on the CPU (set TRITON_INTERPRET=1 to run kernels in Triton's interpreter)"
    if reason is not None:
        raise RuntimeError(f"the Triton kernel cannot run: {reason}; backend='torch' runs the plain torch version")
    return True
