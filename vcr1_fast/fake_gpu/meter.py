"""What a run on fake GPUs costs, counted operation by operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from vcr1_fast.fake_gpu.memory import Memory
from vcr1_fast.fake_gpu.predict import H100_RATES, Rates


@dataclass
class Kernel:
    """All launches of one name in one phase."""

    launches: int = 0
    flop: float = 0.0  # of what is neither product nor attention: see costs.num_operations
    num_bytes: float = 0.0  # of arguments and results, once each
    seconds: float = 0.0  # see predict.py


@dataclass
class Meter:
    """Everything since the last `start`."""

    memory: Memory = field(default_factory=Memory)
    rates: Rates = H100_RATES  # by which seconds are predicted
    phase: str = "start"
    kernels: dict[str, dict[str, Kernel]] = field(default_factory=dict)  # phase -> name
    syncs: Counter[str] = field(default_factory=Counter)  # what the host waited for, and where in the code
    blocking_copies: Counter[str] = field(default_factory=Counter)  # host to device, with a wait, and where
    copies: Counter[str] = field(default_factory=Counter)  # host to device, without one
    collectives: list[tuple[str, int]] = field(default_factory=list)  # in their order: name, bytes of the largest part
    collective_s: float = 0.0  # of those on the GPU, one after the other

    def start(self) -> None:
        """Forget what was counted; live memory stays and is the new peak."""
        fresh = Meter(memory=self.memory, rates=self.rates)
        for name, value in vars(fresh).items():
            setattr(self, name, value)
        self.memory.peaks = {}
        self.enter("start", "other")

    def enter(self, phase: str, kind: str) -> None:
        """What follows belongs to this phase, and what it allocates is of this kind."""
        self.phase, self.memory.kind = phase, kind
        self.memory.enter(phase)

    def communicate(self, name: str, num_bytes: int, ranks: Sequence[int]) -> None:
        """A collective on the GPU among these ranks; an all-reduce goes round twice."""
        self.collectives.append((name, num_bytes))
        seconds = self.rates.collective_seconds(num_bytes, ranks)
        self.collective_s += 2 * seconds if "all_reduce" in name or "allreduce" in name else seconds

    def note(self, name: str, *, launches: int = 1, flop: float = 0, num_bytes: float = 0, seconds: float = 0) -> None:
        """What one operation was, by its name."""
        kernel = self.kernels.setdefault(self.phase, {}).setdefault(name, Kernel())
        kernel.launches += launches
        kernel.flop += flop
        kernel.num_bytes += num_bytes
        kernel.seconds += seconds
