"""The CUDA half is chosen when a run starts, on all ranks alike, and gives what the CPU half gives, errors included."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.native.cuda_stand_in import install
from tests.tiny_policy import run_ranks
from vcr1_fast import native
from vcr1_fast.learner import advantages
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World
from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks, native_cuda, overlap, reward_groups
from vcr1_fast.types import Example, IntervalTruth

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.unavailable_reason() or "")
ON_GPU = World(device=torch.device("cuda", 0))


def bits(values):
    return [value.hex() for value in values]


def batches(num_answers, seed=0):
    """Functions of the tasks with N answers each, empty lists among them: (name on CUDA, call)."""
    rng = np.random.default_rng(seed)

    def lists(width, most):
        rows = [rng.random((rng.integers(0, most + 1), width)) for _ in range(num_answers)]
        halves = [np.sort(r.reshape(-1, 2, width // 2), axis=1).reshape(-1, width) for r in rows]
        return [[tuple(row) for row in half.tolist()] for half in halves]

    predicted, truth, tracks = lists(2, 3), lists(2, 2), lists(4, 4)
    true_tracks = [[(x0 * 0.9, y0, x1, y1) for x0, y0, x1, y1 in track] for track in tracks]
    rewards, offsets = rng.random(num_answers).tolist(), [0, num_answers // 3, num_answers // 3, num_answers]
    for kind in ("set", "hull"):
        yield "interval_overlap_cuda", lambda k=kind: overlap.interval_iou_batch(predicted, truth, k)
    yield "interval_overlap_cuda", lambda: overlap.interval_iou_batch(predicted, truth, "iop")
    yield "track_overlap_cuda", lambda: overlap.track_iou_batch(tracks, true_tracks, 1)
    for scale in ("group", "batch", "none"):
        yield "group_advantages_cuda", lambda s=scale: reward_groups.group_advantages(rewards, offsets, s)


def check_all(num_answers, calls=None):
    """Every function on the half in use gives the CPU half's bits, by one call each where calls are recorded."""
    half = native._half
    for name, batch in batches(num_answers):
        got = batch()
        if calls is not None:
            assert calls == ([(name, num_answers)] if num_answers >= native_cuda.MIN_ANSWERS else [])
            calls.clear()
        native.use(native.on_cpu, "")
        assert bits(got) == bits(batch())
        assert num_answers < 50 or sum(0.0 < abs(value) < 1.0 for value in got) > 10
        native.use(half, "")


@pytest.mark.parametrize("num_answers", [0, 1, 2, 200])
def test_every_batch_function_calls_the_cuda_half_once(monkeypatch, num_answers):
    stand_in = install(monkeypatch)
    native_cuda.choose_half(ON_GPU)
    assert {name for name, _ in stand_in.calls} == {name for name, _ in batches(1)}  # compared before it is chosen
    stand_in.calls.clear()
    check_all(num_answers, stand_in.calls)


def test_lists_without_a_row(monkeypatch):
    install(monkeypatch)
    native_cuda.choose_half(ON_GPU)
    assert overlap.interval_iou_batch([[], []], [[], []], "set") == [0.0, 0.0]


def test_the_rewards_of_a_step_are_one_call_and_its_advantages_another(monkeypatch):
    stand_in = install(monkeypatch)
    native_cuda.choose_half(ON_GPU)
    stand_in.calls.clear()
    task = make_tasks(TaskConfig(think=False), ["temporal_grounding"])["temporal_grounding"]
    example = Example("e", "temporal_grounding", "v.mp4", "a dog runs", 10.0, IntervalTruth(((2.0, 6.0),)))
    answers = [f"<answer>{start}.00 to 6.00</answer>" for start in range(6)] * 4
    iou = task.score([example] * 24, answers)["iou"]
    assert iou[:6] == [4 / 6, 4 / 5, 1.0, 3 / 4, 2 / 4, 1 / 4]
    advantages.group_advantages([iou[n : n + 6] for n in range(0, 24, 6)])
    assert stand_in.calls == [("interval_overlap_cuda", 24), ("group_advantages_cuda", 24)]


def test_what_the_cpu_half_refuses_is_refused_with_its_words(monkeypatch):
    install(monkeypatch)
    native_cuda.choose_half(ON_GPU)
    with pytest.raises(ValueError, match="predicted: row 1 got a start before that of the row above"):
        overlap.interval_iou_batch([[(float("nan"), 1.0), (2.0, 3.0)], []], [[], []], "set")
    # a reward that is not a number is none of the kernel's doing: both halves give it on
    assert bits(reward_groups.group_advantages([float("nan"), 1.0], [0, 2], "none")) == ["nan", "nan"]


@pytest.mark.parametrize(
    ("options", "in_use"),
    [
        ({}, "C++ on CUDA"),
        ({"failure": "no kernel image"}, "C++ on the CPU: interval_overlap_cuda: no kernel image"),
        ({"error": 2.0**-53}, "C++ on the CPU: interval_overlap gives [0.88"),
    ],
)
def test_the_choice_on_a_gpu(monkeypatch, options, in_use):
    install(monkeypatch, **options)
    native_cuda.choose_half(ON_GPU)
    assert native.in_use().startswith(in_use)
    assert (native._half is native.on_cpu) == bool(options)
    native_cuda.choose_half(SINGLE_PROCESS)  # a later run on the CPU
    assert (native.in_use(), native._half) == ("C++", native.on_cpu)


def test_a_gpu_without_the_cuda_half_or_the_module(monkeypatch):
    stand_in = install(monkeypatch)
    monkeypatch.setattr(stand_in, "has_cuda", False, raising=False)
    native_cuda.choose_half(ON_GPU)
    assert (
        native.in_use()
        == "C++ on the CPU: the compiled module has no CUDA half, as no nvcc was there when it was built"
    )
    monkeypatch.setattr(native, "module", None)
    native_cuda.choose_half(ON_GPU)
    assert native.in_use() == native.status() and native.in_use().startswith("not built")
    assert stand_in.calls == []


def test_ranks_choose_alike(tmp_path):
    run_ranks(Path(__file__).with_name("half_ranks.py"), str(tmp_path / "said"))
    zero, one = (json.loads((tmp_path / f"said.{rank}").read_text()) for rank in (0, 1))
    assert zero[0] == one[0] == ["C++ on CUDA", False]
    assert zero[1] == ["C++ on the CPU: 1 of 2 ranks cannot use the CUDA half", True]
    assert one[1] == ["C++ on the CPU: interval_overlap_cuda: no kernel image", True]


@pytest.mark.gpu
def test_a_real_gpu_gives_the_same_bits_from_any_thread(monkeypatch):
    if not native.has_cuda():
        pytest.skip(f"native module: {native.status()}")
    monkeypatch.setattr(native, "_half", native._half)
    monkeypatch.setattr(native, "_in_use", native._in_use)
    native_cuda.choose_half(World(device=torch.device("cuda", torch.cuda.device_count() - 1)))
    assert native.in_use() == "C++ on CUDA"
    check_all(4000)
    failures = []

    def check():
        try:
            check_all(200)  # in a new thread device 0 is the current one
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert failures == []
