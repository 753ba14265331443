"""A real GRPOTrainer on a Qwen2.5-VL with pictures in its prompts: TRL's head and ours train the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vcr1_kernels.integrations import trl as vcr1_trl

from tests.kernels.integrations.trl_runs import Run, assert_same_training, grpo_trainer
from vcr1_fast.tiny.tokenizer import CHAT_TEMPLATE

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

SIZE_PX = 56  # 4 x 4 patches of 14 pixels, merged into 2 x 2 tokens


class PictureProcessor(Qwen2_5_VLProcessor):
    """The published one without videos, whose processor needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


@pytest.fixture
def processor(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PictureProcessor:
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.padding_side = "left"
    return PictureProcessor(Qwen2VLImageProcessorPil(), tokenizer, CHAT_TEMPLATE)


def picture_prompts(num_rows: int, num_pictures: int) -> Any:
    """Rows of random pictures, each with a question of another length."""
    noise = np.random.default_rng(0)
    pictures = noise.integers(0, 256, (num_rows, num_pictures, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    rows = [
        {
            "prompt": [{"role": "user", "content": "what is it" + "?" * index}],
            "images": [Image.fromarray(picture) for picture in row],
        }
        for index, row in enumerate(pictures)
    ]
    return datasets.Dataset.from_list(rows)


def build_trainer(model: Any, processor: PictureProcessor, data: Any, output: Path) -> Any:
    """Two optimizer steps of 2 prompts x 2 completions; the second is off-policy."""
    options = {"learning_rate": 0.01, "gradient_checkpointing": False}
    return grpo_trainer(model, output, data, {"processing_class": processor}, **options)


@pytest.mark.parametrize(("num_pictures", "keep"), [(1, "none"), (2, "probs")])
def test_two_steps_with_our_head_equal_two_steps_with_theirs(
    make_tiny_model: Callable[..., Any], processor: PictureProcessor, tmp_path: Path, num_pictures: int, keep: Any
):
    data = picture_prompts(8, num_pictures)
    theirs = Run(build_trainer(make_tiny_model(), processor, data, tmp_path))
    trainer = build_trainer(make_tiny_model(), processor, data, tmp_path)
    with vcr1_trl.use_fused_head(trainer, keep=keep) as head:
        ours = Run(trainer)
    assert_same_training(theirs, ours)
    losses = [[log["loss"] for log in run.logs[:2]] for run in (theirs, ours)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert theirs.moved("model.visual.patch_embed.proj.weight") > 0  # the pictures were trained on
    assert head.trl_calls == {} and head.fused_calls >= 2
