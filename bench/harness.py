"""How things are timed here: fair turns, medians, peak memory, and a budget of seconds that is kept.

A `Way` is one implementation of an op on fixed inputs. The ways of one problem take turns, so that a slow moment of the
machine meets all of them; between two calls the L2 cache is flushed. On a GPU times come from CUDA events.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

Outputs = dict[str, Tensor]
T = TypeVar("T")

FLUSH_BYTES = 256 * 2**20  # several times the 50-60 MB of L2 of a Hopper GPU
MIN_ROUNDS = 3
MAX_ROUNDS = 25


@dataclass(frozen=True)
class Way:
    """One implementation of an op."""

    name: str
    run: Callable[[], Outputs]  # what is timed; returns loss, gradients, ... for the comparison with the reference
    setup: Callable[[], None] | None = None  # before every run, not timed: restores what `run` destroys


@dataclass(frozen=True)
class Absent:
    """An implementation that could not be measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Timing:
    """Of one way, in milliseconds: median and quartiles."""

    median_ms: float
    low_ms: float  # 25th percentile
    high_ms: float  # 75th percentile
    repeats: int

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def summarize(samples_ms: Sequence[float]) -> Timing:
    """Median and quartiles (inclusive: of 1, 2, 3 the quartiles are 1.5 and 2.5). Raises ValueError without samples."""
    if not samples_ms:
        raise ValueError("summarize got no samples, wanted at least one time in milliseconds")
    if len(samples_ms) == 1:
        return Timing(samples_ms[0], samples_ms[0], samples_ms[0], 1)
    low, median, high = statistics.quantiles(samples_ms, n=4, method="inclusive")
    return Timing(median, low, high, len(samples_ms))


class Deadline:
    """Seconds that a benchmark may take. Points that no longer fit are left out by name, never silently."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds
        self.seconds = seconds
        self.left_out: list[str] = []

    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    @contextmanager
    def until_stopped(self) -> Iterator[None]:
        """What Ctrl-C or `timeout` ends is left out by name, too, and the run reports what it has."""
        try:
            yield
        except KeyboardInterrupt:
            self.left_out.append("what came after the last row: stopped from outside")

    def allows(self, name: str, needed_s: float) -> bool:
        """Whether `needed_s` more seconds fit; otherwise notes `name` as left out."""
        if self.left_s() >= needed_s:
            return True
        self.left_out.append(f"{name}: needs about {needed_s:.0f} s, {max(self.left_s(), 0):.0f} s of the budget left")
        return False


@dataclass(kw_only=True)
class Findings:
    """What a run of several points has found so far."""

    deadline: Deadline
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        lists = {"rows": self.rows, "absent": self.absent, "left_out": self.deadline.left_out}
        return {"seconds": self.deadline.seconds, **lists, "disagreements": self.disagreements}


def print_findings(console: Console, result: Mapping[str, Any]) -> None:
    """What was left out, and which ways disagree."""
    for line in result["left_out"]:
        console.print(f"left out: {line}")
    for line in result.get("disagreements", ()):
        console.print(f"DISAGREES: {line}")


def disagreements(result: Mapping[str, Any]) -> str | None:
    """Why a run must end with an error, if it must."""
    return "; ".join(result["disagreements"]) or None


class Clock:
    """Milliseconds of device work between `start` and `stop`: CUDA events on a GPU, a host clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def time_ms(self, call: Callable[[], object]) -> float:
        if not self._is_cuda:
            began_s = time.perf_counter()
            call()
            return (time.perf_counter() - began_s) * 1e3
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)


def flush_l2(device: torch.device) -> None:
    """Fill the L2 cache with something else. The small time it takes lies before the timed region."""
    if device.type == "cuda":
        torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()


def free_memory(device: torch.device) -> None:
    """Gives cached blocks of a GPU back; nothing on a CPU, where a collection takes longer than a small benchmark."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def with_peak(call: Callable[[], T], device: torch.device) -> tuple[T, int | None, int]:
    """(its result, bytes that it needed beyond what was allocated before, these); None and 0 on a CPU.

    What the call returns (gradients, say) counts in, because every way returns the same.
    """
    if device.type != "cuda":
        return call(), None, 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated(device) - before, before


def allocated_peak(call: Callable[[], object]) -> int:
    """Most bytes of CPU tensors alive at a time during `call`, beyond those alive before it.

    Counted from what torch's profiler says of each allocation and release: exact, and the same on a busy machine, where
    the resident size of a process would hold what the allocator keeps, and libraries besides.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as profiler:
        call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: Any = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate((num_bytes for _, num_bytes in sorted(changes)), initial=0))


