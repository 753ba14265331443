"""Statistics, budget, comparison and floors: what every number of the benchmarks passes through."""

import math

import pytest
import torch

from bench import floors
from bench.harness import (
    Contest,
    Deadline,
    Way,
    compare,
    reason_of,
    relative_error,
    summarize,
    time_interleaved,
)
from bench.kernels import parse_sizes

CPU = torch.device("cpu")


def test_summary_is_median_and_quartiles():
    timing = summarize([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (timing.median_ms, timing.low_ms, timing.high_ms, timing.repeats) == (3.0, 2.0, 4.0, 5)
    assert summarize([7.0]).high_ms == 7.0
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


def test_ways_take_turns_and_are_restored_before_each_turn():
    events = []
    ways = [
        Way("a", lambda: events.append("a") or {}, setup=lambda: events.append("restore")),
        Way("b", lambda: events.append("b") or {}),
    ]
    timings = time_interleaved(ways, CPU, seconds=0.0)
    assert events == ["restore", "a", "b"] * 3
    assert timings["a"].repeats == timings["b"].repeats == 3


def test_a_point_that_does_not_fit_is_named():
    deadline = Deadline(10.0)
    assert deadline.allows("small", 1.0)
    assert not deadline.allows("large", 1000.0)
    assert len(deadline.left_out) == 1 and deadline.left_out[0].startswith("large: needs about 1000 s")


def test_a_way_that_raises_is_listed_with_its_reason():
    def broken():
        raise RuntimeError("no such kernel\nmore lines")

    contest = Contest(CPU)
    contest.enter(Way("broken", broken), {})
    contest.enter(Way("fine", lambda: {"out": torch.ones(2)}), {"out": torch.ones(2)})
    assert [(a.name, a.reason) for a in contest.absent] == [("broken", "RuntimeError: no such kernel")]
    assert list(contest.time(0.0)) == ["fine"]
    assert contest.errors == {"fine": {"out_relative": 0.0}}
    assert reason_of(torch.OutOfMemoryError("CUDA out of memory ...")) == "out of memory"


def test_errors_are_relative_for_tensors_and_absolute_for_log_probs():
    reference = {"loss": torch.tensor(2.0), "logprob": torch.tensor([-1.0, -2.0]), "grad": torch.tensor([3.0, 4.0])}
    outputs = {"loss": torch.tensor(2.5), "logprob": torch.tensor([-1.0, -2.25]), "grad": torch.tensor([3.0, 4.5])}
    assert compare(outputs, reference) == {"loss_max_abs": 0.5, "logprob_max_abs": 0.25, "grad_relative": 0.1}
    assert compare({"other": torch.ones(1)}, reference) == {}


def test_a_reference_may_hold_some_rows_only():
    reference = {"grad": torch.tensor([[1.0], [4.0]]), "checked_rows": torch.tensor([0, 3])}
    value = torch.tensor([[1.0], [9.0], [9.0], [4.0]])
    assert compare({"grad": value}, reference) == {"grad_relative": 0.0}
    assert compare({"grad": value + 1}, reference)["grad_relative"] > 0.3


def test_nan_and_wrong_shapes_never_pass():
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.ones(1)))
    assert math.isnan(compare({"loss": torch.tensor(math.nan)}, {"loss": torch.ones(())})["loss_max_abs"])
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(torch.ones(2), torch.ones(3))


def test_floor_arithmetic():
    limits = floors.Limits(copy_gb_s=4000.0, gemm_tflop_s=800.0, gemm_size=8192, dtype="bfloat16")
    assert limits.bytes_ms(4e9) == pytest.approx(1.0)  # 4 GB at 4000 GB/s
    assert limits.flop_ms(8e11) == pytest.approx(1.0)  # 0.8 TFLOP at 800 TFLOP/s
    assert floors.logits_bytes(8192, 151936, 2, 2) == 2 * 2 * 8192 * 151936
    # 3 frames of 28 x 28: 2 pairs of 4 patches of 1176 values
    assert floors.patchify_bytes(3, 28, 28, 2) == 3 * 28 * 28 * 3 + 2 * 4 * 1176 * 2
    assert floors.attention_flop(10, 2, 4, backward=False) == 4 * 10 * 2 * 4
    assert floors.attention_flop(10, 2, 4, backward=True) == 14 * 10 * 2 * 4
    gemms = floors.HeadGemms(1.0, 2.0, 4.0)
    assert (gemms.train_ms, gemms.frozen_ms) == (7.0, 3.0)


def test_sizes_on_the_command_line():
    assert parse_sizes("4k,512, 8K") == (4096, 512, 8192)
    for wrong in ("0", "4m", "7", ""):
        with pytest.raises(ValueError, match="--sizes got"):
            parse_sizes(wrong)
