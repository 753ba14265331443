"""Replaying given completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.rollout.scripted_engine import ScriptedEngine
from vcr1_fast.types import Prompt, SamplingParams


@pytest.fixture
def prompt(make_prompt: Callable[..., Prompt]) -> Prompt:
    return make_prompt((1, 4, 4), "q", seed=1)  # example id "q:1"


def test_texts_and_ids_are_replayed(tiny_tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> None:
    im_end = tiny_tokenizer.get_vocab()["<|im_end|>"]
    raw = tiny_tokenizer("abc")["input_ids"]
    engine: RolloutEngine = ScriptedEngine(tiny_tokenizer, {"q:1": ["hi", raw, "unused"]})
    [[first, second]] = engine.generate([prompt], SamplingParams(2, 10))
    assert first.token_ids_R.tolist() == [*tiny_tokenizer("hi")["input_ids"], im_end]
    assert (first.text, first.finish_reason) == ("hi", "stop")
    assert first.logprobs_R.tolist() == [0.0, 0.0, 0.0] and first.logprobs_R.dtype == torch.float32
    assert (second.token_ids_R.tolist(), second.text, second.finish_reason) == (raw, "abc", "length")


def test_answers_are_cut_at_the_limit_with_their_log_probs(
    tiny_tokenizer: PreTrainedTokenizerFast, prompt: Prompt
) -> None:
    engine = ScriptedEngine(tiny_tokenizer, {"q:1": ["hi"]}, {"q:1": [[-1.0, -2.0, -3.0]]})
    [[cut]] = engine.generate([prompt], SamplingParams(1, 2))
    assert (cut.text, cut.finish_reason, cut.logprobs_R.tolist()) == ("hi", "length", [-1.0, -2.0])
    [[whole]] = engine.generate([prompt], SamplingParams(1, 3))
    assert (whole.finish_reason, whole.logprobs_R.tolist()) == ("stop", [-1.0, -2.0, -3.0])


def test_what_is_not_scripted_is_an_error(tiny_tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> None:
    with pytest.raises(ValueError, match="example 'q:1' is not scripted, the scripts begin with: other"):
        ScriptedEngine(tiny_tokenizer, {"other": ["a"]}).generate([prompt], SamplingParams(1, 5))
    with pytest.raises(ValueError, match="has 1 scripted answers, wanted num_completions 2"):
        ScriptedEngine(tiny_tokenizer, {"q:1": ["a"]}).generate([prompt], SamplingParams(2, 5))
    with pytest.raises(ValueError, match="has 2 tokens, but 1 log-probs"):
        ScriptedEngine(tiny_tokenizer, {"q:1": ["a"]}, {"q:1": [[0.0]]}).generate([prompt], SamplingParams(1, 5))


def test_every_weight_is_asked_for(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    asked: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("a", "b"):
            asked.append(name)
            yield name, torch.zeros(1)

    engine = ScriptedEngine(tiny_tokenizer, {})
    engine.load_weights(weights(), 3)
    assert asked == ["a", "b"] and engine.policy_version == 3