def reason_of(error: BaseException) -> str:
    """One line that says why something could not run."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


@dataclass
class Contest:
    """Ways of one problem that could run, with what their first call gave."""

    device: torch.device
    ways: list[Way] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    peaks: dict[str, int | None] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    def enter(self, way: Way, reference: Outputs) -> None:
        """Runs `way` once (this also compiles it), compares with the reference, notes peak memory.

        A way that raises is listed as absent with the reason: a kernel that cannot run is a result too.
        """
        reason = None
        try:
            if way.setup:
                way.setup()
            outputs, self.peaks[way.name], _ = with_peak(way.run, self.device)
            self.errors[way.name] = compare(outputs, reference)
            del outputs
        except (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError, KeyError) as error:
            reason = reason_of(error)
        if reason is None:
            self.ways.append(way)
        else:  # only here is what the failed call allocated no longer held by the traceback
            self.absent.append(Absent(way.name, reason))
            free_memory(self.device)

    def time(self, seconds: float) -> dict[str, Timing]:
        return time_interleaved(self.ways, self.device, seconds)


def time_interleaved(ways: Sequence[Way], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Rounds in which each way runs once, until `seconds` have passed; at least 3 rounds, at most 25.

    Every way must have run before (compiled, caches warm).
    """
    samples_ms: dict[str, list[float]] = {way.name: [] for way in ways}
    clock, began_s = Clock(device), time.monotonic()
    for round_index in range(MAX_ROUNDS):
        for way in ways:
            if way.setup:
                way.setup()
            flush_l2(device)
            samples_ms[way.name].append(clock.time_ms(way.run))
        if round_index + 1 >= MIN_ROUNDS and time.monotonic() - began_s > seconds:
            break
    return {name: summarize(samples) for name, samples in samples_ms.items()}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| in float64, in slices so that no second copy of a large tensor is made.

    NaN or infinity in `value` gives NaN or infinity. Raises ValueError for different shapes.
    """
    if value.shape != reference.shape:
        raise ValueError(f"shapes differ: got {tuple(value.shape)}, wanted {tuple(reference.shape)}")
    difference = norm = 0.0
    for part, reference_part in zip(value.reshape(-1).split(2**26), reference.reshape(-1).split(2**26), strict=True):
        wide, wide_reference = part.detach().double(), reference_part.detach().double()
        difference += float((wide - wide_reference).square().sum())
        norm += float(wide_reference.square().sum())
    if norm == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / norm)


def compare(outputs: Outputs, reference: Outputs) -> dict[str, float]:
    """Errors of what both hold: log-probs, entropies and scalars by the largest absolute difference, else relative.

    A reference may hold only some rows of its tensors: those that its entry `checked_rows` names.
    """
    errors = {}
    rows = reference.get("checked_rows")
    for name, value in outputs.items():
        if name not in reference:
            continue
        value, expected = value.detach(), reference[name].detach()
        if rows is not None and value.ndim and value.shape[0] > expected.shape[0]:
            value = value[rows]
        if name in ("logprob", "entropy", "loss"):
            difference = value.double() - expected.double()
            errors[f"{name}_max_abs"] = float(difference.abs().max()) if difference.numel() else 0.0
        else:
            errors[f"{name}_relative"] = relative_error(value, expected)
    return errors


def measure_copy_gb_s(device: torch.device, num_bytes: int) -> float:
    """Bandwidth of a large device-to-device copy in GB/s (1e9), bytes read plus bytes written."""
    source = torch.randint(-128, 127, (num_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = Way("copy", lambda: {"out": target.copy_(source)})
    copy.run()
    timing = time_interleaved([copy], device, 0.3)[copy.name]
    return 2 * num_bytes / timing.median_ms / 1e6


def measure_gemm_ms(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Median of torch.mm of [rows, inner] by [inner, columns] on random data, result in the inputs' dtype."""
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(columns, inner, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    product = Way("mm", lambda: {"out": torch.mm(left, right.t(), out=out)})
    product.run()
    return time_interleaved([product], device, 0.15)[product.name].median_ms
