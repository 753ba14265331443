"""How prompts are put together under the two bounds, by hand."""

import dataclasses

import pytest
import torch

from tests.conftest import make_example, make_patches
from vcr1_fast.rollout.batches import in_batches
from vcr1_fast.types import Prompt, SampleError, SamplingParams

PATCHES = make_patches((1, 4, 4))
ONE = SamplingParams(num_completions=1, max_new_tokens=10)
BAD = SampleError("a.mp4", "broken")


def prompt(length: int) -> Prompt:
    return Prompt(make_example(str(length)), torch.zeros(length, dtype=torch.int64), torch.zeros(3, length), (PATCHES,))


def lengths(items, sampling, max_rows, max_tokens):
    batches = in_batches(iter(items), sampling, max_rows, max_tokens)
    return [[item.token_ids_L.numel() if isinstance(item, Prompt) else "bad" for item in batch] for batch in batches]


@pytest.mark.parametrize(
    ("max_rows", "max_tokens", "wanted"),
    [
        (99, 90, [[20, 20, 20], [40], [5, 5]]),  # 3 x 30 = 90; a fourth of 40 would make 4 x 50
        (99, 89, [[20, 20], [20], [40], [5, 5]]),  # 20 and 40 together: 2 x 50
        (99, 100, [[20, 20, 20], [40, 5], [5]]),
        (2, 1000, [[20, 20], [20, 40], [5, 5]]),
        (1, 1, [[20], [20], [20], [40], [5], [5]]),  # one always goes
    ],
)
def test_rows_and_tokens_bound_a_batch(max_rows, max_tokens, wanted):
    assert lengths([prompt(n) for n in (20, 20, 20, 40, 5, 5)], ONE, max_rows, max_tokens) == wanted


def test_a_prompt_is_kept_once_for_its_completions():
    group = dataclasses.replace(ONE, num_completions=4)  # 20 + 4 x 10 tokens and 4 rows each
    assert lengths([prompt(20)] * 3, group, 99, 120) == [[20, 20], [20]]
    assert lengths([prompt(20)] * 3, group, 7, 1000) == [[20], [20], [20]]


def test_what_is_no_prompt_goes_along():
    assert lengths([BAD, prompt(20), BAD, prompt(20), BAD], ONE, 1, 1000) == [["bad", 20, "bad"], [20, "bad"]]
    assert lengths([BAD, BAD], ONE, 1, 1) == [["bad", "bad"]]
    assert lengths([], ONE, 1, 1) == []


def test_no_more_is_read_than_the_next_prompt():
    read = []

    def items():
        for n in (20, 20, 20, 20):
            read.append(n)
            yield prompt(n)

    next(in_batches(items(), ONE, 2, 1000))
    assert len(read) == 3
