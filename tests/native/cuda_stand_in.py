"""A CUDA half for machines without a GPU: it records its calls, and its results are those of the CPU half."""

from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vcr1_fast import native
from vcr1_fast.tasks import native_cuda

STREAM = 7


class StandIn:
    """Takes the place of `vcr1_fast._native`."""

    has_cuda = True

    def __init__(self, module: ModuleType, failure: str = "", error: float = 0.0) -> None:
        """`failure`: what a launch raises. `error`: what is added to every result."""
        self._module, self._failure, self._error = module, failure, error
        self.calls: list[tuple[str, int]] = []  # name, number of results

    def __getattr__(self, name: str) -> Any:
        return self._recorded(name) if name.endswith("_cuda") else getattr(self._module, name)

    def _recorded(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            *inputs, out, stream = arguments
            assert stream == STREAM and isinstance(out, torch.Tensor)
            assert all(isinstance(value, torch.Tensor | str | int | float) for value in inputs)
            self.calls.append((name, out.numel()))
            if self._failure:
                raise RuntimeError(f"{name}: {self._failure}")
            try:
                getattr(self._module, name.removesuffix("_cuda"))(*inputs, out)
            except ValueError:  # the kernel sees it when it runs, and gives NaN
                out.fill_(torch.nan)
            out += self._error

        return call


def install(monkeypatch: pytest.MonkeyPatch, **options: Any) -> StandIn:
    """A GPU as far as native_cuda can see. Undone with `monkeypatch`, and so is which half is in use."""
    assert native.module is not None
    stand_in, on_cuda = StandIn(native.module, **options), native_cuda.OnCuda
    monkeypatch.setattr(native, "module", stand_in)
    monkeypatch.setattr(native, "_half", native._half)
    monkeypatch.setattr(native, "_in_use", native._in_use)
    monkeypatch.setattr(native_cuda, "OnCuda", lambda device: on_cuda(torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return stand_in
