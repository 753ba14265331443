"""Frames to what the vision tower takes, and the one object that a run asks for it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from vcr1_kernels import patchify
from vcr1_kernels.backend import Backend

from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import Frames, MediaKind, Patches, SampleError
from vcr1_fast.video.cache import IMAGE_FIELDS, PIXEL_FIELDS, TensorCache, clip_key, tower_key
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.formats import FRAMES_PER_PATCH, QWEN2_5_VL, VideoFormat
from vcr1_fast.video.frozen_tower import FrozenTower
from vcr1_fast.video.loader import FrameLoader


class PatchSource:
    """A name in `Example.sources` -> `Patches`: decoded once, moved to the device as bytes, normalised there.

    With a frozen tower the patches go through it at once, and what it gives is kept beside the decoded clips: engine
    and learner then share it, and a clip seen before is not even decoded.
    """

    def __init__(
        self,
        loader: FrameLoader,
        cache: TensorCache,
        config: VideoConfig,
        device: torch.device,
        dtype: torch.dtype,
        tower: FrozenTower | None = None,
        kernels: KernelChoice | None = None,
        video_format: VideoFormat = QWEN2_5_VL,
    ) -> None:
        """`kernels`: what cuts frames into patches is read from it; None: by the device. `video_format`: as the model
        has it."""
        self.loader, self.cache, self.config = loader, cache, config
        self.device, self.dtype, self.tower, self.video_format = device, dtype, tower, video_format
        self._backend: Backend = (kernels or KernelChoice()).patchify_backend
        self._waited_s = 0.0  # at the last call of metrics

    def seen_as(self, video: VideoConfig) -> PatchSource:
        """The same readers, cache and tower for clips with the frames and sizes that `video` asks for. Not to be
        closed."""
        source = copy.copy(self)
        source.config = replace(self.config, **{name: getattr(video, name) for name in PIXEL_FIELDS + IMAGE_FIELDS})
        return source

    @property
    def name(self) -> str:
        """What decodes, with its version: a run's decoder identity."""
        return self.loader.name

    def describe(self) -> str:
        """For the line a run prints at its start."""
        readers = f"{self.loader.num_processes} workers" if self.loader.num_processes else "threads"
        kept = f", kept in {self.config.cache_dir}" if self.config.cache_dir else ""
        return f"{self.name} in {readers}{kept}{', frozen tower' if self.tower else ''}"

    def __call__(self, video: str) -> Patches:
        """Raises SampleError when the video cannot be used."""
        request = self._request(video)
        if self.tower is None:
            return self._patches(request, self.dtype, self.device)
        key = self._tower_key(request, self.tower)
        entry = self.cache.get(key)
        if entry is not None:
            self.loader.skip(request)  # it may have been named before another prompt of the same clip came by
            return _unpacked(entry.tensors["embeddings_MD"], entry.tensors["numbers"], self, _kind(request))
        patches = self._patches(request, self.tower.dtype, self.tower.device)
        embeddings_MD = self.tower.embed(patches)
        numbers = torch.tensor(
            [
                *(*patches.grid_thw, patches.second_per_grid_s, patches.num_frames, patches.duration_s),
                *patches.pair_times_s,
            ],
            dtype=torch.float64,
        )
        self.cache.put(key, {"embeddings_MD": embeddings_MD, "numbers": numbers}, {})
        return _unpacked(embeddings_MD, numbers, self, _kind(request))

    def prefetch(self, videos: Sequence[str]) -> None:
        """Have these clips read ahead; a hint, in the order in which they will be asked for.

        Not those of which embeddings are kept. A name that stands for nothing is left for `__call__` to refuse.
        """
        requests = []
        for video in videos:
            with contextlib.suppress(SampleError):
                request = self._request(video)
                if self.tower is None or not self.cache.has(self._tower_key(request, self.tower)):
                    requests.append(request)
        self.loader.prefetch(requests)

    def metrics(self) -> dict[str, float]:
        """Of loader and cache, this rank's, since the start; `time/video_wait_s`, since the last call.

        That one adds up the seconds of all threads that waited for a clip: the trainer waited that long at most.
        """
        values = self.loader.metrics() | self.cache.metrics()
        waited_s, self._waited_s = values["video/wait_s"] - self._waited_s, values["video/wait_s"]
        return values | {"time/video_wait_s": waited_s}

    def _request(self, video: str) -> ClipRequest:
        return ClipRequest.of(video, self.config, self.video_format.factor_px)

    def _patches(self, request: ClipRequest, dtype: torch.dtype, device: torch.device) -> Patches:
        patches = to_patches(self.loader.get(request), dtype, device, self._backend, self.video_format)
        return replace(patches, kind="image", second_per_grid_s=0.0, pair_times_s=()) if request.is_image else patches

    def _tower_key(self, request: ClipRequest, tower: FrozenTower) -> str:
        return tower_key(clip_key(request, self.name), tower.digest, tower.dtype)

    def close(self) -> None:
        """End the workers; what is on disk stays."""
        self.loader.close()
        self.cache.close()


