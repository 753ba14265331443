"""Clips per second, CPU seconds and bytes to the GPU: from a video file to the patches of the vision tower.

Each reader of ours, the cache and the worker processes, beside qwen-vl-utils' way on the same files (`decode_ways` says
what that is), over sizes, lengths, rates and codecs. All ways must give the same patches before they are timed. The
files are in the page cache. Beside each time stands the floor: for a decoder, FFmpeg through every source frame without
converting one (with a keyframe every 250 frames no reader can skip many); for the cache, copying its bytes.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.decode_report import COLUMN_HEADS as COLUMN_HEADS
from bench.decode_report import print_decode_report
from bench.decode_sources import SOURCE_FPS, Source, write_source
from bench.decode_ways import Clip, ClipWay, decode_everything, mean_levels, openers, read_plain
from bench.harness import Deadline, Findings, measure_copy_gb_s, reason_of, summarize
from bench.harness import disagreements as failed  # noqa: F401  # asked by bench/__main__.py
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.clip import ClipRequest

Row = dict[str, Any]
PLAIN = "ours, pyav"
PER_FRAME, BATCHED = "qwen-vl-utils, per frame", "qwen-vl-utils, batched"
MIN_ROUNDS, MAX_ROUNDS = 3, 9
DEFAULT_SECONDS = 420.0  # all points take 350 s on 2 cores
QUICK_SECONDS = 60.0
DECODE_PX_PER_S = 1.5e8  # of one core; only to judge whether a point fits the budget
MAX_DECODING_CORES = 8
NUM_READS = 4.0 * 6  # of each clip: a warm-up and 3 rounds of the ways that decode
CANNOT_RUN = (SampleError, ImportError, RuntimeError, OSError, ValueError, TypeError, AttributeError)

SIZES = ((320, 240), (640, 360), (1280, 720))


@dataclass(frozen=True)
class Point:
    """A clip and the rate at which it is sampled."""

    source: Source
    fps: float

    @property
    def name(self) -> str:
        source = self.source
        return f"{source.codec} {source.width_px}x{source.height_px} {source.length_s:g} s at {self.fps:g} fps"

    def needed_s(self, folder: Path) -> float:
        source = self.source
        encode_s = 0.0 if (folder / source.file_name).is_file() else source.encode_s
        px_per_s = DECODE_PX_PER_S * min(os.cpu_count() or 1, MAX_DECODING_CORES)
        return encode_s + NUM_READS * source.num_frames * source.width_px * source.height_px / px_per_s


QUICK_POINTS = [Point(Source("h264", 128, 96, 2.0), 2.0), Point(Source("vp9", 128, 96, 2.0), 2.0)]
MIDDLE = Point(Source("h264", 640, 360, 30.0), 2.0)
POINTS = [  # rate, size, length and codec in turn; a longest clip at the largest size would take the whole budget
    MIDDLE,
    *(Point(MIDDLE.source, fps) for fps in (1.0, 4.0)),
    *(Point(Source("h264", *size, 10.0), 2.0) for size in SIZES),
    Point(Source("h264", 640, 360, 60.0), 2.0),
    *(Point(Source("vp9", *size, 10.0), 2.0) for size in SIZES),
]


@dataclass
class Session(Findings):
    device: torch.device
    folder: Path  # of the clips
    scratch: Path
    copy_gb_s: float


@dataclass
class Samples:
    """Of one way: wall-clock milliseconds and CPU seconds of each call."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two tiny clips: does it run?")
    parser.add_argument("--seconds", type=float, default=None, help="budget; what does not fit is named as left out")
    parser.add_argument("--folder", type=Path, default=None, help="keeps the clips for later runs (default: temporary)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All points that fit the budget, the writing of their clips included; `rows` has one entry per point and way."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_quick = bool(arguments.quick)
    seconds = arguments.seconds or (QUICK_SECONDS if is_quick else DEFAULT_SECONDS)
    with tempfile.TemporaryDirectory(prefix="bench_decode_") as temporary:
        folder = arguments.folder or Path(temporary) / "clips"
        copy_gb_s = measure_copy_gb_s(torch.device("cpu"), 2**26)
        session = Session(device, folder, Path(temporary), copy_gb_s, deadline=Deadline(seconds))
        with session.deadline.until_stopped():
            for point in QUICK_POINTS if is_quick else POINTS:
                if session.deadline.allows(f"decode {point.name}", 0.0 if is_quick else point.needed_s(folder)):
                    measure_point(session, point, MIN_ROUNDS if is_quick else MAX_ROUNDS)
    result = {
        "is_gpu": device.type == "cuda",
        "torch_threads": torch.get_num_threads(),
        "copy_gb_s": copy_gb_s,
        **session.as_json(),
    }
    print_decode_report(result)
    return result


def measure_point(session: Session, point: Point, max_rounds: int) -> None:
    """Open, compare and time all ways on one clip."""
    path = write_source(point.source, session.folder)
    config = VideoConfig(fps=point.fps)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=session.scratch)))
        clip = Clip(ClipRequest(str(path), config), read_plain(path, config), session.device, scratch)
        ways, levels = open_ways(session, point, clip, stack)
        samples = take_samples(session, ways, clip, max_rounds)
    by_way = {way.name: summarize(samples[way.name].wall_ms).median_ms / way.num_clips for way in ways}
    floors_ms = {"decode": min(samples["floor"].wall_ms), "copy": copy_floor_ms(session, clip)}
    for way in ways:
        row = row_of(point, clip, way, samples[way.name])
        row["file_bytes"] = path.stat().st_size
        row["mean_levels"] = levels[way.name]
        floor_ms = floors_ms[way.floor] if way.floor else None
        row["floor"], row["floor_ms"] = way.floor, floor_ms
        row["percent_of_floor"] = None if floor_ms is None else 100 * floor_ms / row["median_ms"]
        for key, theirs in (("speedup_per_frame", PER_FRAME), ("speedup_batched", BATCHED)):
            row[key] = by_way[theirs] / row["median_ms"] if theirs in by_way else None
        session.rows.append(row)


