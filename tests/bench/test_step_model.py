"""The models of the step benchmark: the 3B sizes."""

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bench.step_model import GPU_POINTS, config_3b


def test_the_random_3b_has_the_size_of_the_published_one():
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration(config_3b())
    assert sum(p.numel() for p in hf.parameters()) == 3_754_622_976
    assert hf.lm_head.weight is hf.get_input_embeddings().weight
    assert hf.config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]


def test_points_are_the_workloads_promised():
    assert [(p.prompt_len, p.completion_len, p.num_completions) for p in GPU_POINTS] == [
        (3712, 300, 8),
        (16512, 512, 8),
    ]
    assert [p.num_patches for p in GPU_POINTS] == [30 * 20 * 24, 64 * 32 * 32]
