"""Runs transformers' own Qwen2-VL video processor, alone: `python -m tests.video.processor_oracle IN OUT`.

That processor needs torchvision, which nothing else here may import; the caller puts it on PYTHONPATH. IN and OUT are
files of `torch.save`, see `Questions` and `Answers`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, TypedDict

import torch


class Questions(TypedDict):
    """Settings are those of the processor: shortest_edge and longest_edge in pixels, max_video_tokens."""

    sizes: list[tuple[int, int, int, dict[str, int]]]  # height, width, number of frames, settings
    samples: list[tuple[int, float, float, int, int]]  # frames of the file, their rate, wanted fps, min and max frames
    clips: Sequence[tuple[torch.Tensor, dict[str, int] | None]]  # [F, H, W, 3] uint8; None: already of the right size
    resizes: list[tuple[torch.Tensor, tuple[int, int]]]  # [F, H, W, 3] uint8, to (height, width)


class Answers(TypedDict):
    version: str
    sizes: list[tuple[int, int]]
    samples: list[tuple[list[int], float]]  # indices, frames per second of what the model sees
    clips: list[tuple[torch.Tensor, list[int]]]  # pixel_values_videos, video_grid_thw
    resizes: list[torch.Tensor]  # by torchvision.transforms.functional.resize, as qwen-vl-utils does it


KEPT: list[torch.library.Library] = []  # operators go when the object that defined them goes


def define_missing_ops() -> None:
    """Declare the two operators that torchvision annotates on import, where its compiled half does not load.

    The wheels are built for CUDA. Resizing is done by torch; nms and qnms are never called.
    """
    try:
        import torchvision  # noqa: F401 # pyright: ignore[reportMissingImports]
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


@functools.cache
def make_processor(shortest_edge: int = 0, longest_edge: int = 0, max_video_tokens: int = 0) -> Any:
    """Without arguments one that leaves sizes alone."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    if not shortest_edge:
        return Qwen2VLVideoProcessor(do_resize=False, cap_pixels_per_frame=True)
    edges = {"shortest_edge": shortest_edge, "longest_edge": longest_edge}
    return Qwen2VLVideoProcessor(size=edges, max_video_tokens=max_video_tokens, cap_pixels_per_frame=True)


def frame_sizes(questions: list[tuple[int, int, int, dict[str, int]]]) -> list[tuple[int, int]]:
    """What the processor asks its base class to resize to; the pixels are not touched."""
    from transformers.video_processing_utils import BaseVideoProcessor

    answers: list[tuple[int, int]] = []

    def note_size(self: Any, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
        answers.append((size.height, size.width))
        return image

    base: Any = BaseVideoProcessor
    original, base.resize = base.resize, note_size
    for height, width, num_frames, settings in questions:
        video = torch.empty(1, dtype=torch.uint8).expand(1, num_frames, 3, height, width)
        processor = make_processor(**settings)
        processor.resize(video, processor.size, resample=None, factor=28, temporal_factor=2, cap_pixels_per_frame=True)
    base.resize = original
    return answers


def samples(questions: list[tuple[int, float, float, int, int]]) -> list[tuple[list[int], float]]:
    from transformers.video_utils import VideoMetadata

    processor, answers = make_processor(), []
    for num_native, rate, wanted_fps, min_frames, max_frames in questions:
        metadata = VideoMetadata(total_num_frames=num_native, fps=rate)
        indices = processor.sample_frames(metadata, fps=wanted_fps, min_frames=min_frames, max_frames=max_frames)
        metadata.frames_indices = indices.tolist()
        answers.append((indices.tolist(), metadata.sampled_fps))
    return answers


def process(rgb_FHW3: torch.Tensor, settings: dict[str, int] | None) -> tuple[torch.Tensor, list[int]]:
    out = make_processor(**(settings or {}))(videos=[rgb_FHW3.permute(0, 3, 1, 2)], return_tensors="pt")
    return out["pixel_values_videos"], out["video_grid_thw"][0].tolist()


def resize(rgb_FHW3: torch.Tensor, size_px: tuple[int, int]) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode, functional  # pyright: ignore[reportMissingImports]

    rgb_F3HW = rgb_FHW3.permute(0, 3, 1, 2)
    resized = functional.resize(rgb_F3HW, list(size_px), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized.permute(0, 2, 3, 1)


def main() -> None:
    questions: Questions = torch.load(sys.argv[1])
    define_missing_ops()
    import torchvision  # pyright: ignore[reportMissingImports]

    answers: Answers = {
        "version": torchvision.__version__,
        "sizes": frame_sizes(questions["sizes"]),
        "samples": samples(questions["samples"]),
        "clips": [process(*clip) for clip in questions["clips"]],
        "resizes": [resize(*question) for question in questions["resizes"]],
    }
    torch.save(answers, sys.argv[2])


if __name__ == "__main__":
    main()
