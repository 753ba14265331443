"""Decoded clips, and what the frozen vision tower made of them, kept in memory and on disk under content keys.

`video/loader.py` asks here before it decodes. The store itself knows nothing of video: named tensors and some text go
in under a key and come out bit for bit, or not at all. Letters: F frames, H W pixels.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch

from vcr1_fast.types import Frames, SampleError
from vcr1_fast.video.cache_disk import TOUCH_AFTER_S, DiskTier, Entry
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.formats import QWEN2_5_VL

# Raise it when the same request gives other pixels or times: after a change of sampling, sizes, resizing or readers.
CACHE_FORMAT = 1
PIXEL_FIELDS = ("fps", "min_frames", "max_frames", "total_pixels", "min_frame_pixels", "max_frame_pixels")
IMAGE_FIELDS = ("min_image_pixels", "max_image_pixels")  # matter for images alone
FOLDER_FIELDS = ("image_folder_fps",)  # matter only where the video is a folder of images


def clip_key(request: ClipRequest, reader_name: str) -> str:
    """40 hex digits that differ whenever the frames may: of the file, the part, evidence, settings, reader and torch.

    The file counts by real path, size and time of change (a folder: by those of its files), not by its bytes, which
    would have to be read. torch is in it because it resizes the frames. Raises SampleError for a file that is not
    there.
    """
    try:
        path = os.path.realpath(request.path)
        status = os.stat(path)
        is_folder = stat.S_ISDIR(status.st_mode)
        identity = _folder_identity(path) if is_folder else [status.st_size, status.st_mtime_ns]
    except FileNotFoundError as error:
        raise SampleError(request.path, "no such file; check data.video_root and the annotation") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise SampleError(request.path, f"the file cannot be opened: {error}") from error
    names = IMAGE_FIELDS if request.is_image else PIXEL_FIELDS + FOLDER_FIELDS * is_folder
    settings = [float(getattr(request.config, name)) for name in names]
    part = [float(request.start_s), float(request.end_s), request.num_images, *request.evidence_s]
    size = [request.factor_px] if request.factor_px != QWEN2_5_VL.factor_px else []  # caches from before it stay valid
    return _digest(
        "image" if request.is_image else "clip",
        CACHE_FORMAT,
        torch.__version__,
        reader_name,
        path,
        identity,
        part,
        settings,
        *size,
    )


def tower_key(clip_key: str, tower_digest: str, dtype: torch.dtype) -> str:
    """Key of what a frozen vision tower makes of a clip. `tower_digest` names its weights, code and inputs."""
    return _digest("tower, times", CACHE_FORMAT, clip_key, tower_digest, str(dtype))


def _folder_identity(path: str) -> list[list[str | int]]:
    with os.scandir(path) as files:
        found = [(file.name, file.stat()) for file in files]
    return [[name, status.st_size, status.st_mtime_ns] for name, status in sorted(found, key=lambda item: item[0])]


def _digest(*parts: object) -> str:
    return blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


def frames_entry(frames: Frames) -> Entry:
    """`Frames` as an entry; `frames_of` gives them back exactly."""
    tensors = {"rgb_FHW3": frames.rgb_FHW3, "times_s": frames.times_s}
    text = {"sampled_fps": repr(frames.sampled_fps), "duration_s": repr(frames.duration_s), "reader": frames.reader}
    return Entry(tensors, text)


def frames_of(entry: Entry) -> Frames:
    """The `Frames` that `frames_entry` took; they share the entry's memory and must not be written to."""
    tensors, text = entry.tensors, entry.metadata
    return Frames(
        rgb_FHW3=tensors["rgb_FHW3"],
        times_s=tensors["times_s"],
        sampled_fps=float(text["sampled_fps"]),
        duration_s=float(text["duration_s"]),
        reader=text["reader"],
    )


@dataclass(slots=True)
class _Slot:
    entry: Entry
    touched_at: float  # time.monotonic() of the last time the disk was told of its use


