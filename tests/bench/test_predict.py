"""`bench predict`: its sums by hand, one point on the meter, and what stands beside other systems' numbers."""

import argparse
import json
from dataclasses import replace

import pytest

from bench import predict, predict_points
from bench.floors import attention_bytes, head_bytes
from bench.update_meter import CLIPS, Point, by_name, count, model_flop, split
from vcr1_fast.fake_gpu.predict import Rates, rollout_seconds
from vcr1_fast.fake_gpu.sizes import with_blocks
from vcr1_fast.learner.model_size import ModelSize
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config

SEVEN = whole_config(PUBLIC_SIZES["Qwen2.5-VL-7B"])


def test_a_rollout_by_hand():
    # D 2, I 3, one layer, H 2, K 1, V 5, no bias counted apart: layer_params = 2*4 + 2 + 2*(2 + 1) + 18 + 4 = 38
    size = ModelSize("hand", "qwen2_5_vl", 2, 3, 1, 2, 1, 5, True, 0, 1, 1, 1)
    rates = Rates(gemm_flop_s=10.0, attention_flop_s={"fa3": (20.0, 20.0)}, memory_bytes_s=4.0)
    fill_s = 2 * 4 * 38 / 10 + 4 * 2 * 10 / 20  # 4 tokens, 10 pairs
    # answers of 2 and 1: 2 tokens read 38 + 10 weights of 2 bytes; of keys and values, 4 bytes a token, 5 + 6 + 5
    read_s = (2 * 2 * 48 + 4 * 16) / 4
    assert rollout_seconds(size, rates, 4, (2, 1)) == pytest.approx(fill_s + read_s)
    # with endless memory it is the products: 3 tokens of 48 weights, and 16 pairs
    fast = replace(rates, memory_bytes_s=1e9)
    assert rollout_seconds(size, fast, 4, (2, 1)) == pytest.approx(fill_s + (2 * 3 * 48 + 8 * 16) / 10)


def test_seconds_are_divided_between_parts_and_none_is_lost():
    def kernel(seconds: float) -> dict[str, float]:
        return {"launches": 1, "flop": 2.0, "num_bytes": 3.0, "seconds": seconds}

    kernels = {
        "tower backward": {"matrix product, mm": kernel(1.0), "mul": kernel(2.0)},
        "decoder forward": {"matrix product, mm": kernel(4.0), "mul": kernel(8.0), "attention, forward": kernel(16.0)},
        "head": {"matrix product, mm": kernel(32.0)},
        "optimizer": {"_fused_adamw_": kernel(64.0)},
        "batch": {"_to_copy": kernel(128.0)},
    }
    parts = {"tower": 3.0, "decoder products": 4.0, "attention": 16.0, "element-wise": 136.0}
    assert split(kernels) == parts | {"head": 32.0, "optimizer": 64.0}
    assert by_name(kernels)["mul"] == {"launches": 2, "flop": 4.0, "num_bytes": 6.0, "seconds": 10.0}


def test_bytes_of_the_floors():
    assert head_bytes(3, 5, 7, 2) == 2 * (2 * 15 + 2 * 35) and head_bytes(3, 5, 7, 2, is_trained=False) == 2 * (30 + 35)
    # 2 heads, 1 of keys: forward reads 2 + 1 + 1 and writes 2; backward reads 2 + 1 + 1 + 2 + 2 and writes 2 + 1 + 1
    assert attention_bytes(1, 2, 1, 1, 1) == 6 + 8 + 4


def test_the_point_is_the_largest_that_its_settings_allow():
    point = Point("x", SEVEN, CLIPS["3.8k"], settings=predict.ENGINE)
    assert "--rollout.max_new_tokens=512" in point.options()
    assert "--model.gradient_checkpointing=selective" in point.options()  # of 80 GB; with nothing recomputed it is 92
    two = replace(point, groups=2).options()
    assert "--train.prompts_per_step=16" in two and "--model.gradient_checkpointing=full" in two
    assert "--model.gradient_checkpointing=none" in Point("x", SEVEN, CLIPS["3.8k"], gpu="H200").options()


@pytest.fixture(scope="module")
def counted():
    """A short clip through 9 blocks of 7B, on 8 and on 1,024 GPUs."""
    settings = ("model.gradient_checkpointing=full",)
    point = Point("8", with_blocks(SEVEN, 4, 4, 1), (2, 8, 12), (20, 30), settings=settings, attention="fa3")
    points = [point, replace(point, name="1024", num_gpus=1024)]
    return list(zip(points, count(points), strict=True))


