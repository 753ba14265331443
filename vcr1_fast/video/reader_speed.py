"""How long each of some readers takes over clips of a run, at the cores that a rank has. Called by `run.reader_choice`.

The clips are read as a run reads them: by worker processes, decoded and resized, several at a time. What is compared is
seconds per clip, over the clips that all readers came to, divided by the processes that read side by side.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.settings.video import ReaderName
from vcr1_fast.types import SampleError
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.loader_worker import WorkerSettings
from vcr1_fast.video.read import gpu_index, num_processes, open_reader
from vcr1_fast.video.reader import ReaderError
from vcr1_fast.video.reader_process import WorkerSlot

LIMIT_S = 5.0  # for all readers together, without the start of their processes
WARM_FRAC = 0.2  # of it: the files are brought into the page cache, or the first reader would pay for all
# A reader that needs less than this less is no faster: in three pairs of readings PyAV was up to 0.11 from itself, on
# two busy cores.
EQUAL_FRAC = 0.2


@dataclass(frozen=True, slots=True)
class Speed:
    """What one reader took."""

    reader: ReaderName
    name: str  # with its version; why it cannot be used, where it cannot
    num_processes: int  # 0: it cannot be used
    read_s: dict[ClipRequest, float]  # of the clips that it came to

    def clip_s(self, clips: Sequence[ClipRequest]) -> float:
        """Seconds per clip, all processes together."""
        return sum(self.read_s[clip] for clip in clips) / len(clips) / self.num_processes


def measure_readers(readers: Sequence[ReaderName], clips: Sequence[ClipRequest], cores: Sequence[int]) -> list[Speed]:
    """One after the other, on `cores` of this machine; what cannot be used says so. Takes LIMIT_S and the starts."""
    clips = _warmed(clips, LIMIT_S * WARM_FRAC)
    limit_s = LIMIT_S * (1 - WARM_FRAC) / len(readers)
    with _on_cores(cores):
        return [_measured(replace(clips[0].config, reader=reader), clips, limit_s) for reader in readers]


def fastest(speeds: Sequence[Speed]) -> tuple[Speed, list[ClipRequest]]:
    """The one to use, and the clips by which: the first usable one, unless a later one is clearly faster.

    Those that came to no clip in their time are out, unless none came to one. Raises ReaderError when none is usable.
    """
    usable = [speed for speed in speeds if speed.num_processes]
    if not usable:
        raise ReaderError(
            "video.reader is auto, and no reader works here ("
            + "; ".join(f"{speed.reader}: {speed.name}" for speed in speeds)
            + "): install one, or set video.reader to see what is wrong with it"
        )
    rivals = [speed for speed in usable if speed.read_s] or usable
    clips = [clip for clip in rivals[0].read_s if all(clip in speed.read_s for speed in rivals)]
    best = rivals[0]
    for speed in rivals[1:] if clips else []:
        if speed.clip_s(clips) < (1 - EQUAL_FRAC) * best.clip_s(clips):
            best = speed
    return best, clips


def _measured(config: VideoConfig, clips: Sequence[ClipRequest], limit_s: float) -> Speed:
    settings = WorkerSettings(open_reader, config, gpu_index(config))
    slots = [WorkerSlot(settings, None) for _ in range(max(1, num_processes(config)))]
    lock, left, read_s = threading.Lock(), iter(clips), dict[ClipRequest, float]()

    def next_clip() -> ClipRequest | None:
        with lock:
            return next(left, None)

    def read_until_closed(slot: WorkerSlot) -> None:
        while (clip := next_clip()) is not None:
            try:
                read_s[clip] = slot.read(replace(clip, config=config))[1]
            except SampleError:  # quarantined when the run comes to it
                continue
            except RuntimeError:  # the time is up, or the reader cannot go on
                return

    # Processes end with the thread that started them, so all is done in the same few.
    with ThreadPoolExecutor(len(slots), "measure-reader") as pool:
        try:
            for ready in [pool.submit(slot.make_ready) for slot in slots]:
                ready.result()
            timer = threading.Timer(limit_s, lambda: [slot.close() for slot in slots])
            timer.start()
            list(pool.map(read_until_closed, slots))
            timer.cancel()
            return Speed(config.reader, slots[0].reader_name, len(slots), read_s)
        except RuntimeError as error:
            return Speed(config.reader, str(error), 0, {})
        finally:
            for slot in slots:
                slot.end()


def _warmed(clips: Sequence[ClipRequest], limit_s: float) -> list[ClipRequest]:
    """The clips whose files could be read through in time, the first one always."""
    deadline, warmed = time.monotonic() + limit_s, list(clips[:1])
    for clip in clips:
        if time.monotonic() > deadline:
            break
        with contextlib.suppress(OSError):  # a folder of images, or a file that is not there
            Path(clip.path).read_bytes()
        if clip not in warmed:
            warmed.append(clip)
    return warmed


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Threads and processes that this thread starts meanwhile stay on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
