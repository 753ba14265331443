"""What an engine takes of a GPU, by hand; contract_checks.py holds SGLang's own arithmetic against it."""

from pathlib import Path

import pytest
import torch

from vcr1_fast.learner.model_size import read_model_size
from vcr1_fast.rollout.sgl.memory import engine_bytes, memory_args
from vcr1_fast.rollout.sglang_engine import engine_args
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.settings.learning import SGLangConfig

SEVEN_B = read_model_size("nowhere/Qwen2.5-VL-7B")  # 8,292,166,656 weights; 28 layers x 2 x 4 heads x 128 wide a token
APART = SGLangConfig(placement="disaggregated", addresses=("a:1",))


def test_memory_is_weights_and_cache_whatever_is_free():
    assert engine_bytes(SGLangConfig(), SEVEN_B, 2) == 2 * 8_292_166_656 + 131_072 * 57_344 == 24_100_526_080
    assert memory_args(SGLangConfig(), SEVEN_B, 2) == {"mem_fraction_static": 0.98, "max_total_tokens": 131_072}
    assert memory_args(SGLangConfig(memory_gb=30), SEVEN_B, 2)["max_total_tokens"] == 233_950
    assert memory_args(SGLangConfig(), SEVEN_B, 4)["max_total_tokens"] == 131_072  # float32, twice as much of both
    assert engine_bytes(SGLangConfig(), SEVEN_B, 4) == 2 * 24_100_526_080


def test_on_a_gpu_of_its_own_it_takes_what_it_finds():
    assert engine_bytes(APART, SEVEN_B, 2) is None
    assert memory_args(APART, SEVEN_B, 2) == {"mem_fraction_static": 0.85}


def test_too_little_is_refused_with_what_is_needed():
    with pytest.raises(ConfigError, match=r"memory_gb is 16, wanted more than the weights' 16\.6 and 57\.3 GB"):
        memory_args(SGLangConfig(memory_gb=16), SEVEN_B, 2)
    with pytest.raises(ConfigError, match="memory_gb is 0"):
        SGLangConfig(memory_gb=0)


def test_engine_args_have_the_last_word_and_a_cpu_a_small_cache(tmp_path: Path):
    own, gpu = SGLangConfig(engine_args={"max_total_tokens": 7}), torch.device("cuda", 0)
    assert engine_args(own, tmp_path / "7b", torch.bfloat16, gpu, 0)["max_total_tokens"] == 7
    assert engine_args(SGLangConfig(), tmp_path, torch.float32, torch.device("cpu"), 0)["max_total_tokens"] == 16384
