"""Drawing a token: the distribution, what is left out, and the log-prob that is reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vcr1_fast.rollout.sampling import check_sampling, sample_tokens, seen_in_prompts, uniforms
from vcr1_fast.types import Prompt, SamplingParams

NONE = torch.tensor([], dtype=torch.long)
PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def draw(uniform: list[float], temperature: float = 1.0, suppressed: Tensor = NONE) -> list[int]:
    logits_BV = PROBABILITIES.log().expand(len(uniform), -1)
    uniform_B = torch.tensor(uniform, dtype=torch.float64)
    return sample_tokens(logits_BV, uniform_B, SamplingParams(1, 1, temperature), suppressed)[0].tolist()


def test_a_token_is_where_the_running_sum_first_exceeds_the_number() -> None:
    assert draw([0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 1 - 2**-53]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_suppressed_ids_are_never_drawn_and_the_rest_is_renormalised() -> None:
    # Without token 1: 1, 2, 3 of 6.
    assert draw([0.0, 0.16, 0.17, 0.49, 0.51, 1 - 2**-53], suppressed=torch.tensor([1])) == [0, 0, 2, 2, 3, 3]
    assert draw([0.0, 1 - 2**-53], suppressed=torch.tensor([0, 3])) == [1, 2]
    assert draw([0.5], temperature=0.0, suppressed=torch.tensor([1])) == [3]
    assert draw([0.5], temperature=0.001, suppressed=torch.tensor([1])) == [3]  # e^-288 of the suppressed one's mass


def test_top_k_keeps_what_equals_the_last_of_them() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0]]).expand(500, -1)
    uniform_B = torch.linspace(0, 1 - 2**-53, 500, dtype=torch.float64)
    token_B, _ = sample_tokens(logits_BV, uniform_B, SamplingParams(1, 1, top_k=2), NONE)
    assert set(token_B.tolist()) == {1, 2, 3, 5}


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [0, 3, 12, 500])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_the_distribution_is_that_of_transformers(temperature: float, top_p: float, top_k: int, penalty: float) -> None:
    """Its processors in the order of `generate`. Of N evenly spaced numbers, N p +- 1 fall on a token of probability p:
    the interval of its cumulative mass has that length."""
    num_drawn, num_tokens = 4000, 60
    generator = torch.Generator().manual_seed(top_k)
    logits_V = 2 * torch.randn(num_tokens, generator=generator)
    before = torch.randint(num_tokens, (1, 25), generator=generator)  # some twice: they are penalised once
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    wanted_V = processors(before, logits_V[None].clone()).softmax(-1)[0]  # pyright: ignore[reportArgumentType]

    seen_V = torch.zeros(num_tokens, dtype=torch.bool).index_fill(0, before[0], True)
    sampling = SamplingParams(1, 1, temperature, top_p, top_k=top_k, repetition_penalty=penalty)
    uniform_B = (torch.arange(num_drawn, dtype=torch.float64) + 0.5) / num_drawn
    token_B, _ = sample_tokens(logits_V.expand(num_drawn, -1), uniform_B, sampling, NONE, seen_V.expand(num_drawn, -1))
    counts_V = torch.bincount(token_B, minlength=num_tokens)
    assert counts_V[wanted_V == 0].sum() == 0
    assert (counts_V - num_drawn * wanted_V).abs().max() <= 1 + 1e-2  # float32 leaves 1e-6 of 4,000


def test_greedy_takes_the_largest_after_the_penalty_on_what_was_seen(make_prompt: Callable[..., Prompt]) -> None:
    logits_BV = torch.tensor([[3.0, -2.0, 1.0, 0.0], [3.0, -2.0, 1.0, 0.0]])
    seen_BV = torch.tensor([[True, True, False, True], [False, False, True, False]])
    sampling = SamplingParams(1, 1, temperature=0.0, repetition_penalty=4.0)  # 3 / 4 is below 1
    assert sample_tokens(logits_BV, torch.zeros(2), sampling, NONE, seen_BV)[0].tolist() == [2, 0]

    prompts = [make_prompt((2, 4, 4), text) for text in ("a", "no")]
    seen_BV = seen_in_prompts(prompts, 3, 288, torch.device("cpu"))
    assert seen_BV.shape == (6, 288)
    for row in range(6):
        assert set(seen_BV[row].nonzero().flatten().tolist()) == set(prompts[row // 3].token_ids_L.tolist())


@pytest.mark.parametrize(("temperature", "scored_at"), [(1.0, 1.0), (0.7, 0.7), (2.0, 2.0), (0.0, 1.0)])
def test_the_log_prob_is_over_all_but_suppressed_ids(temperature: float, scored_at: float) -> None:
    logits_BV = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 3
    uniform_B = torch.linspace(0, 0.99, 6, dtype=torch.float64)
    seen_BV = torch.arange(40).expand(6, -1) % 3 == 0
    sampling = SamplingParams(1, 1, temperature, 0.5, top_k=20, repetition_penalty=1.3)
    token_B, logprob_B = sample_tokens(logits_BV, uniform_B, sampling, torch.arange(10), seen_BV)
    logits_BV[:, :10] = -torch.inf
    expected_BV = (logits_BV.double() / scored_at).log_softmax(-1)
    torch.testing.assert_close(logprob_B.double(), expected_BV.gather(1, token_B[:, None])[:, 0], atol=2e-6, rtol=0)
    assert logprob_B.dtype == torch.float32


def test_a_large_vocabulary_does_not_bias_its_tail() -> None:
    # 152,064 equal logits: a float32 running sum would put up to 1e-3 of the mass in the wrong place.
    uniform_B = torch.tensor([0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    token_B, _ = sample_tokens(torch.zeros(4, 152_064), uniform_B, SamplingParams(1, 1), NONE)
    assert (token_B - torch.tensor([38_016, 76_032, 114_048, 152_063])).abs().max() <= 1


def test_uniforms_depend_on_seed_prompt_and_nothing_else() -> None:
    first = uniforms(1, 0, 5, 4)
    assert first.shape == (5, 4) and first.dtype == torch.float64
    assert torch.equal(uniforms(1, 0, 9, 4)[:5], first)  # a longer limit does not change the beginning
    assert not torch.equal(uniforms(2, 0, 5, 4), first) and not torch.equal(uniforms(1, 1, 5, 4), first)
    assert not torch.equal(uniforms(-1, 0, 5, 4), first)
    assert first.min() >= 0 and first.max() < 1
    assert uniforms(0, 0, 1, 2).tolist() == [
        [0.014067035665647709, 0.2577672456246177]
    ]  # frozen: numpy's raw words do not change


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_completions", 0), ("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1)),
        *(("top_k", -1), ("top_k", 1)),
        *(("repetition_penalty", 0.0), ("repetition_penalty", -1.2), ("repetition_penalty", float("inf"))),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    check_sampling(SamplingParams(1, 1))
    with pytest.raises(ValueError, match=f"sampling.{name} is {value}, wanted"):
        check_sampling(dataclasses.replace(SamplingParams(1, 1), **{name: value}))
