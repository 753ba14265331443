"""The tiny models have the real architectures, and can be saved and loaded."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from vcr1_fast.run.model_folder import PACKAGED
from vcr1_fast.tiny.architecture import tiny_config, untrained_model
from vcr1_fast.tiny.build import build_tiny, build_tiny_tokenizer
from vcr1_fast.tiny.cold_start import TYPES
from vcr1_fast.video.formats import FORMATS

EVERY = pytest.mark.parametrize("model_type", FORMATS)


@EVERY
def test_about_a_million_parameters_and_the_real_parts(model_type: str) -> None:
    config = tiny_config(build_tiny_tokenizer(), model_type)
    model = untrained_model(config, seed=0)
    assert 1.0e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    if model_type == "qwen2_5_vl":
        assert config.vision_config.fullatt_block_indexes == [1, 3]
    else:
        assert len(config.vision_config.deepstack_visual_indexes) == 3
    assert config.text_config.num_key_value_heads < config.text_config.num_attention_heads
    assert config.video_token_id == build_tiny_tokenizer().convert_tokens_to_ids("<|video_pad|>")


@EVERY
def test_a_written_folder_loads_as_the_same_model(tmp_path: Path, model_type: str) -> None:
    build_tiny(tmp_path, seed=3, model_type=model_type)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    wanted = untrained_model(tiny_config(build_tiny_tokenizer(), model_type), seed=3)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in wanted.state_dict().items())
    assert len(tokenizer) == model.config.text_config.vocab_size
    assert (tmp_path / "model.safetensors").stat().st_size < 5_000_000


@pytest.mark.parametrize("name", TYPES)
def test_its_settings_are_those_that_older_releases_of_transformers_read(tmp_path: Path, name: str) -> None:
    build_tiny(tmp_path, model_type=TYPES[name])
    sections = {"type": "mrope", "mrope_section": [6, 5, 5]}
    if name == "tiny3":
        sections = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    for folder in (tmp_path, PACKAGED[name]):  # the packaged ones went through training and its export
        config = json.loads((folder / "config.json").read_text())
        text = config if name == "tiny" else config["text_config"]
        assert text["rope_theta"] == 30.0
        assert text["rope_scaling"] == sections
        assert "rope_parameters" not in text and ("text_config" in config) == (name == "tiny3")
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "extra_special_tokens" not in tokenizer  # a list there is refused by 4.x
    read = AutoConfig.from_pretrained(PACKAGED[name]).get_text_config()
    assert read.rope_parameters["rope_theta"] == 30.0 and read.rope_parameters["mrope_section"] == [6, 5, 5]
