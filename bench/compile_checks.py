"""What a compiler made of one shipped kernel configuration, and what is wrong with it. No GPU needed.

A case is compiled ahead of time for sm_90 by the Triton that is installed; its machine code is read by bench.cubin.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcr1_kernels.compile_cases import CompileCase

from bench.cubin import Machine, parse

CAPABILITY = 90
REGISTERS_PER_SM = 65536
SHARED_PER_SM = 233472  # bytes; a block may use all but 1024 of them
SHARED_PER_BLOCK = 232448
THREADS_PER_SM = 2048
LENGTHS = (1, 8191, 8192, 8193)  # Triton treats 1 and multiples of 16 in their own way unless told not to


@dataclass(frozen=True)
class Facts:
    """What the compiler made of one case."""

    threads: int
    registers: int  # per thread
    static_shared: int  # bytes per block; 1024 of them are the system's
    dynamic_shared: int  # bytes per block
    stack: int  # bytes per thread
    spill_instructions: int  # loads and stores of local memory
    load_bytes: tuple[int, int]  # narrowest and widest global load of the loops (0, 0: none)
    store_bytes: tuple[int, int]
    wgmma: int  # instructions
    mma: int  # of the older kind
    exps: int  # MUFU.EX2
    float64: int  # lines of PTX and SASS that touch a float64
    binaries: int  # compiled for lengths 1, 8191, 8192, 8193

    @property
    def blocks_per_sm(self) -> int:
        by_registers = REGISTERS_PER_SM // (-(-self.registers // 8) * 8 * self.threads)
        by_shared = SHARED_PER_SM // max(self.static_shared + self.dynamic_shared, 1)
        return min(by_registers, by_shared, THREADS_PER_SM // self.threads, 32)


@dataclass(frozen=True)
class Result:
    """A case's facts, or None where it does not compile, and everything that is wrong with it."""

    name: str
    num_warps: int
    num_stages: int
    facts: Facts | None
    violations: tuple[str, ...]


def violations(case: CompileCase, facts: Facts) -> list[str]:
    """What a shipped kernel must not do, in words; empty for a good one."""
    narrowest = [(kind, width[0]) for kind, width in (("load", facts.load_bytes), ("store", facts.store_bytes))]
    checks = [
        (facts.stack > 0 or facts.spill_instructions > 0,
         f"spills: {facts.stack} bytes of stack, {facts.spill_instructions} loads and stores of local memory"),
        (facts.dynamic_shared > SHARED_PER_BLOCK,
         f"shared memory: {facts.dynamic_shared} bytes, at most {SHARED_PER_BLOCK} fit"),
        (facts.registers * facts.threads > REGISTERS_PER_SM,
         f"registers: {facts.registers} x {facts.threads} threads, an SM has {REGISTERS_PER_SM}"),
        (case.expects_wide_loads and facts.load_bytes[1] < 16,
         f"loads: the widest of the main loop is {facts.load_bytes[1]} bytes, wanted 16"),
        *((0 < width < case.min_access_bytes,
           f"{kind}s: the narrowest of the main loop is {width} bytes, wanted at least {case.min_access_bytes}")
          for kind, width in narrowest),
        (case.expects_wgmma and facts.wgmma == 0, "dot: no wgmma instruction"),
        (facts.mma > 0, f"dot: {facts.mma} mma instructions of the kind before Hopper"),
        (facts.float64 > 0, f"float64: {facts.float64} instructions"),
        (facts.binaries > 1, f"lengths: {facts.binaries} binaries for lengths {LENGTHS} of {', '.join(case.lengths)}"),
    ]  # fmt: skip
    return [text for is_wrong, text in checks if is_wrong]


def examine(case: CompileCase) -> Result:
    """Compiles one case. Needs TRITON_INTERPRET=0 since before Triton was imported."""
    try:
        facts = _facts(case, _compile(case))
    except Exception as error:  # a compiler may fail in any way, and the other cases still count
        reason = f"does not compile: {type(error).__name__}: {error}"
        return Result(case.name, case.num_warps, case.num_stages, None, (reason,))
    return Result(case.name, case.num_warps, case.num_stages, facts, tuple(violations(case, facts)))


