"""Clips read ahead of need, in processes that may hang or die: requests in, `Frames` or a `SampleError` out.

    prefetch(requests) -> queue -> threads, each with a `WorkerSlot` -> finished clips -> get(request)

The caller decides what comes next and in which order it is used; here is only decided when it is read. So what a run
sees is the same with any number of workers, and a resumed run needs nothing from here. Called by `prompts/stream`
(prefetch) and by the prompt builder (get).
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import Frames, SampleError
from vcr1_fast.video.cache import TensorCache, clip_key, frames_entry, frames_of
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.loader_worker import WorkerSettings, decode
from vcr1_fast.video.read import gpu_index, num_processes
from vcr1_fast.video.read import open_reader as open_configured_reader
from vcr1_fast.video.reader import Reader, ReaderError
from vcr1_fast.video.reader_process import WorkerSlot

NUM_THREADS = 4  # that read when there are no worker processes; decoding releases the interpreter lock
MAX_CLIPS = 4096  # named and not yet got; further hints are dropped
MAX_WAITING_BYTES = 2 << 30  # of clips read and not yet got, per rank
CLOSE_LIMIT_S = 10.0


@dataclass(eq=False, slots=True)
class _Clip:
    """One request on its way. All fields are guarded by the loader's lock."""

    request: ClipRequest
    place: int  # order in which clips were named
    num_wanted: int = 0  # how often it was named and not yet got
    num_getters: int = 0  # threads in `get` now
    state: str = "queued"  # queued, running, done
    started_at: float = 0.0  # time.monotonic()
    thread: threading.Thread | None = None  # that reads it
    result: Frames | SampleError | None = None

    @property
    def num_bytes(self) -> int:
        return self.result.rgb_FHW3.nbytes if isinstance(self.result, Frames) else 0


