"""The kernel configurations that launchers ship, as data, so that each can be compiled and checked without a GPU.

Every module of `device/` has a function `compile_cases() -> list[CompileCase]` that is built from the same constants as
its launcher. `python -m bench compiled` compiles them for sm_90 and reads registers, shared memory and instructions.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel with the argument types and constants of one shipped launch."""

    name: str  # unique, such as "exp_rows bf16 entropy"
    kernel: Any  # a triton.JITFunction (with TRITON_INTERPRET=1 it is an interpreted one, which cannot be compiled)
    signature: dict[str, str]  # every argument in order: "*bf16", "i32", "i64", "fp32", "constexpr", ...
    constexprs: dict[str, Any] = field(default_factory=dict)  # a value for each "constexpr" of the signature
    # Arguments Triton may take as multiples of 16: pointers at 16-byte addresses, ints whose value always is one.
    divisible_by_16: tuple[str, ...] = ()
    # Ints that change from batch to batch: must not be constants, and must not make Triton compile again.
    lengths: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)  # further compile options, such as {"maxnreg": 168}
    expects_wgmma: bool = False  # has a dot, which must become wgmma instructions
    expects_wide_loads: bool = True  # global memory is read 16 bytes at a time (cp.async and TMA count)
    min_access_bytes: int = 4  # narrowest global load or store inside a loop (in a kernel without loops: anywhere)


def collect() -> list[CompileCase]:
    """The cases of every module of `device/`, found by walking the folder so that none can be forgotten.

    Raises AttributeError when a module there has no `compile_cases`. Imports triton.
    """
    from . import device

    cases: list[CompileCase] = []
    for module in sorted(pkgutil.iter_modules(device.__path__), key=lambda m: m.name):
        cases += importlib.import_module(f"{device.__name__}.{module.name}").compile_cases()
    return cases