def _check_case(case: CompileCase) -> list[str]:
    """The kernel's arguments. Raises ValueError for a case that no launch of its kernel can have."""
    arguments = list(case.kernel.arg_names)
    if list(case.signature) != arguments:
        raise ValueError(f"the signature names {list(case.signature)}, the kernel takes {arguments}")
    unknown = {*case.divisible_by_16, *case.lengths} - set(arguments)
    if unknown:
        raise ValueError(f"{sorted(unknown)} are not arguments of the kernel, which takes {arguments}")
    params = case.kernel.params
    wrong = [p.name for p in params if p.annotation_type not in ("", None, case.signature[p.name])]
    if wrong:
        raise ValueError(f"the case gives {wrong} other types than the kernel's own annotations")
    plain = {p.name for p in params if p.do_not_specialize or p.do_not_specialize_on_alignment} | set(case.lengths)
    wrong = sorted(plain & set(case.divisible_by_16))
    if wrong:
        raise ValueError(f"{wrong} are not specialised at launch, so they cannot be known as multiples of 16")
    return arguments


def _compile(case: CompileCase) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = _check_case(case)
    divisible = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=case.kernel,
        signature=case.signature,
        constexprs=case.constexprs,
        attrs={(arguments.index(name),): divisible for name in case.divisible_by_16},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)


def _facts(case: CompileCase, compiled: Any) -> Facts:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output([tools / "cuobjdump", "--dump-resource-usage", file.name])
        machine = parse(_output([tools / "nvdisasm", "-c", "-ndf", file.name]))
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", compiled.asm["ptx"])
    if numbers is None or threads is None:
        raise ValueError(f"cannot read registers or threads: {usage[-200:]!r}")
    registers, stack, static_shared = map(int, numbers.groups())
    return Facts(
        threads=int(threads.group(1)),
        registers=registers,
        static_shared=static_shared,
        dynamic_shared=compiled.metadata.shared,
        stack=stack,
        spill_instructions=machine.count("LDL", "STL"),
        load_bytes=_range(machine.loads()),
        store_bytes=_range(machine.stores()),
        wgmma=machine.count("HGMMA"),
        mma=machine.count("HMMA"),
        exps=machine.count("MUFU.EX2"),
        float64=_count_float64(compiled.asm["ptx"], machine),
        binaries=_count_binaries(case),
    )


def _output(command: Sequence[Path | str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _range(widths: list[int]) -> tuple[int, int]:
    return (min(widths), max(widths)) if widths else (0, 0)


def _count_float64(ptx: str, machine: Machine) -> int:
    in_sass = sum(i.base in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA") for i in machine.instructions)
    conversions = sum(".F64" in i.opcode or i.opcode.startswith("MUFU.RCP64") for i in machine.instructions)
    return len(re.findall(r"^[^/\n]*\.f64\b", ptx, re.MULTILINE)) + in_sass + conversions


def _count_binaries(case: CompileCase) -> int:
    """How many times Triton's launcher would compile over LENGTHS of every length argument: its own keys are asked."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = case.kernel
    bind = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", CAPABILITY, 32))
    )
    types = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32, "*i64": torch.int64}

    def example(name: str, kind: str) -> Any:
        if kind.startswith("*"):
            return torch.empty(16, dtype=types.get(kind, torch.uint8))
        return case.constexprs.get(name, 1.5 if kind.startswith(("fp", "bf")) else 4096)

    arguments = {name: example(name, kind) for name, kind in case.signature.items()}
    keys = {repr(bind(**arguments)[1])} if not case.lengths else set()
    for length in LENGTHS:
        changed = {**arguments, **dict.fromkeys(case.lengths, length)}
        keys.add(repr(bind(**changed)[1]))
    return len(keys) if case.lengths else 1
