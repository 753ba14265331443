"""The ways from a video file to the patches of the vision tower that `python -m bench decode` compares.

Ours: `read_clip` with each reader, the uint8 frames to the device, patches made there; the same from the cache and
through worker processes. Theirs, after qwen-vl-utils 0.0.14 and transformers: decord gives all sampled frames at once,
the whole clip is resized, then float32 values are made on the CPU and go to the device. Two processors do that:

per frame  each frame back to a picture, a second resize to the size it has, rescaled and normalised by numpy (the slow
           processor of transformers 4.50, which VideoChat-R1 pins)
batched    all frames in one tensor operation (the video processor of transformers 5)

Shape letters: F frames, H W pixels, P patches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from vcr1_kernels.reference import CLIP_MEAN, CLIP_STD, PATCH_PX

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import Frames
from vcr1_fast.video.cache import TensorCache
from vcr1_fast.video.clip import ClipRequest, read_clip
from vcr1_fast.video.gpu_decoding import GPU_READERS
from vcr1_fast.video.loader import FrameLoader
from vcr1_fast.video.patches import to_patches
from vcr1_fast.video.read import open_reader
from vcr1_fast.video.resolution import frame_size_px

READERS = ("pyav", "decord", "torchcodec", "torchcodec_cuda", "dali")
NUM_WORKERS = 2
CLIPS_PER_WORKER = 4  # in one timed batch
MAX_MEAN_LEVELS = 0.4  # of 255: theirs is resized in float32, which changes 0.1 to 0.3 on average
MAX_MEAN_LEVELS_DALI = 2.5  # it interpolates chroma in another way: 1.0 to 1.4 measured on CPU; NVDEC is untried
CACHE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Clip:
    """A file, how it shall be seen, and the device that wants it."""

    request: ClipRequest
    frames: Frames  # as the plain reader gives them
    device: torch.device
    scratch: Path  # a folder for this clip only

    @property
    def uint8_bytes(self) -> int:
        return self.frames.rgb_FHW3.nbytes

    def patches(self, frames: Frames) -> Tensor:
        """The last step of ours: bytes to the device, [P, 1176] float32 made there."""
        return to_patches(frames, torch.float32, self.device).values_PC


@dataclass(frozen=True)
class ClipWay:
    """One way to the patches of a clip."""

    name: str
    decoder: str  # name and version
    run: Callable[[], Tensor]  # -> [P, 1176] float32 on the device, of (the last) one clip
    gpu_bytes: int  # sent to the device for one clip
    floor: str | None = "decode"  # what it cannot be faster than: "decode" every source frame, "copy" the cached bytes
    max_mean_levels: float = MAX_MEAN_LEVELS
    num_clips: int = 1  # that one call of `run` reads


Opener = Callable[[Clip, ExitStack], ClipWay]  # raises what says why the way is absent; the stack closes what it opened


def openers(*, has_workers: bool) -> dict[str, Opener]:
    """All ways by name, the plain one first. Worker processes take seconds to start, so not every point has them."""
    ways: dict[str, Opener] = {f"ours, {name}": partial(open_reader_way, name) for name in READERS}
    if has_workers:
        ways["ours, workers"] = open_workers_way
    ways["ours, disk cache"] = partial(open_cached_way, "disk")
    ways["ours, RAM cache"] = partial(open_cached_way, "ram")
    ways["qwen-vl-utils, per frame"] = partial(open_qwen_way, per_frame_patches)
    ways["qwen-vl-utils, batched"] = partial(open_qwen_way, batched_patches)
    return ways


def open_reader_way(name: str, clip: Clip, stack: ExitStack) -> ClipWay:
    """One of our readers, in a thread of `FrameLoader`, or in a process of it where a GPU decodes.

    Raises RuntimeError when `open_reader` gives another one.

    As a run has it: torch gets one thread to resize with. With two, libgomp's second thread spins between the frames:
    275 ms of CPU instead of 136 for a clip of 320 x 240 and 10 s.
    """
    config = replace(clip.request.config, reader=name, num_workers=0)
    loader = open_loader(clip, stack, config, open_reader=open_reader)
    if not loader.name.startswith(name):
        raise RuntimeError(f"open_reader gave {loader.name}")
    request = replace(clip.request, config=config)
    return ClipWay(
        name=f"ours, {name}",
        decoder=loader.name,
        run=lambda: clip.patches(loader.get(request)),
        gpu_bytes=bytes_to_device(name, clip),
        floor=None if is_nvdec(name, clip) else "decode",  # NVDEC is no CPU decoder
        max_mean_levels=MAX_MEAN_LEVELS_DALI if name in GPU_READERS else MAX_MEAN_LEVELS,
    )


def open_loader(clip: Clip, stack: ExitStack, config: VideoConfig, **options: Any) -> FrameLoader:
    return stack.enter_context(closing(FrameLoader(config, pin_memory=clip.device.type == "cuda", **options)))


def is_nvdec(name: str, clip: Clip) -> bool:
    return name in GPU_READERS and clip.device.type == "cuda"


def bytes_to_device(name: str, clip: Clip) -> int:
    """Frames; NVDEC is sent the file, too, in the process where it works."""
    return clip.uint8_bytes + (os.path.getsize(clip.request.path) if is_nvdec(name, clip) else 0)


def open_workers_way(clip: Clip, stack: ExitStack) -> ClipWay:
    """Several files at once through the worker processes of `FrameLoader`, nothing kept."""
    config = replace(clip.request.config, reader="pyav", num_workers=NUM_WORKERS)
    loader = open_loader(clip, stack, config)
    requests = []
    for index in range(NUM_WORKERS * CLIPS_PER_WORKER):  # another name is another clip
        path = clip.scratch / f"{index}_{Path(clip.request.path).name}"
        os.link(clip.request.path, path)
        requests.append(replace(clip.request, path=str(path), config=config))

    def read_batch() -> Tensor:
        loader.prefetch(requests)
        return [clip.patches(loader.get(request)) for request in requests][-1]

    return ClipWay("ours, workers", loader.name, read_batch, clip.uint8_bytes, num_clips=len(requests))


def open_cached_way(tier: str, clip: Clip, stack: ExitStack) -> ClipWay:
    """A clip that the cache holds already: in memory ("ram"), or in a file of the page cache ("disk")."""
    in_ram = tier == "ram"
    store = TensorCache(None, CACHE_BYTES, 0) if in_ram else TensorCache(clip.scratch / "cache", 0, CACHE_BYTES)
    stack.callback(store.close)
    config = replace(clip.request.config, reader="pyav", num_workers=0)
    loader = open_loader(clip, stack, config, cache=store)
    request = replace(clip.request, config=config)
    loader.get(request)
    return ClipWay(
        name="ours, RAM cache" if in_ram else "ours, disk cache",
        decoder=loader.name,
        run=lambda: clip.patches(loader.get(request)),
        gpu_bytes=clip.uint8_bytes,
        floor="copy",
    )


def open_qwen_way(process: Callable[[Tensor], Tensor], clip: Clip, stack: ExitStack) -> ClipWay:
    """Their whole way: frames as float32, processed on the CPU, then sent."""
    del stack
    import decord  # absent from machines without x86-64

    processor = "per frame" if process is per_frame_patches else "batched"
    return ClipWay(
        name=f"qwen-vl-utils, {processor}",
        decoder=f"decord {decord.__version__}",
        run=lambda: process(qwen_frames(clip.request)).to(clip.device),
        gpu_bytes=4 * clip.uint8_bytes,
    )


def qwen_frames(request: ClipRequest) -> Tensor:
    """[F, 3, H, W] float32 in 0..255, as `fetch_video` of qwen-vl-utils makes them.

    n = N / rate * fps between min_frames and max_frames, down to an even number; indices evenly spaced over the N
    frames, rounded; the clip is resized as torchvision resizes uint8 tensors: bicubic with antialias in float32,
    clamped, rounded back to bytes.
    """
    import decord

    config, video = request.config, decord.VideoReader(request.path)
    num_native = len(video)
    num_frames = min(
        max(num_native / video.get_avg_fps() * config.fps, config.min_frames), config.max_frames, num_native
    )
    num_frames = math.floor(num_frames / 2) * 2
    indices = torch.linspace(0, num_native - 1, num_frames).round().long().tolist()
    rgb_F3HW = torch.tensor(video.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)
    height_px, width_px = rgb_F3HW.shape[2:]
    return resized(rgb_F3HW, frame_size_px(height_px, width_px, num_frames, config)).float()


def resized(rgb_F3HW: Tensor, size_px: tuple[int, int]) -> Tensor:
    """torchvision's resize of a uint8 tensor to (height, width), bicubic with antialias."""
    if tuple(rgb_F3HW.shape[2:]) == size_px:
        return rgb_F3HW
    values = F.interpolate(rgb_F3HW.float(), size=size_px, mode="bicubic", antialias=True)
    return values.clamp_(0, 255).round_().to(torch.uint8)


