"""The benchmark of weight sync: sizes, what a run gives, and what is left out by name."""

import argparse
from typing import Any

import pytest
import torch

from bench import weight_sync


@pytest.mark.parametrize(("megabytes", "dtype"), [(40, torch.float32), (100, torch.bfloat16)])
def test_the_model_has_the_size_asked_for(megabytes, dtype):
    """Within one layer of 15 MB in float32, and the tower beside it."""
    model: Any = weight_sync.sized_model(megabytes, dtype)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert abs(num_bytes / 1e6 - megabytes) < 15
    assert sum(model.config.text_config.rope_parameters["mrope_section"]) == 512 // 8 // 2


def test_a_run_gives_one_row_for_each_way_of_this_machine(capsys):
    result = weight_sync.run(argparse.Namespace(quick=True, megabytes=None, bucket_mb=1, repeats=3))
    if not torch.cuda.is_available():
        assert [(row["side"], row["way"]) for row in result["rows"]] == [("learner", "shared_memory")]
    assert result["absent"] == []
    for row in result["rows"]:
        assert row["gb_s"] == pytest.approx(row["num_bytes"] / row["median_s"] / 1e9)
        assert row["num_bytes"] == result["num_bytes"]
        assert row["percent_of_copy"] == pytest.approx(100 * row["gb_s"] / result["copy_gb_s"])
        assert row["low_s"] <= row["median_s"] <= row["high_s"]
    assert "MB of weights" in capsys.readouterr().out


def test_every_way_is_tried_on_its_side():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    on_cpu = list(weight_sync.plan(cpu, has_engine=True))
    assert {way for side, way, _ in on_cpu if side == "engine"} == {"shared_memory", "broadcast"}
    assert ("engine", "broadcast", False) in on_cpu
    assert {way for _, way, _ in weight_sync.plan(cuda, has_engine=False)} == {"shared_memory", "cuda_ipc"}
