"""Triton launches as stand-ins: counted, and nothing runs. Wrappers have allocated their outputs before they launch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Launched = Callable[[str, tuple[Any, ...]], None]  # name of the kernel, its arguments


def install(launched: Launched) -> None:
    """From now on `kernel[grid](...)` calls `launched` instead. Works without Triton, too: the CPU builds lack it."""
    if importlib.util.find_spec("triton") is None:
        _install_module(launched)
        return
    from triton.runtime.jit import JITFunction

    def run(self: Any, *arguments: Any, grid: Any = None, warmup: bool = False, **options: Any) -> None:
        launched(self.fn.__name__, arguments)

    JITFunction.run = run


class _Kernel:
    def __init__(self, function: Callable[..., Any], launched: Launched) -> None:
        self.fn = function
        self._launched = launched

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self._launched(self.fn.__name__, arguments)


class _Anything(ModuleType):
    """triton.language: names in signatures and decorators, never called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _install_module(launched: Launched) -> None:
    triton, language = ModuleType("triton"), _Anything("triton.language")

    def jit(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        if function is None:
            return lambda later: _Kernel(later, launched)
        return _Kernel(function, launched)

    members = {"jit": jit, "language": language, "cdiv": lambda a, b: -(-a // b), "__version__": "stand-in"}
    for name, value in members.items():
        setattr(triton, name, value)
    triton.__path__ = []
    for module in (triton, language):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
