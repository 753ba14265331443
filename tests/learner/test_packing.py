"""What a packed row holds, by hand and by property."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vcr1_kernels.prefix_attention import PrefixGroup

from vcr1_fast.learner.packing import assign_rows, num_packed_tokens, num_unshared_tokens, pack, placeholder

CPU = torch.device("cpu")


def test_two_groups_by_hand(make_group):
    # prompt: 5 words + vision start + 3 * 4 * 8 / 4 = 24 video + vision end + 3 words = 34 tokens
    first, second = make_group(0, (3, 1)), make_group(1, (0, 2))
    batch = pack([first, second], [[0.5, 0.25], [1.0, 2.0]])
    assert batch.layout == (PrefixGroup(0, 34, (2, 0)), PrefixGroup(36, 34, (0, 1)))
    assert batch.num_tokens == 34 + 2 + 34 + 1
    # first token of each completion is predicted by its prompt's last row
    assert batch.scored_row_N.tolist() == [33, 34, 35, 33, 69, 70]
    assert batch.sequence_N.tolist() == [0, 0, 0, 1, 3, 3]
    assert batch.weight_N.tolist() == [0.5, 0.5, 0.5, 0.25, 2.0, 2.0]
    targets = [*first.completions[0].token_ids_R, *first.completions[1].token_ids_R, *second.completions[1].token_ids_R]
    assert batch.target_N.tolist() == targets
    assert batch.token_ids_T[34:36].tolist() == first.completions[0].token_ids_R[:2].tolist()
    after = first.prompt.next_position
    assert batch.position_ids_3T[:, 34:36].tolist() == [[after, after + 1]] * 3
    assert batch.num_sequences == 4
    assert batch.num_unshared_tokens == 2 * 34 + 2 + 2 * 34 + 1


def test_every_completion_restarts_at_the_same_position(make_group):
    group = make_group(2, (4, 4, 4))
    batch = pack([group], [[1.0] * 3])
    assert batch.position_ids_3T[:, 34:37].equal(batch.position_ids_3T[:, 37:40])
    assert batch.position_ids_3T[:, 34:37].equal(batch.position_ids_3T[:, 40:43])


@given(sizes=st.lists(st.integers(1, 120), max_size=40), budget=st.integers(1, 100))
def test_rows_hold_each_group_once_within_the_budget(sizes, budget):
    rows = assign_rows(sizes, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(len(row) == 1 or sum(sizes[i] for i in row) <= budget for row in rows)
    assert rows == sorted(rows)


def test_best_fit_by_hand():
    # 6 and 4 fill a row of 10; 5 and 5 another; 3 is left over; 12 is above the budget and goes alone
    assert assign_rows([5, 6, 3, 12, 4, 5], 10) == [[0, 5], [1, 4], [2], [3]]


def test_sizes_are_those_of_the_packed_row(make_group):
    group = make_group(3, (7, 0, 1))
    batch = pack([group], [[1.0] * 3])
    assert num_packed_tokens(group) == batch.num_tokens == 34 + 6
    assert num_unshared_tokens(group) == batch.num_unshared_tokens == 3 * 34 + 6


def test_empty_batch_is_refused():
    with pytest.raises(ValueError, match="no groups"):
        pack([], [])


def test_placeholder_runs_and_weighs_nothing(make_model):
    from vcr1_fast.learner.model import PolicyModel
    from vcr1_fast.learner.objective import grpo_objective
    from vcr1_fast.settings.config import AlgorithmConfig, ModelConfig

    hf = make_model()
    policy = PolicyModel(hf, ModelConfig(), torch.float32)
    batch = policy.device_batch(placeholder(policy.family, hf.config, False, CPU, torch.float32))
    loss, _ = policy(batch, 1.0, grpo_objective(batch, None, AlgorithmConfig()))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in hf.parameters())
