"""What a packed row holds, by hand and by property."""

from hypothesis import given
from hypothesis import strategies as st
from vcr1_kernels.prefix_attention import PrefixGroup

from vcr1_fast.learner.packing import assign_rows, pack


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


@given(sizes=st.lists(st.integers(1, 120), max_size=40), budget=st.integers(1, 100))
def test_rows_hold_each_group_once_within_the_budget(sizes, budget):
    rows = assign_rows(sizes, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(len(row) == 1 or sum(sizes[i] for i in row) <= budget for row in rows)
    assert rows == sorted(rows)


def test_best_fit_by_hand():
    # 6 and 4 fill a row of 10; 5 and 5 another; 3 is left over; 12 is above the budget and goes alone
    assert assign_rows([5, 6, 3, 12, 4, 5], 10) == [[0, 5], [1, 4], [2], [3]]
