"""The tiny model has the real architecture, runs with explicit positions, and can be saved and loaded."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vcr1_fast.tiny.architecture import tiny_config, untrained_model
from vcr1_fast.tiny.build import build_tiny, build_tiny_tokenizer
from vcr1_fast.tiny.cold_start import PACKAGE

GRID = (2, 4, 8)  # 2 frame pairs of 56 x 112 pixels: 16 tokens


def _inputs() -> dict[str, torch.Tensor]:
    tokenizer = build_tiny_tokenizer()
    text = "user\n<|vision_start|>" + "<|video_pad|>" * 16 + "<|vision_end|>assistant\n"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1).contiguous()
    pixels = torch.randn(64, 1176, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "position_ids": positions,
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([GRID]),
    }


def test_it_runs_with_explicit_positions_which_matter() -> None:
    model = untrained_model(tiny_config(build_tiny_tokenizer()), seed=0)
    inputs = _inputs()
    with torch.no_grad():
        logits = model(**inputs).logits
        stretched = model(**{**inputs, "position_ids": inputs["position_ids"] * 2}).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], len(build_tiny_tokenizer()))
    assert torch.isfinite(logits).all()
    assert (logits - stretched).abs().max() > 1e-3


def test_about_a_million_parameters_and_the_real_parts() -> None:
    config = tiny_config(build_tiny_tokenizer())
    model = untrained_model(config, seed=0)
    assert 1.0e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    assert config.vision_config.fullatt_block_indexes == [1, 3]
    assert config.text_config.num_key_value_heads < config.text_config.num_attention_heads
    assert config.video_token_id == build_tiny_tokenizer().convert_tokens_to_ids("<|video_pad|>")


def test_the_seed_decides_the_weights() -> None:
    config = tiny_config(build_tiny_tokenizer())
    first, again, other = (untrained_model(config, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_written_folder_loads_as_the_same_model(tmp_path: Path) -> None:
    build_tiny(tmp_path, seed=3)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    wanted = untrained_model(tiny_config(build_tiny_tokenizer()), seed=3)
    with torch.no_grad():
        assert torch.equal(model(**_inputs()).logits, wanted(**_inputs()).logits)
    assert len(tokenizer) == model.config.text_config.vocab_size
    assert (tmp_path / "model.safetensors").stat().st_size < 5_000_000


def test_its_settings_are_those_that_older_releases_of_transformers_read(tmp_path: Path) -> None:
    build_tiny(tmp_path)
    for folder in (tmp_path, PACKAGE):  # the packaged ones went through training and its export
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_theta"] == 30.0
        assert config["rope_scaling"] == {"type": "mrope", "mrope_section": [6, 5, 5]}
        assert not {"rope_parameters", "text_config"} & config.keys()
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "extra_special_tokens" not in tokenizer  # a list there is refused by 4.x
    read = Qwen2_5_VLConfig.from_pretrained(PACKAGE).get_text_config()
    assert read.rope_parameters["rope_theta"] == 30.0 and read.rope_parameters["mrope_section"] == [6, 5, 5]
