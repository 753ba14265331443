"""NVIDIA DALI as a reader: NVDEC on a GPU, its own FFmpeg (VP8, VP9, MJPEG) on the CPU; see DaliReader.

path -> inspect (PyAV: times, colour, turn, damage) -> file and frame indices -> DALI: decode, resize -> colour matrix,
turn -> check -> rgb on the device. DALI itself knows no presentation times, turns no frame, takes every colour matrix
for BT.601 and tells nobody about damage; each of these is dealt with here, or the file is refused by name.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.dali_codecs import proven_codecs, unavailable_reason, version
from vcr1_fast.video.dali_cut import copy_of
from vcr1_fast.video.dali_pipeline import DecodeError, Device, Job, Pipeline
from vcr1_fast.video.dali_track import Track, inspect, refusal, to_displayed
from vcr1_fast.video.gpu_decoding import MAX_DECODED_BYTES
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.reader import Probe, UnsuitedError, require_video_file
from vcr1_fast.video.resolution import resize_frame

MAX_TRACKS = 64  # inspected files remembered between probe and read

# Levels of 255. A frame of one colour is right where FFmpeg's is as flat and of about that colour (BT.709: 20 off,
# see `to_displayed`); a copy is right where FFmpeg's two frames are the same too, up to what a resize rounds away.
MAX_FLAT_DEVIATION, MAX_FLAT_DIFFERENCE, MAX_COPY_DIFFERENCE = 2.0, 24.0, 0.5


class DaliReader:
    """Any number of threads may share one; they decode one after the other, on the current GPU.

    Of damage it finds: cut files, missing packets, zeroed blocks, overwritten packet starts, changes of the picture
    size, MP4 and AVI whose header lists other frames than are there, Matroska that skips bytes, frames that come out
    as one colour or as a copy of another (these are compared with FFmpeg's). Not found: bits changed inside one
    packet. FFmpeg sees some of those (see pyav_reader); set video.reader to pyav for files you do not trust.
    """

    def __init__(self, config: VideoConfig, device: Device) -> None:
        """Raises ModuleNotFoundError when DALI is not installed, RuntimeError when it cannot decode on `device`."""
        reason = unavailable_reason(device)
        if reason is not None:
            kind = ModuleNotFoundError if version() is None else RuntimeError
            raise kind(f"video.reader is dali, but {reason}; set video.reader to pyav")
        self.device: Device = device
        self.codecs = proven_codecs(device)
        self.name = f"dali {version()} {device} {'+'.join(self.codecs)}"
        self._ffmpeg = PyavReader(config.max_source_pixels)
        self._lock, self._decoding = threading.Lock(), threading.Lock()
        self._pipelines: dict[bool, Pipeline] = {}  # by whether they resize
        self._tracks: OrderedDict[tuple[str, int, int], Track] = OrderedDict()

    def probe(self, path: str) -> Probe:
        """See `Reader.probe`. Reads through the file once and decodes one frame of it, with FFmpeg."""
        track = self._track(path)
        reason = refusal(track, self.device, self.codecs)
        if reason is not None:
            reason = f"DALI cannot decode it on the {self.device}: {reason}; set video.reader to pyav"
            raise UnsuitedError(path, reason, track.probe)
        if track.damage is not None:
            raise SampleError(path, f"is damaged: a packet of it {track.damage}; fetch it again")
        return track.probe

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        """See `Reader.read`."""
        track = self._track(probe.path)
        for part in self._parts(track, frame_indices):
            yield from self._decode(probe, track, part, None).numpy()

    def read_frames(self, probe: Probe, frame_indices: Sequence[int], height_px: int, width_px: int) -> torch.Tensor:
        """Upright rgb_FHW3 [F, height_px, width_px, 3] uint8 on the CPU, resized where they were decoded (bicubic,
        antialias), one per index. Raises SampleError.
        """
        track = self._track(probe.path)
        parts = [self._decode(probe, track, p, (height_px, width_px)) for p in self._parts(track, frame_indices)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self) -> None:
        """Free the pipelines, and with them the decoders and buffers on the device."""
        with self._lock, self._decoding:
            self._pipelines.clear()
            self._tracks.clear()

    def _parts(self, track: Track, frame_indices: Sequence[int]) -> list[Sequence[int]]:
        """Runs of indices whose full-size frames fit into MAX_DECODED_BYTES."""
        num_frames = max(1, MAX_DECODED_BYTES // track.frame_bytes)
        return [frame_indices[i : i + num_frames] for i in range(0, len(frame_indices), num_frames)]

    def _decode(
        self, probe: Probe, track: Track, frame_indices: Sequence[int], size_px: tuple[int, int] | None
    ) -> torch.Tensor:
        job, is_resized = self._job(track, frame_indices, size_px), size_px is not None
        try:
            with self._decoding:
                if is_resized not in self._pipelines:
                    self._pipelines[is_resized] = Pipeline(self.device, is_resized=is_resized)
                rgb_FHW3 = self._pipelines[is_resized].decode(job)
        except DecodeError as error:
            raise SampleError(
                probe.path, f"cannot be decoded, it is damaged or cut short (DALI says: {error})"
            ) from error
        return self._checked(probe, track, job, rgb_FHW3, frame_indices)

    def _job(self, track: Track, frame_indices: Sequence[int], size_px: tuple[int, int] | None) -> Job:
        """`size_px` as displayed, None: as decoded. Each frame once: DALI starts from the first frame for a repetition.

        Raises SampleError when the file is gone or was changed.
        """
        is_transposed, _, _ = track.turn
        stored_px = (size_px[1], size_px[0]) if size_px and is_transposed else size_px
        indices_F = np.unique(np.asarray(frame_indices, np.int32))
        path, ticks = track.probe.path, track.probe.ticks
        cut = None if track.entries is None or ticks is None else track.entries.cut(ticks[indices_F])
        if cut is not None:
            with self._ffmpeg.open(path) as (container, stream):
                return Job(copy_of(cut, container, stream), cut.indices_F, stored_px)
        try:
            return Job(np.fromfile(path, np.uint8), indices_F, stored_px)
        except OSError as error:
            raise SampleError(path, f"the file cannot be opened: {error}") from error

    def _checked(
        self, probe: Probe, track: Track, job: Job, stored_FHW3: torch.Tensor, frame_indices: Sequence[int]
    ) -> torch.Tensor:
        """What DALI gave, in the right colours and upright. Raises SampleError where a frame is not there."""
        distinct = np.unique(frame_indices)
        wanted = (len(distinct), *(job.size_px or track.stored_size_px), 3)
        if tuple(stored_FHW3.shape) != wanted:
            raise SampleError(
                probe.path,
                f"DALI gave frames of shape {tuple(stored_FHW3.shape)}, wanted {wanted}; set video.reader to pyav",
            )
        rgb_FHW3 = to_displayed(stored_FHW3, track)
        if len(distinct) != len(frame_indices):
            places_F = np.searchsorted(distinct, np.asarray(frame_indices))
            rgb_FHW3 = rgb_FHW3[torch.from_numpy(places_F).to(rgb_FHW3.device)]
        self._require_real(probe, rgb_FHW3, frame_indices)
        return rgb_FHW3.cpu()

    def _require_real(self, probe: Probe, rgb_FHW3: torch.Tensor, frame_indices: Sequence[int]) -> None:
        """Raise SampleError unless frames that look like none at all look so in FFmpeg's eyes too."""
        flat, copy = _suspects(rgb_FHW3, frame_indices)
        places = sorted({*flat, *(() if copy is None else (copy - 1, copy))})
        if not places:
            return
        height_px, width_px = rgb_FHW3.shape[1:3]
        frames = self._ffmpeg.read(probe, [frame_indices[i] for i in places])
        right = {
            i: resize_frame(torch.from_numpy(rgb_HW3), height_px, width_px).float()
            for i, rgb_HW3 in zip(places, frames, strict=True)
        }
        for i in flat:
            is_flat = (right[i] - right[i].mean((0, 1))).abs().mean() <= MAX_FLAT_DEVIATION
            is_near = (right[i] - rgb_FHW3[i].cpu().float()).abs().mean() <= MAX_FLAT_DIFFERENCE
            if not (is_flat and is_near):
                raise _missing(probe, frame_indices[i], "a frame of one colour")
        if copy is not None and (right[copy] - right[copy - 1]).abs().mean() > MAX_COPY_DIFFERENCE:
            raise _missing(probe, frame_indices[copy], "a copy of the frame before it")

    def _track(self, path: str) -> Track:
        require_video_file(path)
        status = os.stat(path)
        key = (path, status.st_size, status.st_mtime_ns)
        with self._lock:
            if key in self._tracks:
                self._tracks.move_to_end(key)
                return self._tracks[key]
        track = inspect(path, self._ffmpeg)
        with self._lock:
            self._tracks[key] = track
            while len(self._tracks) > MAX_TRACKS:
                self._tracks.popitem(last=False)
        return track


def _suspects(rgb_FHW3: torch.Tensor, frame_indices: Sequence[int]) -> tuple[list[int], int | None]:
    """(places of frames of one colour, place of the last frame that is a copy of the one before): may be none at all.

    Where DALI cannot decode a frame its buffer stays black, or keeps what it held before.
    """
    flat_FN = rgb_FHW3.flatten(1)
    is_flat_F = flat_FN.amin(1) == flat_FN.amax(1)
    is_copy_F = torch.zeros_like(is_flat_F)
    is_copy_F[1:] = (flat_FN[1:] == flat_FN[:-1]).all(1)
    copies = [i for i in is_copy_F.nonzero().flatten().tolist() if frame_indices[i] != frame_indices[i - 1]]
    return is_flat_F.nonzero().flatten().tolist(), copies[-1] if copies else None


def _missing(probe: Probe, index: int, what: str) -> SampleError:
    return SampleError(
        probe.path,
        f"DALI gave {what} for the picture at {probe.times_s[index]:.2f} s, FFmpeg another one; the file is damaged, "
        "or set video.reader to pyav",
    )