def test_the_meter_gives_a_row_for_each_point(counted):
    (point, row), (_, large) = counted
    assert point.prompt == 248 and point.num_tokens == 248 + 48
    assert row["recompute"] == "full" and row["fits"] and row["attention"] == "fa3"
    assert row["tokens_per_s"] == pytest.approx(point.num_tokens / row["predicted_s"], rel=0.02)
    assert row["mfu"] == pytest.approx(model_flop(point) / (989e12 * row["predicted_s"]), abs=1e-3)
    assert row["predicted_s"] == pytest.approx(max(sum(row["parts_s"].values()), row["network_s"]), abs=2e-3)
    assert all(seconds > 0 for seconds in row["parts_s"].values())
    # two products of each weight for each token in backward, one forward, and one recomputed
    flop = sum(kernel["flop"] for name, kernel in row["kernels"].items() if name.startswith(("matrix", "attention")))
    assert flop == pytest.approx(4 / 3 * model_flop(point), rel=0.1) and row["tflop"] == round(flop / 1e12)
    # between nodes a ring is slower: 1,024 GPUs wait for it
    assert large["predicted_s"] == large["network_s"] > 8 * row["network_s"]


def test_a_step_is_rollout_update_and_push(counted):
    (point, row), _ = counted
    whole = predict.whole_step(point, row, prompts=800)
    rollout_s = rollout_seconds(point.size, point.rates, 248, (20, 30))
    push_s = point.rates.collective_seconds(2 * point.size.params, range(8))
    step_s = rollout_s + row["predicted_s"] + push_s
    assert whole["step_s"] == pytest.approx(step_s, abs=2e-3)
    assert whole["hours"] == pytest.approx(100 * step_s / 3600, abs=0.006)
    assert whole["completions_per_s"] == pytest.approx(2 / step_s, abs=2e-3)
    assert set(predict.case_of(whole)) == {"update_s", "tokens_per_s_per_gpu", "mfu", "completions_per_s_per_gpu"}


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    return parser.parse_args(words)


def test_a_point_of_ones_own_and_the_four_cases():
    point = predict.own_point(arguments("--frames", "256", "--video-tokens", "16384", "--answer", "100"), 64)
    assert point.grid[0] == 128 and 15_000 < point.prompt - 200 <= 16_384 and point.answers == (100,) * 8
    for words, gpus, message in ((("--frames", "3"), 8, "even"), (("--frames", "4"), 2048, "1 to 1024")):
        with pytest.raises(SystemExit, match=message):
            predict.own_point(arguments(*words), gpus)
    cases = {point.name: point for point in predict.cases(arguments())}
    assert cases["group_3k8_7b_8"].num_tokens == 7_004 and cases["group_16k6_7b_8"].prompt == 16_622
    assert {entry["case"] for entry in predict_points.PUBLIC} <= cases.keys()
    assert all(entry["note"] and entry["key"] in predict.COLUMNS for entry in predict_points.PUBLIC)


def test_measured_updates_are_found_and_their_error_told(tmp_path):
    limits = {"gemm_tflop_s": 0.1, "copy_gb_s": 20.0}
    row = {
        "size": "tiny P=188 R=60 G=8",
        "prompt_tokens": 188,
        "completion_tokens": 60,
        "group_size": 8,
        "median_ms": 200.0,
    }
    rows = [row | {"way": way, "gradient_checkpointing": False} for way in ("original", "kernels")]
    result = {"model": "tiny", "dtype": "float32", "is_gpu": False, "limits": limits, "rows": rows}
    (tmp_path / "step_cpu.json").write_text(json.dumps(result), encoding="utf-8")
    [(measured, point)] = predict_points.own_points(tmp_path)
    assert point.prompt == 188 and point.answers == (60,) * 8 and point.num_gpus == 1
    assert (point.rates.gemm_flop_s, point.rates.memory_bytes_s) == (1e11, 2e10)
    assert point.rates.attention_flop_s["fa2"] == (1e11, 1e11)
    [error] = predict_points.error_rows([measured], [{"predicted_s": 0.15}])
    assert error["error"] == pytest.approx(-0.25) and error["file"] == "step_cpu.json"
