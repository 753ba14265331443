"""Compiled advantages equal the plain ones bit for bit, and bad arrays are refused."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vcr1_fast import native
from vcr1_fast.tasks import reward_groups

needs_native = pytest.mark.skipif(not native.is_available(), reason=native.unavailable_reason() or "")
needs_cuda = pytest.mark.skipif(not native.has_cuda(), reason=f"native module: {native.status()}")
SCALES = ("group", "batch", "none")

reward = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(-3, 3), st.floats())
groups = st.lists(st.lists(reward, max_size=9), max_size=6)


def bits(values):
    return [value.hex() for value in values]


@needs_native
@settings(max_examples=400)
@given(groups, st.sampled_from(SCALES))
@example([[-0.0, 1.0, -1.0]], "none")  # the mean is 0: the sign of the first reward is that of its advantage
def test_advantages_are_bitwise_equal(lists, scale):
    rewards = [value for group in lists for value in group]
    offsets = [0, *np.cumsum([len(group) for group in lists], dtype=int).tolist()]
    plain = reward_groups.group_advantages_plain(rewards, offsets, scale)
    assert bits(reward_groups.group_advantages_native(rewards, offsets, scale)) == bits(plain)


@needs_native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "std"}, "scale: value got 'std', wanted 'group', 'batch' or 'none'"),
        ({"rewards": np.zeros(3)}, "rewards: dim 0 got 3, wanted 4"),
        ({"group_offsets": np.zeros(0, np.int64)}, "group_offsets: dim 0 got 0, wanted the number of groups"),
        ({"group_offsets": np.array([0, 5])}, r"group_offsets: offset 1 got 5, wanted 4 \(the number of rows\)"),
    ],
)
def test_bad_arrays_are_refused(changes, message):
    from vcr1_fast import _native

    arguments = {
        "rewards": np.zeros(4), "group_offsets": np.array([0, 4]), "scale": "group",
        "advantages": np.empty(4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _native.group_advantages(**{**arguments, **changes})


@needs_cuda
@pytest.mark.gpu
def test_a_broken_group_is_left_as_it_was_on_cuda():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from vcr1_fast import _native

    rewards = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0, 3.0], dtype=torch.float64, device="cuda")
    advantages = torch.full((6,), 7.0, dtype=torch.float64, device="cuda")
    offsets = torch.tensor([0, 3, 99], device="cuda")  # the second group ends beyond the answers
    stream = torch.cuda.current_stream().cuda_stream
    _native.group_advantages_cuda(rewards, offsets, "none", advantages, stream)
    assert advantages.tolist() == [-1.0, 0.0, 1.0, 7.0, 7.0, 7.0]