class FrameLoader:
    """Any number of threads may call it. With `config.num_workers` 0 threads of this process read, unless a GPU
    decodes: its memory there and its crashes are kept out of the process that trains.

    Nothing can kill a thread. One that takes longer than `config.timeout_s` over a clip that someone waits for, or that
    is in the way of it, is left to itself and another one takes its place; a decoder that crashes ends the run.
    """

    def __init__(
        self,
        config: VideoConfig,
        *,
        open_reader: Callable[[VideoConfig], Reader] = open_configured_reader,
        cache: TensorCache | None = None,
        pin_memory: bool = False,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        max_clips: int = MAX_CLIPS,
    ) -> None:
        """Nothing is started before the first clip is named, but for a worker that decodes on the current GPU: only it
        can say what it is. `open_reader` is a function of a module if there are workers, because they import it.
        `pin_memory`: pixels in page-locked memory, for copies to a GPU.

        Raises what `open_reader` raises, RuntimeError for what it raises in a worker.
        """
        self.config = config
        self._cache, self._pin_memory = cache, pin_memory
        self._max_waiting_bytes, self._max_clips = max_waiting_bytes, max_clips
        self.num_processes = num_processes(config)
        settings = WorkerSettings(open_reader, config, gpu_index(config))
        self._reader = open_reader(config) if settings.gpu_index is None else None
        name = None if self._reader is None else self._reader.name
        if self.num_processes > 0:
            pickle.dumps(settings)  # a lambda is refused here and not in a thread
            if self._reader is not None:
                self._reader.close()
            self._reader = None
        self._slots = [WorkerSlot(settings, name) for _ in range(self.num_processes)]
        self.name = name or self._slots[0].make_ready().reader_name
        self._changed = threading.Condition()
        self._clips: dict[ClipRequest, _Clip] = {}  # in the order in which they were named
        self._urgent: deque[_Clip] = deque()  # someone waits for these
        self._ahead: deque[_Clip] = deque()
        self._running: set[_Clip] = set()
        self._num_named = self._newest_got = self._waiting_bytes = self._num_given_up = 0
        self._threads: list[threading.Thread] = []
        self._failure: Exception | None = None
        self._is_closed = False
        self._counts: Counter[str] = Counter()
        self._seconds = {"decode_s": 0.0, "wait_s": 0.0}

    def start(self) -> None:
        """Start the workers now (1.5 s of importing torch, side by side) and not with the first clip."""
        with self._changed:
            if self._threads or self._is_closed:
                return
            self._threads = [self._start_thread(slot) for slot in self._slots or [None] * NUM_THREADS]

    def prefetch(self, requests: Sequence[ClipRequest]) -> None:
        """Say that these will be got, each as often as it is named here, in about this order. Never waits or raises.

        A clip read ahead is kept until it was got that often, or until one that was named `max_clips` later is got.
        """
        self.start()
        with self._changed:
            for request in requests:
                clip = self._clips.pop(request, None)
                if clip is not None:  # named again: it keeps its turn, and is kept for longer
                    self._clips[request] = clip
                    self._num_named += 1
                    clip.place = self._num_named
                elif not self._is_closed and len(self._clips) < self._max_clips:
                    clip = self._add(request)
                    self._ahead.append(clip)
                else:
                    continue
                clip.num_wanted += 1
            self._changed.notify_all()

    def get(self, request: ClipRequest) -> Frames:
        """The clip, read ahead or now. The pixels are shared with others who get it: do not write to them.

        Raises SampleError for a file that cannot be used, ReaderError when the workers do not start or the reader
        cannot go on.
        """
        self.start()
        asked_at = time.monotonic()
        with self._changed:
            clip = self._clips.get(request) or self._add(request)
            if clip.state == "queued" and clip.num_getters == 0:
                self._urgent.append(clip)  # and stays in `_ahead`, where it will be passed over
                self._changed.notify_all()
            clip.num_getters += 1
            try:
                self._wait_for(clip)
            finally:  # also on Ctrl-C
                self._seconds["wait_s"] += time.monotonic() - asked_at
                clip.num_getters -= 1
                clip.num_wanted = max(0, clip.num_wanted - 1)
                self._newest_got = max(self._newest_got, clip.place)
                self._drop_what_no_one_wants(clip)
            if clip.state != "done":
                raise ReaderError(str(self._failure or "the loader of videos was closed while a clip was waited for"))
            result = clip.result
        if isinstance(result, SampleError):  # anew, as threads must not share a traceback
            raise SampleError(result.source, result.reason)
        assert isinstance(result, Frames)
        return result

    def skip(self, request: ClipRequest) -> None:
        """Say that a clip that was named will not be got after all; one naming less. Without effect if it was not."""
        with self._changed:
            clip = self._clips.get(request)
            if clip is not None:
                clip.num_wanted = max(0, clip.num_wanted - 1)
                self._drop_what_no_one_wants(clip)

    def metrics(self) -> dict[str, float]:
        """Since the start. decode_s is the readers' seconds, wait_s those of all threads in `get`, both added up."""
        with self._changed:
            counts = {name: self._counts[name] for name in ("clips_read", "clips_refused", "cache_hits")}
            values = {**counts, **self._seconds, "waiting_bytes": self._waiting_bytes}
        values["timeouts"] = self._num_given_up + sum(slot.num_timeouts for slot in self._slots)
        values["crashes"] = sum(slot.num_crashes for slot in self._slots)
        values["workers_replaced"] = sum(slot.num_replaced for slot in self._slots)
        return {f"video/{name}": float(value) for name, value in values.items()}

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [slot.pid for slot in self._slots if slot.pid is not None]

    def close(self) -> None:
        """Kill the workers, whatever they do. Threads in `get` get a ReaderError."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for slot in self._slots:
            slot.close()
        for thread in [*self._threads]:
            thread.join(CLOSE_LIMIT_S)
        if not self._threads:  # a process that told its name, and was never asked for a clip
            for slot in self._slots:
                slot.end()
        if self._reader is not None:
            self._reader.close()
        with self._changed:
            self._clips.clear()
            self._waiting_bytes = 0

    def _add(self, request: ClipRequest) -> _Clip:
        self._num_named += 1
        clip = self._clips[request] = _Clip(request, self._num_named)
        return clip

    def _drop_what_no_one_wants(self, got: _Clip) -> None:
        """`got`, if it was got as often as it was named; and what was named so long before it that no one will come."""
        if got.num_wanted == 0 and got.num_getters == 0:
            self._drop(got)
        oldest_kept = self._newest_got - self._max_clips
        while self._clips:
            clip = next(iter(self._clips.values()))
            if clip.place > oldest_kept or clip.num_getters or clip.state == "running":
                break
            self._drop(clip)
        self._changed.notify_all()  # there may be room now

    def _drop(self, clip: _Clip) -> None:
        if self._clips.get(clip.request) is clip and clip.state != "running":
            del self._clips[clip.request]
            if clip.state == "done":
                self._waiting_bytes -= clip.num_bytes
            else:
                clip.state = "dropped"

    def _wait_for(self, clip: _Clip) -> None:
        """Until it is done or never will be; the caller holds the lock."""
        while True:
            look_again_s = self._give_up_overdue()
            if clip.state == "done" or self._failure is not None or self._is_closed:
                return
            self._changed.wait(look_again_s)

    def _give_up_overdue(self) -> float | None:
        """Give up what threads of this process read for too long; the caller holds the lock.

        Returns the seconds until it must be looked at again; None where workers read, who have their own time-out.
        """
        if self._slots:
            return None
        timeout_s, now = self.config.timeout_s, time.monotonic()
        for clip in [clip for clip in self._running if clip.started_at + timeout_s <= now]:
            assert clip.thread is not None
            self._threads.remove(clip.thread)  # it ends when its decoder comes back, if ever
            self._threads.append(self._start_thread(None))
            self._num_given_up += 1
            reason = f"{self.name} did not finish within {timeout_s:g} s (video.timeout_s)"
            self._finish(clip, SampleError(clip.request.path, reason), timeout_s, is_hit=False)
        # One that begins later is due later: half of the time is often enough to look.
        return min([timeout_s / 2, *(clip.started_at + timeout_s - now for clip in self._running)])

    def _start_thread(self, slot: WorkerSlot | None) -> threading.Thread:
        thread = threading.Thread(target=self._run, args=(slot,), name="read-video", daemon=True)
        thread.start()
        return thread

    # Below: the threads that read.

    def _run(self, slot: WorkerSlot | None) -> None:
        """Read clips until the loader is closed, in the process of `slot` or, without one, in this process."""
        # One torch thread each: an OpenMP team per reader would put libgomp above the number of cores, where it stops
        # spinning between operations and made the update of the tiny model twice as slow (0.35 s -> 0.8 s on 2 cores).
        torch.set_num_threads(1)
        try:
            while True:
                if slot is not None:
                    slot.make_ready()
                clip = self._take()
                if clip is None or not self._read(clip, self._read_here if slot is None else slot.read):
                    return
        except Exception as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()
        finally:
            if slot is not None:
                slot.end()

    def _read_here(self, request: ClipRequest) -> tuple[Frames, float]:
        assert self._reader is not None
        started = time.monotonic()
        frames = decode(request, self._reader)
        return frames, time.monotonic() - started

    def _take(self) -> _Clip | None:
        """The next clip to read, as soon as there is one and room for it; None when the loader is closed."""
        with self._changed:
            while not self._is_closed and self._failure is None:
                clip = self._next_clip()
                if clip is not None:
                    clip.state, clip.started_at, clip.thread = "running", time.monotonic(), threading.current_thread()
                    self._running.add(clip)
                    return clip
                self._changed.wait()
        return None

    def _next_clip(self) -> _Clip | None:
        for queue in (self._urgent, self._ahead):
            while queue and queue[0].state != "queued":  # read through the other queue, or dropped
                queue.popleft()
        if self._urgent:
            return self._urgent.popleft()
        return self._ahead.popleft() if self._ahead and self._has_room() else None

    def _has_room(self) -> bool:
        """For the next clip, with those being read, each of the largest size its settings allow. One is always read
        ahead."""
        needed_bytes = sum(clip.request.max_bytes for clip in (*self._running, self._ahead[0]))
        is_empty = self._waiting_bytes == 0 and not self._running
        return is_empty or self._waiting_bytes + needed_bytes <= self._max_waiting_bytes

    def _read(self, clip: _Clip, read: Callable[[ClipRequest], tuple[Frames, float]]) -> bool:
        """Have the clip come from the cache or from `read`, hand it out, and only then store it.

        False: it was given up meanwhile, and another thread has taken the place of this one.
        """
        key = entry = made = None
        read_s = 0.0
        try:
            if self._cache is not None:
                key = clip_key(clip.request, self.name)
                entry = self._cache.get(key)
            if entry is None:
                frames, read_s = read(clip.request)
                made = frames_entry(frames)
            else:
                frames = frames_of(entry)
            result = replace(frames, rgb_FHW3=frames.rgb_FHW3.pin_memory()) if self._pin_memory else frames
        except SampleError as error:
            result = error
        with self._changed:
            if clip not in self._running:
                return False
            self._finish(clip, result, read_s, is_hit=entry is not None)
        if self._cache is not None and key is not None and made is not None:
            self._cache.put(key, dict(made.tensors), dict(made.metadata))
        return True

    def _finish(self, clip: _Clip, result: Frames | SampleError, read_s: float, is_hit: bool) -> None:
        """The caller holds the lock."""
        self._running.remove(clip)
        clip.state, clip.result = "done", result
        self._waiting_bytes += clip.num_bytes
        self._seconds["decode_s"] += read_s
        self._counts["clips_read" if isinstance(result, Frames) else "clips_refused"] += 1
        self._counts["cache_hits"] += is_hit
        if clip.num_wanted == 0 and clip.num_getters == 0:  # who asked for it was interrupted
            self._drop(clip)
        self._changed.notify_all()
