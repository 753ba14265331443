"""The compiled batch functions equal the plain Python ones bit for bit, and refuse bad arrays with a clear line."""

import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast import native
from vcr1_fast.tasks import overlap

needs_native = pytest.mark.skipif(not native.is_available(), reason=native.unavailable_reason() or "")
needs_cuda = pytest.mark.skipif(not native.has_cuda(), reason=f"native module: {native.status()}")

coarse = st.integers(-4, 12).map(lambda n: n / 4)  # collisions: shared ends, empty and reversed intervals
fine = st.floats(-1e6, 1e6, allow_nan=False)
extreme = st.floats(allow_nan=False)  # infinities, subnormals, -0.0
number = st.one_of(coarse, fine, extreme)
interval_lists = st.lists(st.tuples(number, number), max_size=5)
box = st.tuples(number, number, number, number)


def bits(values):
    return [value.hex() for value in values]


def overlapping_boxes(draw):
    x0, y0 = draw(st.floats(0, 0.6)), draw(st.floats(0, 0.6))
    return (x0, y0, x0 + draw(st.floats(0, 0.4)), y0 + draw(st.floats(0, 0.4)))


@st.composite
def tracks(draw):
    """A truth and a prediction; mostly of the same length and overlapping, sometimes not."""
    count = draw(st.integers(0, 6))
    one = st.one_of(st.composite(overlapping_boxes)(), box)
    truth = draw(st.lists(one, min_size=count, max_size=count))
    other = draw(st.integers(0, 6)) if draw(st.integers(0, 3)) == 0 else count
    return draw(st.lists(one, min_size=other, max_size=other)), truth


@needs_native
@settings(max_examples=400)
@given(st.lists(st.tuples(interval_lists, interval_lists), max_size=8), st.sampled_from(["set", "hull", "iop"]))
def test_interval_batches_are_bitwise_equal(pairs, kind):
    predicted, truth = [p for p, _ in pairs], [t for _, t in pairs]
    plain = overlap.interval_iou_batch_plain(predicted, truth, kind)
    assert bits(overlap.interval_iou_batch_native(predicted, truth, kind)) == bits(plain)


@needs_native
@settings(max_examples=150)
@given(st.lists(tracks(), max_size=8), st.integers(0, 2))
def test_track_batches_are_bitwise_equal(pairs, first_box):
    predicted, truth = [p for p, _ in pairs], [t for _, t in pairs]
    plain = overlap.track_iou_batch_plain(predicted, truth, first_box)
    assert bits(overlap.track_iou_batch_native(predicted, truth, first_box)) == bits(plain)
    assert all(0.0 <= value <= 1.0 for value in plain)


@settings(max_examples=300)
@given(interval_lists, interval_lists)
def test_set_iou_is_symmetric_and_in_range(predicted, truth):
    iou = overlap.set_iou(predicted, truth)
    if all(abs(x) < 1e300 for interval in predicted + truth for x in interval):
        assert 0.0 <= iou <= 1.0
        assert iou == overlap.set_iou(truth, predicted)


@needs_native
def test_the_batch_functions_use_the_compiled_module():
    assert overlap.interval_iou_batch is overlap.interval_iou_batch_native
    assert overlap.track_iou_batch is overlap.track_iou_batch_native
    assert native.status() in ("CPU", "CPU and CUDA")
    assert native.unavailable_reason() is None


def interval_arguments(**changes):
    arguments = {
        "predicted": np.zeros((2, 2)),
        "predicted_offsets": np.array([0, 1, 2]),
        "truth": np.ones((3, 2)),
        "truth_offsets": np.array([0, 2, 3]),
        "kind": "set",
        "out": np.empty(2),
    }
    return {**arguments, **changes}


@needs_native
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"predicted": np.zeros((2, 3))}, ValueError, "predicted: dim 1 got 3, wanted 2"),
        ({"predicted": np.zeros(4)}, ValueError, "predicted: rank got 1, wanted 2"),
        ({"predicted": np.zeros((2, 2), np.float32)}, ValueError, "predicted: dtype got float32, wanted float64"),
        ({"predicted": np.zeros((2, 4))[:, ::2]}, ValueError, r"predicted: stride 1 got 2, wanted 1 \(contiguous\)"),
        ({"truth_offsets": np.array([0, 3])}, ValueError, "truth_offsets: dim 0 got 2, wanted 3"),
        ({"truth_offsets": np.array([0.0, 2, 3])}, ValueError, "truth_offsets: dtype got float64, wanted int64"),
        ({"truth_offsets": np.array([1, 2, 3])}, ValueError, "truth_offsets: offset 0 got 1, wanted 0"),
        ({"truth_offsets": np.array([0, 5, 3])}, ValueError, "truth_offsets: offset 2 got 3, wanted at least 5"),
        (
            {"truth_offsets": np.array([0, 2, 99])},
            ValueError,
            r"truth_offsets: offset 2 got 99, wanted 3 \(the number of rows\)",
        ),
        ({"truth": [[0.0, 1.0]]}, TypeError, "truth: type got list, wanted an array with __dlpack__"),
        (
            {"truth": np.array([[5.0, 6.0], [1.0, 2.0], [0.0, 1.0]])},
            ValueError,
            "truth: row 1 got a start before that of the row above",
        ),
        ({"truth": np.full((3, 2), np.nan)}, ValueError, "truth: row 1 got a start before"),
        ({"out": np.empty((2, 1))}, ValueError, "out: rank got 2, wanted 1"),
        ({"kind": "iou"}, ValueError, "kind: value got 'iou', wanted 'set', 'hull' or 'iop'"),
    ],
)
def test_bad_arrays_are_refused(changes, error, message):
    from vcr1_fast import _native

    with pytest.raises(error, match=message):
        _native.interval_overlap(**interval_arguments(**changes))


