"""The four ways do the same update, a wrong one is noticed, and a row holds what it promises."""

import argparse
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bench import kernels, step
from bench.floors import Limits
from bench.flops import StepFlop
from bench.gpu_summary import step_bars
from bench.harness import Deadline
from bench.step_model import GPU_POINTS, TINY_CHECK, config_3b, load_model
from bench.step_timing import PARTS, predicted_parts_ms
from bench.step_ways import WAY_NAMES, WayOptions, count_tokens, losses, pad_rows

CPU = torch.device("cpu")
ROW_FIELDS = {
    "size", "prompt_tokens", "completion_tokens", "group_size", "way", "rows_per_microbatch", "gradient_checkpointing",
    "loss", "gradient_difference", "median_ms", "low_ms", "high_ms", "repeats", "completions_per_s",
    "tokens_per_s_executed", "tokens_per_s_unshared", "tflop_per_s", "mfu_percent",
    "peak_bytes", "parts_ms", "predicted_ms",
    *(f"{ratio}_{way}" for way in ("original", "plain") for ratio in (
        "time_ratio", "token_ratio", "share_of_token_ratio")),
}  # fmt: skip


@pytest.fixture(scope="module")
def hf():
    return load_model("tiny", torch.float32, CPU)


def quick(**changes):
    return argparse.Namespace(**{"quick": True, "seconds": 120.0, "rounds": 1, "output": None, **changes})


def test_a_run_measures_four_ways_and_they_agree():
    result = step.run(quick())
    assert result["disagreements"] == [] and step.failed(result) is None
    assert [row["way"] for row in result["rows"]] == list(WAY_NAMES)
    assert result["check"]["gradient_errors"].keys() == set(WAY_NAMES)
    [bar] = step_bars({"is_gpu": False, **result})
    assert bar.holds is None  # a CPU run holds or breaks no bar
    for row in result["rows"]:
        assert set(row) == ROW_FIELDS
        assert set(row["parts_ms"]) == set(PARTS)
        assert sum(row["parts_ms"].values()) == pytest.approx(row["median_ms"])
        assert row["gradient_difference"] < 1e-4
        assert row["loss"] == pytest.approx(result["rows"][0]["loss"], abs=1e-6)
    by_way = {row["way"]: row for row in result["rows"]}
    prompt, length, count = TINY_CHECK.prompt_len, TINY_CHECK.completion_len, TINY_CHECK.num_completions
    shared = prompt + count * (length - 1)
    assert by_way["kernels"]["token_ratio_plain"] == pytest.approx(count * (prompt + length - 1) / shared)
    assert by_way["kernels"]["token_ratio_original"] == pytest.approx(count * (prompt + length) / shared)
    assert by_way["plain"]["time_ratio_plain"] == 1.0


def test_a_way_with_a_wrong_gradient_is_a_disagreement(monkeypatch):
    right = step.losses

    def wrong(name, hf, group, options):
        for call in right(name, hf, group, options):
            yield (lambda call=call: 1.01 * call()) if name == "kernels" else call

    monkeypatch.setattr(step, "losses", wrong)
    result = step.run(quick())
    assert len(result["disagreements"]) == 2  # on the check group and on the timed one
    assert all("kernels" in line for line in result["disagreements"])
    assert "gradient" in (step.failed(result) or "")


@pytest.mark.parametrize("name", ["original", "plain"])
def test_micro_batches_of_rows_add_up(hf, name):
    group = TINY_CHECK.group(hf.config.video_token_id, CPU, torch.float32)
    sums = []
    for rows in (3, 2, 1):
        calls = list(losses(name, hf, group, WayOptions(rows, gradient_checkpointing=False)))
        assert len(calls) == {3: 1, 2: 2, 1: 3}[rows]
        sums.append(sum(call().item() for call in calls))
    assert sums[0] == pytest.approx(sums[1], abs=1e-6) and sums[0] == pytest.approx(sums[2], abs=1e-6)


def test_checkpointing_changes_nothing_but_memory(hf):
    group = TINY_CHECK.group(hf.config.video_token_id, CPU, torch.float32)
    grads = []
    for is_on in (False, True):
        for call in losses("kernels", hf, group, WayOptions(3, gradient_checkpointing=is_on)):
            call().backward()
        grads.append(hf.model.language_model.layers[0].mlp.up_proj.weight.grad.clone())
        hf.zero_grad(set_to_none=True)
    hf.gradient_checkpointing_disable()
    torch.testing.assert_close(grads[0], grads[1])


