"""Liger's kernels in Triton's interpreter, which hands a kernel its floats as Python's, without a `.to`, and knows no
function of libdevice."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch


def interpret_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the test where there is a GPU, because kernels are not interpreted there."""
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted where there is a GPU")
    language: Any = pytest.importorskip("triton.language")
    interpreter: Any = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._implicit_cvt

    def convert_floats(value: Any) -> Any:
        if type(value) is not float:
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), language.float32)
        return language.tensor(handle, language.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats)
    monkeypatch.setattr(importlib.import_module("liger_kernel.ops.rms_norm"), "rsqrt", lambda x: language.rsqrt(x))
