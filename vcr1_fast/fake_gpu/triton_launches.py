"""Triton launches as stand-ins: counted, and nothing runs. Wrappers have allocated their outputs before they launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime.jit import JITFunction


def install(launched: Callable[[str, tuple[Any, ...]], None]) -> None:
    """From now on `kernel[grid](...)` calls `launched`, with the name of the kernel and its arguments, instead."""

    def run(self: Any, *arguments: Any, grid: Any = None, warmup: bool = False, **options: Any) -> None:
        launched(self.fn.__name__, arguments)

    JITFunction.run = run
