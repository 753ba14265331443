"""`python -m bench kernels`: each kernel against its floor on this very machine, and against the peers installed.

For each op and size: what every way computes is first compared with a float64 or float32 reference, then the ways take
turns at the clock. A way that cannot run is listed with its reason, a point that does not fit the budget of seconds
by its name. On a CPU sizes are small, the torch twins run, and the times mean nothing for a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from vcr1_kernels import patchify, reference
from vcr1_kernels.head_chunks import head_peak_bytes

from bench import attention_problem as attention
from bench import floors, peers
from bench import head_problem as head
from bench import logits_problem as logits
from bench.harness import Absent, Contest, Deadline, Findings, Outputs, Way, free_memory
from bench.kernel_report import COLUMN_HEADS as COLUMN_HEADS
from bench.kernel_report import print_report
from bench.plots import plot_kernels

CPU_WARNING = "CPU run: small sizes through the torch twins. These times mean nothing for a GPU."
GPU_TOKENS = (8192, 16384, 4096, 32768)  # the sizes of the bars first: a short budget leaves the others out
CPU_TOKENS = (256, 512)
QUICK_TOKENS = (64,)
OPS = ("head", "logits", "attention", "patchify")
Row = dict[str, Any]


@dataclass
class Session(Findings):
    """One run: device, limits, time left, and what was found so far."""

    device: torch.device
    dtype: torch.dtype
    limits: floors.Limits
    point_seconds: float  # timed rounds of one point stop after this

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def hold(self, ways: Sequence[Way], absent: Sequence[Absent], expected: Outputs, labels: Row) -> list[Row]:
        """Compares, times, and appends one row per way that ran."""
        contest = Contest(self.device, absent=list(absent))
        for way in ways:
            contest.enter(way, expected)
        timings = contest.time(self.point_seconds) if contest.ways else {}
        floor_ms = labels.get("floor_ms")
        new = [
            labels
            | {"way": way.name, **timings[way.name].as_json(), "peak_extra_bytes": contest.peaks[way.name]}
            | {"errors": contest.errors[way.name]}
            | {"percent_of_floor": 100.0 * floor_ms / timings[way.name].median_ms if floor_ms else None}
            for way in contest.ways
        ]
        self.rows += new
        self.absent += [{"op": labels["op"], "size": labels["size"], **asdict(a)} for a in contest.absent]
        free_memory(self.device)
        return new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", default=None, help="tokens T of the head ops, such as 4k,8k (default: by device)")
    parser.add_argument("--op", choices=OPS, default=None, help="this one alone")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes and fewest repeats: does it run?")
    parser.add_argument("--seconds", type=float, default=None, help="budget; what does not fit is named as left out")


def parse_sizes(text: str) -> tuple[int, ...]:
    """`4k,512` -> (4096, 512). Raises ValueError for anything else than positive multiples of 8."""
    sizes = []
    for word in text.split(","):
        number = word.strip().lower().removesuffix("k")
        if not number.isdigit() or not int(number):
            raise ValueError(f"--sizes got {word!r}, wanted positive numbers such as 4k,8192")
        size = int(number) * (1024 if word.strip().lower().endswith("k") else 1)
        if size % head.NUM_SEQUENCES:
            raise ValueError(f"--sizes got {word!r}, wanted multiples of {head.NUM_SEQUENCES}")
        sizes.append(size)
    return tuple(sizes)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All points that fit the budget; returns what the JSON line holds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda, is_quick = device.type == "cuda", bool(arguments.quick)
    if not is_cuda:
        print(CPU_WARNING, flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False  # the float32 reference must be one
    dtype = torch.bfloat16 if is_cuda else torch.float32
    limits = floors.measure_limits(device, dtype)
    seconds = arguments.seconds or (20.0 if is_quick else 240.0 if is_cuda else 90.0)
    session = Session(device, dtype, limits, deadline=Deadline(seconds), point_seconds=0.05 if is_quick else 1.0)
    if arguments.sizes:
        tokens = parse_sizes(arguments.sizes)
    else:
        tokens = QUICK_TOKENS if is_quick and not is_cuda else GPU_TOKENS if is_cuda else CPU_TOKENS
    if is_quick and is_cuda:
        tokens = tokens[:1]
    with session.deadline.until_stopped():
        measure_all(session, tokens, ("3B", "7B") if is_cuda else ("small",), is_quick, arguments.op)
    result = {
        "is_gpu": is_cuda,
        "warning": None if is_cuda else CPU_WARNING,
        "limits": limits.as_json(),
        "peers": {name: peers.version_of(name) for name in ("trl", "liger-kernel", "verl", "cut-cross-entropy")},
        **session.as_json(),
    }
    print_report(result)
    if arguments.output:
        result["plots"] = plot_kernels(result, Path(arguments.output))
    return result


def measure_all(
    session: Session, tokens: Sequence[int], heads: Sequence[str], is_quick: bool, only: str | None = None
) -> None:
    """Points in order of importance, so that a short budget leaves out the least important. `only`: one of OPS."""
    wanted = {op: only in (None, op) for op in OPS}
    vocab = head.HEADS[heads[0]].vocab
    sizes = attention_sizes(session.is_cuda, is_quick) if wanted["attention"] else []
    for index, num_tokens in enumerate(tokens):
        for name in heads if wanted["head"] else ():
            measure_head(session, head.HEADS[name], num_tokens)
        if wanted["logits"]:
            measure_logits(session, vocab, num_tokens)
        if index:
            continue
        for size in sizes[:1]:
            measure_attention(session, size)
        if wanted["patchify"]:
            measure_patchify(session, is_quick)
        if wanted["head"]:
            measure_head(session, head.HEADS[heads[0]], num_tokens, is_frozen=True)
    for size in sizes[1:]:
        measure_attention(session, size)


def _needed_s(session: Session, flop: float, num_runs: int) -> float:
    """Rough seconds of a point: every way a few times at half the GEMM rate, plus compilation and reference."""
    return 2 * num_runs * session.limits.flop_ms(flop) / 1e3 + (2.0 if session.is_cuda else 0.1)


def measure_head(session: Session, size: head.HeadSize, num_tokens: int, *, is_frozen: bool = False) -> None:
    """With the gradient of hidden states and weight; of a frozen weight there is none."""
    name = f"{'frozen ' if is_frozen else ''}head {size.name} T={num_tokens}"
    product = 2.0 * num_tokens * size.hidden * size.vocab
    if not session.deadline.allows(name, _needed_s(session, 3 * product, 20 if is_frozen else 60)):
        return
    shape = (num_tokens, size.hidden, size.vocab)
    gemms = floors.measure_head_gemms(*shape, session.dtype, session.device)
    problem = head.make_head_problem(size, num_tokens, session.dtype, session.device)
    runners, absent = peers.load_all(head.FROZEN if is_frozen else head.TRAINED)
    labels = {
        "op": f"head{' with a frozen weight' if is_frozen else ''}, forward and backward",
        "size": f"{size.name} T={num_tokens}",
        "model": size.name,
        "tokens": num_tokens,
        "floor": f"{2 if is_frozen else 3} matrix products",
        "floor_ms": gemms.frozen_ms if is_frozen else gemms.train_ms,
        "flop": (2 if is_frozen else 3) * product,
        "num_bytes": floors.head_bytes(*shape, session.dtype.itemsize, is_trained=not is_frozen),
        "expected_extra_bytes": None if is_frozen else head_peak_bytes(*shape, session.dtype),
    }
    session.hold(head.head_ways(problem, runners), absent, head.head_reference(problem), labels)


def measure_logits(session: Session, vocab: int, num_tokens: int) -> None:
    """Forward: one read. Forward and backward in place: one read and one write."""
    name = f"logits T={num_tokens}"
    itemsize = session.dtype.itemsize
    one_read_ms = session.limits.bytes_ms(floors.logits_bytes(num_tokens, vocab, itemsize, 1))
    if not session.deadline.allows(name, 0.5 + 0.3 * one_read_ms):
        return
    problem = logits.make_logits_problem(num_tokens, vocab, session.dtype, session.device)
    expected = logits.logits_reference(problem)
    num_bytes, flop = floors.logits_bytes(num_tokens, vocab, itemsize, 1), 2 * num_tokens * vocab
    for passes, op, floor, table in (
        (1, "logits, forward", "logits read once", logits.FORWARD),
        (2, "logits, forward and backward", "logits read once, written once", logits.TRAIN),
    ):
        ways, absent = logits.logits_ways(problem, table)
        labels = {"op": op, "size": f"V={vocab} T={num_tokens}", "tokens": num_tokens, "floor": floor}
        labels |= {"floor_ms": passes * one_read_ms, "flop": passes * flop, "num_bytes": passes * num_bytes}
        session.hold(ways, absent, expected, labels)


def attention_sizes(is_cuda: bool, is_quick: bool) -> list[attention.AttentionSize]:
    if not is_cuda:
        lens = (24, 6, 3) if is_quick else (256, 32, 4)
        return [attention.AttentionSize("small", 4, 2, 16, *lens)]
    points = [("3B", 16, 2, 8192, 512, 8)]
    if not is_quick:
        points += [("7B", 28, 4, 8192, 512, 8), ("3B", 16, 2, 2048, 512, 8), ("3B", 16, 2, 16384, 1024, 8)]
    return [attention.AttentionSize(m, h, k, 128, p, r, g) for m, h, k, p, r, g in points]


def measure_attention(session: Session, size: attention.AttentionSize) -> None:
    lens = (size.completion_len,) * size.num_completions
    separate, flop = (
        floors.attention_flop(pairs(size.prompt_len, lens), size.num_heads, size.head_dim, backward=True)
        for pairs in (floors.separate_pairs, floors.shared_pairs)
    )
    if not session.deadline.allows(f"attention {size.name}", _needed_s(session, separate, 60)):
        return
    problem = attention.make_attention_problem(size, session.dtype, session.device)
    ways, absent = attention.attention_ways(problem)
    labels = {
        "op": "prefix attention, forward and backward",
        "size": size.name,
        "model": size.model,
        "tokens": size.num_tokens,
        "floor": "7 products per visible pair at the rate of a large matrix product",
        "floor_ms": session.limits.flop_ms(flop),
        "flop": flop,
        "num_bytes": floors.attention_bytes(
            size.num_tokens, size.num_heads, size.num_key_heads, size.head_dim, session.dtype.itemsize
        ),
    }
    session.hold(ways, absent, attention.attention_reference(problem), labels)


def measure_patchify(session: Session, is_quick: bool) -> None:
    shapes = [(64, 448, 448), (128, 448, 672)] if session.is_cuda and not is_quick else [(8, 112, 112)]
    for num_frames, height, width in shapes:
        name = f"patchify {num_frames}x{height}x{width}"
        if not session.deadline.allows(name, 1.0 if session.is_cuda else 0.2):
            continue
        shape = (num_frames, height, width, 3)
        rgb_FHW3 = torch.randint(0, 256, shape, dtype=torch.uint8, device=session.device)
        num_bytes = floors.patchify_bytes(num_frames, height, width, 2)
        labels = {"op": "patchify to bfloat16", "size": f"{num_frames}x{height}x{width}", "tokens": None}
        labels |= {"floor": "frames read once, patches written once", "floor_ms": session.limits.bytes_ms(num_bytes)}
        labels |= {"flop": num_frames * height * width * 3 * 2, "num_bytes": num_bytes}  # a product and a sum each
        expected = {"patches": reference.patchify(rgb_FHW3, torch.float64)}
        ways = [
            Way(name, lambda run=run, rgb=rgb_FHW3: {"patches": run(rgb, torch.bfloat16)})
            for name, run in (("vcr1 patchify", patchify), ("torch eager", reference.patchify))
        ]
        session.hold(ways, [], expected, labels)
