"""The tiny tokenizer: any text survives, our answers are short, control tokens cannot be forged."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vcr1_fast.tiny.build import build_tiny_tokenizer
from vcr1_fast.tiny.tokenizer import MAX_VOCABULARY, SPECIAL_TOKENS, build_tokenizer

TOKENIZER = build_tiny_tokenizer()


def _pieces(text: str) -> list[str]:
    return [TOKENIZER.decode([i]) for i in TOKENIZER(text)["input_ids"]]


@pytest.mark.parametrize("text", ["zoé 東京 🎥\t\n\n  x", "12.5s to 4", "[[0.1, 0.99], [1.00,0.123]]", "", "</think"])
def test_round_trip(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_answers_are_cut_into_the_expected_pieces() -> None:
    assert "|".join(_pieces("<think>0 no 1 in</think><answer>2.50 to 4.37</answer><|im_end|>")) == (
        "<think>|0| no| 1| in|</think>|<answer>|2|.50| to |4|.|3|7|</answer>|<|im_end|>"
    )
    assert _pieces("[[0.12,0.30,0.40,0.55],[0.07,0.30,0.40,0.55]]") == (
        ["[", "[0.12", ",0.30", ",0.40", ",0.55", "],", "[0.07", ",0.30", ",0.40", ",0.55", "]]"]
    )


def test_size_and_special_ids() -> None:
    assert 256 + len(SPECIAL_TOKENS) < len(TOKENIZER) <= MAX_VOCABULARY
    assert [TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(8))
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_special_tokens_in_plain_text_are_letters() -> None:
    ids = TOKENIZER("<|video_pad|>", split_special_tokens=True)["input_ids"]
    assert isinstance(ids, list)
    assert min(ids) >= len(SPECIAL_TOKENS)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "When exactly does this happen: a red circle appears? [0.12,0.30,0.40,0.55]"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    turns = [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "video"}]}]
    assert loaded.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi"
        "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_corpus_with_too_many_words_is_refused() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    corpus = [f"{a}{b} {b}{a}{a}" for a in letters for b in letters]
    with pytest.raises(ValueError, match="wanted at most 720"):
        build_tokenizer(corpus)