class TensorCache:
    """Memory first, then disk; what is found on disk is kept in memory. Threads may share one object.

    Processes share the folder, each with a cache of its own. No failure of the disk and no damaged file is ever
    raised: at worst nothing is found, and after a failed write nothing more is written (one warning).
    """

    def __init__(self, folder: Path | None, ram_bytes: int, disk_bytes: int) -> None:
        """`folder` None or a budget of 0 leaves that tier out. An entry larger than a budget is not kept in it."""
        self.ram_bytes = ram_bytes
        self._disk = DiskTier(folder, disk_bytes) if folder is not None and disk_bytes > 0 else None
        self._ram: OrderedDict[str, _Slot] = OrderedDict()  # used longest ago first
        self._num_ram_bytes = self._num_ram_evicted = 0
        self._num_ram_hits = self._num_disk_hits = self._num_misses = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> Entry | None:
        """The entry, its tensors shared with everyone who gets it and therefore read-only, or None."""
        is_due, now = False, time.monotonic()
        with self._lock:
            slot = self._ram.get(key)
            if slot is not None:
                self._ram.move_to_end(key)
                self._num_ram_hits += 1
                is_due = now - slot.touched_at > TOUCH_AFTER_S
                if is_due:
                    slot.touched_at = now
        if slot is not None:
            if is_due and self._disk is not None:  # else what is used most would be dropped from the disk first
                self._disk.touch(key)
            return slot.entry
        entry = None if self._disk is None else self._disk.read(key)
        with self._lock:
            if entry is None:
                self._num_misses += 1
            else:
                self._num_disk_hits += 1
                self._keep(key, entry)
        return entry

    def has(self, key: str) -> bool:
        """Whether `get` would probably find it; reads nothing."""
        with self._lock:
            is_in_ram = key in self._ram
        return is_in_ram or (self._disk is not None and self._disk.has(key))

    def put(self, key: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        """Store under `key`. The memory of the tensors is kept, not copied: do not write to them afterwards.

        Views of something larger and tensors of a GPU are copied. No failure of the disk is raised.
        """
        entry = Entry({name: _own(tensor) for name, tensor in tensors.items()}, dict(metadata))
        with self._lock:
            self._keep(key, entry)
        if self._disk is not None:
            self._disk.write(key, entry)

    def metrics(self) -> dict[str, float]:
        """Counts and rates since the start. A tier's hit rate is of what it was asked for; without a tier, no rate."""
        with self._lock:
            num_ram, num_disk, num_missed = self._num_ram_hits, self._num_disk_hits, self._num_misses
            values = {
                "cache/hit_rate": _rate(num_ram + num_disk, num_missed),
                "cache/ram_bytes": float(self._num_ram_bytes),
                "cache/ram_entries": float(len(self._ram)),
                "cache/ram_evicted": float(self._num_ram_evicted),
                "cache/misses": float(num_missed),
            }
        if self.ram_bytes > 0:
            values["cache/ram_hit_rate"] = _rate(num_ram, num_disk + num_missed)
        if self._disk is not None:
            values["cache/disk_hit_rate"] = _rate(num_disk, num_missed)
            values["cache/disk_evicted"] = float(self._disk.num_evicted)
            values["cache/disk_is_off"] = float(self._disk.is_off)
            values["cache/healed"] = float(self._disk.num_healed)
            if self._disk.num_bytes is not None:
                values["cache/disk_bytes"] = float(self._disk.num_bytes)
        return values

    def close(self) -> None:
        """Let go of the memory. What is on disk stays."""
        with self._lock:
            self._ram.clear()
            self._num_ram_bytes = 0

    def _keep(self, key: str, entry: Entry) -> None:
        """Put into memory; the caller holds the lock."""
        if entry.num_bytes > self.ram_bytes:
            return
        old = self._ram.pop(key, None)
        self._num_ram_bytes += entry.num_bytes - (old.entry.num_bytes if old is not None else 0)
        self._ram[key] = _Slot(entry, time.monotonic())
        while self._num_ram_bytes > self.ram_bytes:
            _, dropped = self._ram.popitem(last=False)
            self._num_ram_bytes -= dropped.entry.num_bytes
            self._num_ram_evicted += 1


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, and not a part of something larger that it would keep alive."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _rate(num_hits: int, num_others: int) -> float:
    return num_hits / max(1, num_hits + num_others)