def batched_patches(values_F3HW: Tensor) -> Tensor:
    """[F, 3, H, W] float32 in 0..255 -> [P, 1176] float32: 255 x mean off, divided by 255 x std, all frames at once."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) * 255 for numbers in (CLIP_MEAN, CLIP_STD))
    return rows_of(values_F3HW.sub(mean).div_(std))


def per_frame_patches(values_F3HW: Tensor) -> Tensor:
    """The same, frame by frame through a picture and numpy: 1/255 in float64, then mean and std in float32."""
    from PIL import Image

    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    frames = []
    for frame_3HW in values_F3HW:
        picture = Image.fromarray(frame_3HW.permute(1, 2, 0).numpy().astype(np.uint8))
        rgb_HW3 = np.array(picture.resize(picture.size, Image.Resampling.BICUBIC))
        scaled_HW3 = (rgb_HW3.astype(np.float64) * (1 / 255)).astype(np.float32)
        frames.append(((scaled_HW3 - mean) / std).transpose(2, 0, 1))
    return rows_of(torch.from_numpy(np.stack(frames)))


def rows_of(values_F3HW: Tensor) -> Tensor:
    """[F even, 3, H, W] -> [P, 1176]: rows over frame pairs, 28 x 28 blocks and the 2 x 2 patches of a block."""
    num_frames, _, height_px, width_px = values_F3HW.shape
    blocks = values_F3HW.view(num_frames // 2, 2, 3, height_px // 28, 2, PATCH_PX, width_px // 28, 2, PATCH_PX)
    # pair, block row, block column, patch row, patch column, channel, frame, y, x
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * 2 * PATCH_PX**2)


def decode_everything(path: str) -> None:
    """What no reader can be faster than on this processor: FFmpeg through all source frames, none of them converted."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for packet in container.demux(stream):
            packet.decode()


def mean_levels(patches_PC: Tensor, expected_PC: Tensor) -> float:
    """Mean distance of two [P, 1176] in levels of 0..255. Raises ValueError for different shapes."""
    if patches_PC.shape != expected_PC.shape:
        raise ValueError(f"shapes differ: got {tuple(patches_PC.shape)}, wanted {tuple(expected_PC.shape)}")
    per_channel = (
        (patches_PC.cpu() - expected_PC.cpu()).abs_().view(len(patches_PC), 3, -1).mean((0, 2), dtype=torch.float64)
    )
    return float((per_channel * torch.tensor(CLIP_STD, dtype=torch.float64)).mean() * 255)


def read_plain(path: Path, config: VideoConfig) -> Frames:
    """What every way is compared with: PyAV in this process."""
    config = replace(config, reader="pyav")
    with closing(open_reader(config)) as reader:
        return read_clip(ClipRequest(str(path), config), reader)
