"""Runs transformers' own video processors, of Qwen2-VL and Qwen3-VL: `python -m tests.video.processor_oracle IN
OUT`.

They need torchvision, which nothing else here may import; the caller puts it on PYTHONPATH. IN and OUT are
files of `torch.save`, see `Questions` and `Answers`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch


class Questions(TypedDict):
    """Settings are those of the processor: shortest_edge and longest_edge in pixels, max_video_tokens, and patch_size,
    which says whose it is."""

    sizes: list[tuple[int, int, int, dict[str, int]]]  # height, width, number of frames, settings
    samples: list[tuple[int, float, float]]  # frames of the file, their rate, wanted fps
    clips: Sequence[tuple[torch.Tensor, dict[str, int]]]  # [F, H, W, 3] uint8
    prompts: list[tuple[str, torch.Tensor, float, list[int]]]  # text, clip of the right size, its file's rate, indices
    images: Sequence[tuple[torch.Tensor, dict[str, int]]]  # [H, W, 3] uint8 and settings with patch_size


class Answers(TypedDict):
    version: str
    sizes: list[tuple[int, int]]
    samples: list[tuple[list[int], float]]  # indices, frames per second of what the model sees
    clips: list[tuple[torch.Tensor, list[int]]]  # pixel_values_videos, video_grid_thw
    images: list[tuple[torch.Tensor, list[int]]]  # pixel_values, image_grid_thw
    prompts: list[list[int]]  # token ids by Qwen3-VL's processor


TOKENIZER = Path(__file__).parents[2] / "vcr1_fast" / "tiny"
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
def make_processor(
    shortest_edge: int = 0, longest_edge: int = 0, max_video_tokens: int = 0, patch_size: int = 14
) -> Any:
    """Without edges one that leaves sizes alone. max_video_tokens 0: Qwen3-VL's own rule, of the whole video alone."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    processor = Qwen2VLVideoProcessor if patch_size == 14 else Qwen3VLVideoProcessor
    if not shortest_edge:
        return processor(do_resize=False, do_sample_frames=False, cap_pixels_per_frame=True)
    more = {"size": {"shortest_edge": shortest_edge, "longest_edge": longest_edge}, "do_sample_frames": False}
    if max_video_tokens:
        more |= {"max_video_tokens": max_video_tokens}
    return processor(**more, cap_pixels_per_frame=bool(max_video_tokens))


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
        of_call = {"temporal_factor": 2, "cap_pixels_per_frame": processor.cap_pixels_per_frame}
        processor.resize(video, processor.size, resample=None, factor=2 * processor.patch_size, **of_call)
    base.resize = original
    return answers


def samples(questions: list[tuple[int, float, float]]) -> list[tuple[list[int], float]]:
    from transformers.video_utils import VideoMetadata

    processor, answers = make_processor(), []
    for num_native, rate, wanted_fps in questions:
        metadata = VideoMetadata(total_num_frames=num_native, fps=rate)
        indices = processor.sample_frames(metadata, fps=wanted_fps, min_frames=4, max_frames=768)
        metadata.frames_indices = indices.tolist()
        answers.append((indices.tolist(), metadata.sampled_fps))
    return answers


def process(rgb_FHW3: torch.Tensor, settings: dict[str, int]) -> tuple[torch.Tensor, list[int]]:
    out = make_processor(**settings)(videos=[rgb_FHW3.permute(0, 3, 1, 2)], return_tensors="pt")
    return out["pixel_values_videos"], out["video_grid_thw"][0].tolist()


def process_image(rgb_HW3: torch.Tensor, settings: dict[str, int]) -> tuple[torch.Tensor, list[int]]:
    """Qwen3-VL has the image processor of Qwen2-VL, with other means and patches."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    edges = {name: settings[name] for name in ("shortest_edge", "longest_edge")}
    more = {} if settings["patch_size"] == 14 else {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = Qwen2VLImageProcessor(size=edges, patch_size=settings["patch_size"], **more)
    out = processor(images=[rgb_HW3.permute(2, 0, 1)], return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"][0].tolist()


def token_ids(text: str, rgb_FHW3: torch.Tensor, fps: float, indices: list[int]) -> list[int]:
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    processor = Qwen3VLProcessor(Qwen2VLImageProcessor(), tokenizer, make_processor(patch_size=16))
    metadata = VideoMetadata(total_num_frames=max(indices) + 1, fps=fps, frames_indices=indices)
    out = processor(text=[text], videos=[rgb_FHW3.permute(0, 3, 1, 2)], video_metadata=[metadata])
    return list(out["input_ids"][0])


def main() -> None:
    questions: Questions = torch.load(sys.argv[1])
    define_missing_ops()
    import torchvision  # pyright: ignore[reportMissingImports]

    answers: Answers = {
        "version": torchvision.__version__,
        "sizes": frame_sizes(questions["sizes"]),
        "samples": samples(questions["samples"]),
        "clips": [process(*clip) for clip in questions["clips"]],
        "images": [process_image(*image) for image in questions["images"]],
        "prompts": [token_ids(*prompt) for prompt in questions["prompts"]],
    }
    torch.save(answers, sys.argv[2])


if __name__ == "__main__":
    main()
