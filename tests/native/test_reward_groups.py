"""Compiled rewards and advantages equal the plain ones bit for bit, alone and together with the overlap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast import native
from vcr1_fast.tasks import overlap, reward_groups

needs_native = pytest.mark.skipif(not native.is_available(), reason=native.unavailable_reason() or "")
needs_cuda = pytest.mark.skipif(not native.has_cuda(), reason=f"native module: {native.status()}")
SCALES = ("group", "batch", "none")

reward = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(-3, 3), st.floats())
groups = st.lists(st.lists(reward, max_size=9), max_size=6)


def bits(values):
    return [value.hex() for value in values]


@needs_native
@settings(max_examples=400, deadline=None)
@given(groups, st.sampled_from(SCALES), st.sampled_from([1e-4, 1e-300, 1.0]))
def test_advantages_are_bitwise_equal(lists, scale, std_floor):
    rewards = [value for group in lists for value in group]
    offsets = [0, *np.cumsum([len(group) for group in lists], dtype=int).tolist()]
    plain = reward_groups.group_advantages_plain(rewards, offsets, scale, std_floor)
    assert bits(reward_groups.group_advantages_native(rewards, offsets, scale, std_floor)) == bits(plain)


def problem(seed, num_groups=50):
    """Groups of 1 to 17 answers with two reward parts, intervals and tracks, as lists and as arrays."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 18, num_groups))])
    count = int(offsets[-1])
    parts = np.stack([rng.integers(0, 2, count).astype(float), rng.random(count)])
    starts = rng.random(count) * 50
    predicted = [
        [(s, s + w)] if w > 2 else [] for s, w in zip(starts.tolist(), (rng.random(count) * 20).tolist(), strict=True)
    ]
    truth = [[(10.0, 30.0), (40.0, 45.0)]] * count
    corners = np.sort(rng.random((count, 8, 2, 2)), axis=2).reshape(count, 8, 4)
    tracks = [[tuple(box) for box in track] for track in corners.tolist()]
    true_tracks = [[(0.2, 0.2, 0.7, 0.7)] * 8] * count
    return offsets, parts, np.array([1.0, 0.25, 2.0]), (predicted, truth), (tracks, true_tracks)


def fused(problem_, scale, what, to=lambda array: array, empty=np.empty, suffix="", **stream):
    """overlaps, rewards, advantages of the fused function, on whatever device `to` and `empty` make arrays for."""
    from vcr1_fast import _native

    offsets, parts, weights, intervals, tracks = problem_
    lists, width = (intervals, 2) if what == "interval" else (tracks, 4)
    kind = {"kind": "iop"} if what == "interval" else {"first_box": 1, "kind": "giou"}
    arrays = [to(array) for side in lists for array in overlap.ragged(side, width)]
    names = ("predicted", "predicted_offsets", "truth", "truth_offsets")
    out = [empty(parts.shape[1]) for _ in range(3)]
    getattr(_native, f"{what}_advantages{suffix}")(
        **dict(zip(names, arrays, strict=True)), **kind, parts=to(parts), weights=to(weights),
        group_offsets=to(offsets), scale=scale, std_floor=1e-4, overlaps=out[0], rewards=out[1],
        advantages=out[2], **stream,
    )  # fmt: skip
    return out


@needs_native
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("what", ["interval", "track"])
def test_fused_equals_overlap_then_sum_then_advantage(scale, what):
    made = problem(0)
    offsets, parts, weights, intervals, tracks = made
    if what == "interval":
        plain = overlap.interval_iou_batch_plain(*intervals, "iop")
    else:
        plain = overlap.track_iou_batch_plain(*tracks, 1, "giou")
    rewards = reward_groups.weighted_rewards([*parts.tolist(), plain], weights.tolist())
    advantages = reward_groups.group_advantages_plain(rewards, offsets.tolist(), scale)
    assert len(set(plain)) > len(plain) // 2
    for got, wanted in zip(fused(made, scale, what), (plain, rewards, advantages), strict=True):
        assert bits(got.tolist()) == bits(wanted)


@needs_native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "std"}, "scale: value got 'std', wanted 'group', 'batch' or 'none'"),
        ({"std_floor": 0.0}, "std_floor: value got 0.0+, wanted more than 0"),
        ({"std_floor": float("nan")}, "std_floor: value got nan, wanted more than 0"),
        ({"parts": np.zeros((2, 3))}, "parts: dim 1 got 3, wanted 4"),
        ({"weights": np.zeros(3)}, "weights: dim 0 got 3, wanted 2"),
        ({"rewards": np.zeros(3)}, "rewards: dim 0 got 3, wanted 4"),
        ({"group_offsets": np.zeros(0, np.int64)}, "group_offsets: dim 0 got 0, wanted the number of groups"),
        ({"group_offsets": np.array([0, 5])}, r"group_offsets: offset 1 got 5, wanted 4 \(the number of rows\)"),
        ({"group_offsets": np.array([0, 3, 2, 4])}, "group_offsets: offset 2 got 2, wanted at least 3"),
        ({"group_offsets": np.array([-1, 4])}, "group_offsets: offset 0 got -1, wanted 0"),
    ],
)
def test_bad_arrays_are_refused(changes, message):
    from vcr1_fast import _native

    arguments = {
        "parts": np.zeros((2, 4)), "weights": np.ones(2), "group_offsets": np.array([0, 4]), "scale": "group",
        "std_floor": 1e-4, "rewards": np.empty(4), "advantages": np.empty(4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _native.group_advantages(**{**arguments, **changes})


@needs_native
def test_fused_wants_as_many_overlaps_as_answers():
    from vcr1_fast import _native

    rows, starts = np.zeros((4, 2)), np.arange(5)
    with pytest.raises(ValueError, match="overlaps: dim 0 got 4, wanted 3"):
        _native.interval_advantages(
            rows, starts, rows, starts, "set", np.zeros((0, 3)), np.ones(1), np.array([0, 3]), "group", 1e-4,
            np.empty(4), np.empty(3), np.empty(3),
        )  # fmt: skip


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("what", ["interval", "track"])
def test_cuda_equals_cpu(scale, what):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made = problem(1, num_groups=300)
    cuda = fused(
        made,
        scale,
        what,
        to=lambda array: torch.as_tensor(array, device="cuda"),
        empty=lambda count: torch.empty(count, dtype=torch.float64, device="cuda"),
        suffix="_cuda",
        stream=torch.cuda.current_stream().cuda_stream,
    )
    for got, wanted in zip(cuda, fused(made, scale, what), strict=True):
        np.testing.assert_allclose(got.cpu().numpy(), wanted, rtol=1e-6, atol=1e-6)


@needs_cuda
@pytest.mark.gpu
def test_cuda_advantages_alone_and_a_broken_group():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from vcr1_fast import _native

    parts = torch.tensor([[0.0, 1.0, 2.0, 1.0, 1.0, 3.0]], dtype=torch.float64, device="cuda")
    weights = torch.ones(1, dtype=torch.float64, device="cuda")
    rewards, advantages = torch.full((2, 6), 7.0, dtype=torch.float64, device="cuda").unbind()
    offsets = torch.tensor([0, 3, 99], device="cuda")  # the second group ends beyond the answers
    stream = torch.cuda.current_stream().cuda_stream
    _native.group_advantages_cuda(parts, weights, offsets, "none", 1e-4, rewards, advantages, stream)
    assert advantages.tolist() == [-1.0, 0.0, 1.0, 7.0, 7.0, 7.0]