def test_rows_of_unequal_length_are_padded_and_the_padding_counts_nothing(hf):
    from bench.groups import random_group

    group = random_group((2, 8, 8), 30, (7, 4), hf.config.video_token_id)
    rows = pad_rows(group, range(2), CPU)
    assert (rows.target_GR == -100).sum() == 3
    totals = []
    for name in WAY_NAMES:
        hf.zero_grad(set_to_none=True)
        total = 0.0
        for call in losses(name, hf, group, WayOptions(2, gradient_checkpointing=False)):
            loss = call()
            loss.backward()
            total += loss.item()
        totals.append((total, hf.model.language_model.layers[0].mlp.up_proj.weight.grad.norm().item()))
    hf.zero_grad(set_to_none=True)
    for before, after in pairwise(totals):
        assert before == pytest.approx(after, rel=1e-4, abs=1e-6)
    counts = {name: count_tokens(name, group) for name in WAY_NAMES}
    prompt = group.prompt.token_ids_L.numel()
    assert counts["original"].executed == 2 * (prompt + 7) and counts["original"].head_rows == 2 * (prompt + 7)
    assert counts["plain"].executed == 2 * (prompt + 6) and counts["plain"].head_rows == 14
    assert counts["kernels"].executed == prompt + 6 + 3 and counts["kernels"].head_rows == 11
    assert {count.unshared for count in counts.values()} == {2 * prompt + 9}


def test_a_point_above_the_budget_is_left_out(hf):
    session = step.Session(hf, Limits(1.0, 1e-6, 1, "float32"), deadline=Deadline(5.0))
    step.measure_points(session, [TINY_CHECK], 1)
    assert session.rows == [] and session.deadline.left_out[0].startswith(f"step {TINY_CHECK.name}: needs")


def test_a_gpu_run_tries_options_from_fast_to_small(monkeypatch):
    config = config_3b()
    hf = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=config)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100e9, 141e9))
    short, long = GPU_POINTS

    def rows(name, point):
        return [(o.rows_per_microbatch, o.gradient_checkpointing) for o in step.attempts(name, point, hf)]

    # 8 rows of 4,012 tokens: 3 x 9.8 GB of logits and their like, 14 GB of layer inputs; of 17,024 tokens 4 times that
    assert rows("original", short) == [(8, True), (4, True), (2, True), (1, True)]
    assert rows("original", long) == [(4, True), (2, True), (1, True)]
    assert rows("plain", long) == [(8, True), (4, True), (2, True), (1, True)]
    assert rows("kernels", short) == [(8, False), (8, True)]
    assert rows("kernels", long) == [(8, True)]


def test_a_run_stopped_from_outside_reports_what_it_has(monkeypatch):
    """`timeout` sends TERM, which `python -m bench` turns into KeyboardInterrupt."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "check_gradients", lambda session, point: None)
    monkeypatch.setattr(step, "measure_points", stopped)
    assert "stopped from outside" in step.run(quick())["left_out"][0]
    monkeypatch.setattr(kernels, "measure_all", stopped)
    assert "stopped from outside" in kernels.run(quick(sizes=None, op=None))["left_out"][0]


def test_the_random_3b_has_the_size_of_the_published_one():
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration(config_3b())
    assert sum(p.numel() for p in hf.parameters()) == 3_754_622_976
    assert hf.lm_head.weight is hf.get_input_embeddings().weight
    assert hf.config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]


def test_prediction_puts_every_flop_somewhere_once():
    limits = Limits(copy_gb_s=1.0, gemm_tflop_s=1e-9, gemm_size=1, dtype="float32")  # 1 FLOP a microsecond
    flop = StepFlop(tower=10, decoder=100, head=1000, recomputed=7)
    for head_in_forward in (False, True):
        parts = predicted_parts_ms(flop, limits, head_in_forward=head_in_forward)
        assert sum(parts.values()) == pytest.approx(limits.flop_ms(3 * 1110 + 7))
    assert predicted_parts_ms(flop, limits, head_in_forward=True)["backward"] == pytest.approx(limits.flop_ms(227))
