"""Reads what a compiler made of a kernel: registers, shared memory, and its machine instructions by loop.

Works on the text of `cuobjdump --dump-resource-usage` and `nvdisasm -c -ndf`, so no GPU is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_GLOBAL_ACCESS = re.compile(r"^(LDG|STG|LDGSTS)\b")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its suffixes: LDG.E.128
    predicated: bool  # may be skipped
    target: str | None  # label that a branch goes to
    in_loop: bool = False

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def access_bytes(self) -> int | None:
        """Bytes per lane of a global load or store; None for everything else and for TMA, which moves whole tiles."""
        if not _GLOBAL_ACCESS.match(self.opcode):
            return None
        suffixes = self.opcode.split(".")[1:]
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return next((widths[suffix] for suffix in suffixes if suffix in widths), 4)


@dataclass(frozen=True)
class Machine:
    """The instructions of one kernel."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def counts(self) -> Counter[str]:
        return Counter(i.opcode for i in self.instructions)

    @cached_property
    def body(self) -> tuple[Instruction, ...]:
        """The instructions inside loops, or all of them where there is no loop."""
        return tuple(i for i in self.instructions if i.in_loop) or self.instructions

    def count(self, *prefixes: str) -> int:
        return sum(number for opcode, number in self.counts.items() if opcode.startswith(prefixes))

    def loads(self) -> list[int]:
        """Bytes of each global load of the body; an asynchronous tile copy (TMA) counts as 16."""
        copies = [16 for i in self.body if i.base == "UTMALDG"]
        return copies + [i.access_bytes for i in self.body if i.base in ("LDG", "LDGSTS") and i.access_bytes]

    def stores(self) -> list[int]:
        copies = [16 for i in self.body if i.base in ("UTMASTG", "UTMAREDG")]
        return copies + [i.access_bytes for i in self.body if i.base == "STG" and i.access_bytes]


def parse(sass: str) -> Machine:
    """Instructions of the text of nvdisasm, with those inside loops marked."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(found)
        elif match := _INSTRUCTION.match(line):
            predicate, opcode, operands = match.groups()
            target = _TARGET.search(operands)
            is_branch = opcode.split(".")[0] in ("BRA", "CALL", "JMP")
            # `BRA P1, (label)` and `BRA.DIV UR4, (label)` are conditional without a predicate in front.
            conditional = bool(predicate) or (is_branch and not operands.startswith("`"))
            found.append(Instruction(opcode, conditional, target.group(1) if is_branch and target else None))
    in_loop = _loop_members(found, labels)
    return Machine(tuple(Instruction(i.opcode, i.predicated, i.target, n in in_loop) for n, i in enumerate(found)))


def _successors(found: list[Instruction], labels: dict[str, int]) -> list[list[int]]:
    successors = []
    for number, instruction in enumerate(found):
        ends = instruction.base in ("EXIT", "RET", "BRA", "JMP", "BRX") and not instruction.predicated
        after = [] if ends or number + 1 == len(found) else [number + 1]
        if instruction.target is not None and labels.get(instruction.target, len(found)) < len(found):
            after.append(labels[instruction.target])
        successors.append(after)
    return successors


def _loop_members(found: list[Instruction], labels: dict[str, int]) -> set[int]:
    """Natural loops: an edge back to an instruction that every way from the entry passes closes one.

    A branch to a lower address alone is not enough: compilers move rare code to the end and branch back from there.
    """
    successors = _successors(found, labels)
    predecessors: list[list[int]] = [[] for _ in found]
    for number, after in enumerate(successors):
        for target in after:
            predecessors[target].append(number)
    members: set[int] = set()
    backward = [(tail, head) for tail, after in enumerate(successors) for head in after if head <= tail]
    for tail, head in backward:
        if tail == head:  # the trap behind the last EXIT
            continue
        body, open_ends = {head, tail}, [tail]
        while open_ends:
            fresh = [p for p in predecessors[open_ends.pop()] if p not in body]
            body.update(fresh)
            open_ends += fresh
        if 0 not in body or head == 0:  # the entry is reached without `head`: no loop
            members |= body
    return members