@needs_native
def test_first_box_must_not_be_negative_and_no_array_leaks():
    from vcr1_fast import _native

    boxes, offsets, out = np.zeros((2, 4)), np.array([0, 2]), np.empty(1)
    with pytest.raises(ValueError, match="first_box: value got -1, wanted 0 or more"):
        _native.track_overlap(boxes, offsets, boxes, offsets, -1, out)
    count = sys.getrefcount(boxes)
    for _ in range(1000):
        _native.track_overlap(boxes, offsets, boxes, offsets, 0, out)
        with pytest.raises(ValueError):
            _native.track_overlap(boxes, offsets, boxes[:, :3], offsets, 0, out)
    assert sys.getrefcount(boxes) == count


@needs_native
def test_torch_tensors_are_read_too():
    torch = pytest.importorskip("torch")
    from vcr1_fast import _native

    rows, offsets = torch.tensor([[0.0, 2.0]], dtype=torch.float64), torch.tensor([0, 1])
    truth, out = torch.tensor([[1.0, 3.0]], dtype=torch.float64), torch.empty(1, dtype=torch.float64)
    _native.interval_overlap(rows, offsets, truth, offsets, "set", out)
    assert out.item() == 1 / 3


@needs_native
def test_the_interpreter_runs_on_while_a_batch_is_computed():
    """With forced switches off, this thread can see the other one at work only if the C++ gives the interpreter up."""
    from vcr1_fast import _native

    starts = np.arange(3_000_000.0)  # one list so long that the call takes tens of milliseconds
    rows = np.stack([starts, starts + 0.5], axis=1)
    offsets, out, finished = np.array([0, len(rows)]), np.empty(1), []

    def compute():
        _native.interval_overlap(rows, offsets, rows, offsets, "set", out)
        finished.append(True)

    thread = threading.Thread(target=compute)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(60.0)
    try:
        thread.start()
        was_finished = bool(finished)
        thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert not was_finished
    assert out[0] == 1.0


def random_batch(seed, num_answers):
    """Arrays of a batch: sorted intervals and tracks of 4 boxes, a few of them broken off."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 4, num_answers))])
    starts = np.concatenate([np.sort(rng.random(n)) for n in np.diff(offsets)])
    intervals = np.stack([starts, starts + rng.random(len(starts)) - 0.1], axis=1)
    truth, truth_offsets = np.tile([[0.3, 0.8]], (num_answers, 1)), np.arange(num_answers + 1)
    boxes = np.sort(rng.random((4 * num_answers, 2, 2)), axis=1).reshape(-1, 4)
    box_offsets = 4 * np.arange(num_answers + 1)
    true_boxes = np.roll(boxes, 1, axis=0) * 0.5 + boxes * 0.5
    return (intervals, offsets, truth, truth_offsets), (boxes, box_offsets, true_boxes, box_offsets)


@needs_native
def test_the_number_of_threads_does_not_change_a_bit():
    from vcr1_fast import _native

    intervals, tracks_ = random_batch(1, 60_000)  # enough rows for 4 threads
    limit, results = _native.thread_limit(), []
    try:
        for threads in (1, 4):
            _native.set_thread_limit(threads)
            assert _native.thread_limit() == threads
            out, out_track = np.empty(60_000), np.empty(60_000)
            _native.interval_overlap(*intervals, "set", out)
            _native.track_overlap(*tracks_, 1, out_track)
            results.append(out.tobytes() + out_track.tobytes())
    finally:
        _native.set_thread_limit(limit)
    assert results[0] == results[1]
    for wrong in (0, 65):
        with pytest.raises(ValueError, match=f"count: value got {wrong}, wanted 1 to 64"):
            _native.set_thread_limit(wrong)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["set", "hull", "iop"])
def test_cuda_equals_cpu_bit_for_bit(kind):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from vcr1_fast import _native

    intervals, tracks_ = random_batch(0, 1000)
    cpu_iou, cpu_track = np.empty(1000), np.empty(1000)
    _native.interval_overlap(*intervals, kind, cpu_iou)
    _native.track_overlap(*tracks_, 1, cpu_track)

    out_iou, out_track = torch.empty(2, 1000, dtype=torch.float64, device="cuda").unbind()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the caller's stream, not the default one
        gpu = [torch.as_tensor(a, device="cuda") for a in intervals]
        gpu_boxes = [torch.as_tensor(a, device="cuda") for a in tracks_]
        _native.interval_overlap_cuda(*gpu, kind, out_iou, side.cuda_stream)
        _native.track_overlap_cuda(*gpu_boxes, 1, out_track, side.cuda_stream)
    side.synchronize()
    assert out_iou.cpu().numpy().tobytes() == cpu_iou.tobytes()
    assert out_track.cpu().numpy().tobytes() == cpu_track.tobytes()


@needs_cuda
def test_cuda_functions_refuse_cpu_arrays():
    from vcr1_fast import _native

    with pytest.raises(ValueError, match="out: device got cpu, wanted cuda"):
        _native.interval_overlap_cuda(**interval_arguments(), stream=0)