def open_ways(session: Session, point: Point, clip: Clip, stack: ExitStack) -> tuple[list[ClipWay], dict[str, float]]:
    """The ways that run here, each run once (this also warms up), and how far their patches are from the plain ones."""
    ways: list[ClipWay] = []
    levels: dict[str, float] = {}
    expected: Tensor | None = None
    for name, opener in openers(has_workers=not session.rows).items():
        try:
            way = opener(clip, stack)
            patches = way.run()
            expected = patches if expected is None else expected
            levels[name] = mean_levels(patches, expected)
            ways.append(way)
            del patches
        except CANNOT_RUN as error:
            reason = error.reason if isinstance(error, SampleError) else reason_of(error)  # without this machine's path
            session.absent.append({"size": point.name, "way": name, "reason": reason})
    for way in ways:
        if not levels[way.name] <= way.max_mean_levels:
            session.disagreements.append(
                f"{way.name} on {point.name}: patches are {levels[way.name]:.2f} of 255 levels from those of {PLAIN}, "
                f"bound {way.max_mean_levels:g}"
            )
    return ways, levels


def take_samples(session: Session, ways: list[ClipWay], clip: Clip, max_rounds: int) -> dict[str, Samples]:
    """The ways take turns, so that a slow moment of the machine meets all of them; "floor" is FFmpeg alone."""
    calls: dict[str, Callable[[], object]] = {way.name: way.run for way in ways}
    calls["floor"] = lambda: decode_everything(clip.request.path)
    samples = {name: Samples() for name in calls}
    end_s = (
        time.monotonic() + session.deadline.seconds / len(POINTS) / 2
    )  # the other half is for writing and warming up
    for round_index in range(max_rounds):
        if round_index >= MIN_ROUNDS and time.monotonic() > end_s:
            break
        for name, call in calls.items():
            cpu_before_s, began_s = cpu_seconds(), time.perf_counter()
            call()
            if session.device.type == "cuda":
                torch.cuda.synchronize()
            samples[name].wall_ms.append((time.perf_counter() - began_s) * 1e3)
            samples[name].cpu_s.append(cpu_seconds() - cpu_before_s)
    return samples


def copy_floor_ms(session: Session, clip: Clip) -> float:
    """Least time for a cached clip: on a CPU bytes in and float32 values out at the speed of a copy; on a GPU the
    transfer of the bytes, the best of three."""
    rgb_FHW3 = clip.frames.rgb_FHW3
    if session.device.type != "cuda":
        return 5 * rgb_FHW3.nbytes / session.copy_gb_s / 1e6
    pinned, times_ms = rgb_FHW3.pin_memory(), []
    for _ in range(3):
        began_s = time.perf_counter()
        pinned.to(session.device)
        torch.cuda.synchronize()
        times_ms.append((time.perf_counter() - began_s) * 1e3)
    return min(times_ms)


def row_of(point: Point, clip: Clip, way: ClipWay, samples: Samples) -> Row:
    """What is reported of one way at one point, per clip."""
    timing, cpu = summarize(samples.wall_ms), summarize(samples.cpu_s)
    num_frames, height_px, width_px, _ = clip.frames.rgb_FHW3.shape
    return {
        "size": point.name,
        "codec": point.source.codec,
        "width_px": point.source.width_px,
        "height_px": point.source.height_px,
        "length_s": point.source.length_s,
        "source_fps": SOURCE_FPS,
        "fps": point.fps,
        "num_frames": num_frames,
        "model_size": f"{width_px}x{height_px}",
        "way": way.name,
        "decoder": way.decoder,
        "median_ms": timing.median_ms / way.num_clips,
        "low_ms": timing.low_ms / way.num_clips,
        "high_ms": timing.high_ms / way.num_clips,
        "repeats": timing.repeats,
        "clips_per_call": way.num_clips,
        "clips_per_s": 1e3 * way.num_clips / timing.median_ms,
        "cpu_s": cpu.median_ms / way.num_clips,
        "cpu_low_s": cpu.low_ms / way.num_clips,
        "cpu_high_s": cpu.high_ms / way.num_clips,
        "gpu_bytes": way.gpu_bytes,
    }


def cpu_seconds() -> float:
    """User and system time of this process and all its descendants, living or waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + living_descendants_s()


def living_descendants_s() -> float:
    """From /proc, in steps of 10 ms (the clock of `times`); 0 where there is no /proc.

    RUSAGE_CHILDREN counts a child only when it has ended, and worker processes live as long as the benchmark.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it ended meanwhile
            continue
        fields = text[text.rindex(")") + 2 :].split()  # state, parent, ...: the name before may hold anything
        pid = int(folder.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(map(int, fields[11:15]))  # utime, stime, and those of its own children that ended
    family, num_before = {os.getpid()}, 0
    while len(family) > num_before:
        num_before = len(family)
        family |= {pid for pid, parent in parents.items() if parent in family}
    return sum(ticks[pid] for pid in family if pid in ticks and pid != os.getpid()) / os.sysconf("SC_CLK_TCK")