def to_patches(
    frames: Frames,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    backend: Backend = "auto",
    video_format: VideoFormat = QWEN2_5_VL,
) -> Patches:
    """`Frames` [F, H, W, 3] -> `Patches` [P, C] in `dtype` on `device` (default: the frames'), see `patchify`.

    Frames cross to a GPU as bytes, half or a quarter of what patches would take. second_per_grid_s = 2 / sampled_fps,
    because two frames make one temporal step (Qwen2.5-VL).

    Nothing is waited for, and the caller may let go of the frames at once: torch keeps page-locked memory until a copy
    out of it has ended.
    """
    num_frames, height_px, width_px, _ = frames.rgb_FHW3.shape
    num_pairs = -(-num_frames // FRAMES_PER_PATCH)
    patch_px, scale = video_format.patch_px, {"mean": video_format.mean, "std": video_format.std}
    rgb_FHW3 = frames.rgb_FHW3.to(device, non_blocking=True)
    return Patches(
        values_PC=patchify(rgb_FHW3, dtype, patch_px=patch_px, **scale, backend=backend),
        grid_thw=(num_pairs, height_px // patch_px, width_px // patch_px),
        second_per_grid_s=FRAMES_PER_PATCH / frames.sampled_fps,
        num_frames=num_frames,
        duration_s=frames.duration_s,
        pair_times_s=_pair_times_s(frames.times_s),
    )


def _pair_times_s(times_s: torch.Tensor) -> tuple[float, ...]:
    """[F] seconds -> mean of each pair; a last frame without another is its own pair, as `patchify` has it."""
    if len(times_s) % FRAMES_PER_PATCH:
        times_s = torch.cat([times_s, times_s[-1:]])
    return tuple(times_s.view(-1, FRAMES_PER_PATCH).mean(dim=1).tolist())


def to_frames(patches: Patches, pairs: Sequence[int], video_format: VideoFormat = QWEN2_5_VL) -> torch.Tensor | None:
    """The first frame of each of these pairs again, as the vision tower sees it: [F, H, W, 3] uint8 on the CPU.

    None of a clip of which embeddings alone are kept. The inverse of `patchify`, whose docstring has the order.
    """
    if patches.embeddings_MD is not None:
        return None
    t, h, w = patches.grid_thw
    patch_px = video_format.patch_px
    values = patches.values_PC.view(t, h // 2, w // 2, 2, 2, 3, FRAMES_PER_PATCH, patch_px, patch_px)[list(pairs)]
    # pair, block row, block column, patch row, patch column, channel, y, x -> pair, row, column, channel
    frames = values[:, :, :, :, :, :, 0].permute(0, 1, 3, 6, 2, 4, 7, 5)
    rgb_FHW3 = frames.reshape(len(pairs), h * patch_px, w * patch_px, 3).float().cpu()
    rgb_FHW3 = rgb_FHW3 * torch.tensor(video_format.std) + torch.tensor(video_format.mean)
    return (rgb_FHW3 * 255).round().clamp(0, 255).to(torch.uint8)


def _kind(request: ClipRequest) -> MediaKind:
    return "image" if request.is_image else "video"


def _unpacked(embeddings_MD: torch.Tensor, numbers: torch.Tensor, source: PatchSource, kind: MediaKind) -> Patches:
    t, h, w, second_per_grid_s, num_frames, duration_s, *pair_times_s = numbers.tolist()
    return Patches(
        values_PC=torch.empty(0, source.video_format.patch_values, dtype=source.dtype, device=source.device),
        grid_thw=(int(t), int(h), int(w)),
        second_per_grid_s=second_per_grid_s,
        num_frames=int(num_frames),
        duration_s=duration_s,
        embeddings_MD=embeddings_MD.to(source.device),
        pair_times_s=tuple(pair_times_s),
        kind=kind,
    )
