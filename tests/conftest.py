"""Shared fixtures: a tokenizer and a random Qwen2.5-VL, both built in memory; `gpu` tests are skipped without CUDA."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

# Before anything imports triton (transformers may): without CUDA kernels run in its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A model.path such as models/x has the shape of an id of the Hub: no test may ask the real one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.learner.golden_case import TEXT, VISION
from vcr1_fast.prompts.positions import mrope_positions
from vcr1_fast.tiny.tokenizer import SPECIAL_TOKENS
from vcr1_fast.types import Example, IntervalTruth, Patches, Prompt

ModelFactory = Callable[..., Qwen2_5_VLForConditionalGeneration]

with contextlib.suppress(ImportError):  # a GPU machine may lack it, and runs other tests
    from hypothesis import HealthCheck, settings

    # Times say nothing on a machine that is shared, also that examples are slow to draw
    settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("shared")

# The models of the tests are too small to share out: two threads on two busy cores made a decode step 10 times slower.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    if "PYTEST_XDIST_WORKER" in os.environ:  # files are handed out in this order: a long one last would run alone
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _same_interrupts() -> Iterator[None]:
    """A command that ran in this process leaves it as a process that is about to end."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    yield
    signal.signal(signal.SIGINT, handler)
    sys.unraisablehook = hook


def build_tokenizer(special_tokens: Sequence[str] = SPECIAL_TOKENS) -> PreTrainedTokenizerFast:
    """One token per byte (ids 0-255), then the special tokens in the order given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special_tokens))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[Sequence[str]], PreTrainedTokenizerFast]:
    """make_tokenizer(special_tokens): for tests of a tokenizer that does not fit."""
    return build_tokenizer


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, tied: bool = False, head_scale: float = 1.0
) -> Qwen2_5_VLForConditionalGeneration:
    """3 decoder layers, 2 vision layers. Weights have std 1.5 / sqrt(fan_in), so that attention is far from uniform
    and a wrong position changes log-probs by tenths, not by 1e-6."""
    ids = tokenizer.get_vocab()
    text = TEXT | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 288}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
    text |= {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": None}
    config = Qwen2_5_VLConfig(
        text_config=text | {"tie_word_embeddings": tied},
        vision_config=VISION | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                noise = 0.1 * torch.randn(weight.shape, generator=generator)
                weight.copy_(noise + (1.0 if "norm" in name or "ln_q" in name else 0.0))
            else:
                fan_in = weight[0].numel()
                weight.copy_(1.5 / fan_in**0.5 * torch.randn(weight.shape, generator=generator))
        model.lm_head.weight.mul_(head_scale)
    return model


@pytest.fixture(scope="session")
def make_tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> ModelFactory:
    """make_tiny_model(seed=0, tied=False, head_scale=1.0): a fresh model."""
    return lambda **options: build_model(tiny_tokenizer, **options)


@pytest.fixture
def tiny_model(make_tiny_model: ModelFactory) -> Qwen2_5_VLForConditionalGeneration:
    return make_tiny_model()


def make_patches(
    grid_thw: tuple[int, int, int], second_per_grid_s: float = 1.0, seed: int = 0, num_values: int = 1176
) -> Patches:
    """Random patches, no video behind them."""
    t, h, w = grid_thw
    values = torch.randn(t * h * w, num_values, generator=torch.Generator().manual_seed(seed))
    return Patches(values, grid_thw, second_per_grid_s, 2 * t, t * second_per_grid_s)


def stock_inputs(prompt: Prompt, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a prompt shows as the stock model takes it: videos and images apart."""
    inputs: dict[str, Tensor] = {}
    for kind, values, grids in (
        ("video", "pixel_values_videos", "video_grid_thw"),
        ("image", "pixel_values", "image_grid_thw"),
    ):
        media = [patches for patches in prompt.media if patches.kind == kind]
        if media:
            inputs[values] = torch.cat([patches.values_PC for patches in media]).to(dtype)
            inputs[grids] = torch.tensor([patches.grid_thw for patches in media])
    return inputs


def make_example(example_id: str = "e", query: str = "a ball rolls", **changes: object) -> Example:
    fields = {
        "task": "echo",
        "video": f"/videos/{example_id}.mp4",
        "query": query,
        "duration_s": 8.0,
        "truth": IntervalTruth(((1.0, 2.0),)),
    }
    return Example(id=example_id, **{**fields, **changes})


@pytest.fixture(scope="session")
def make_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Prompt]:
    """make_prompt(grid, text, second_per_grid_s=1.0, seed=0): a Prompt with random patches."""

    def make(grid: tuple[int, int, int], text: str, second_per_grid_s: float = 1.0, seed: int = 0) -> Prompt:
        patches = make_patches(grid, second_per_grid_s, seed)
        video = "<|vision_start|>" + "<|video_pad|>" * patches.num_tokens + "<|vision_end|>"
        ids = torch.tensor(tiny_tokenizer(text + video + "\n>")["input_ids"])
        pad_id = tiny_tokenizer.get_vocab()["<|video_pad|>"]
        positions = mrope_positions(ids, [grid], [second_per_grid_s], pad_id, 2)
        return Prompt(make_example(f"{text}:{seed}"), ids, positions, (patches,))

    return make
