"""The tiny model's tokenizer: Qwen's special tokens, all bytes, and whole words of our own prompts and answers.

A vocabulary of whole pieces without merges (`ignore_merges`): a piece that is not listed falls back to its bytes, so
any text survives a round trip. One box costs 5 tokens (`[0.12`, `,0.30`, `,0.40`, `,0.55`, `],`), 8 boxes 41.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS: tuple[str, ...] = (  # the order fixes the ids 0..7
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MAX_VOCABULARY = 720
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PIECE = "|".join(
    (
        r"</?[a-z]+>",  # tags
        r" (?=\[0\.|</?[a-z]+>)",  # a blank before these stays apart, so that they are the same token everywhere
        r"[\[,]0\.\d\d(?!\d)",  # one coordinate with its separator
        r"\]\]|\],",
        r"\.\d0(?!\d)",  # tenths of a second, as two decimals
        r" to (?=\d)",
        r" ?[a-d][1-4](?![A-Za-z0-9])",  # a cell of the 4 x 4 reading grid
        r" ?[A-Za-z]+",
        r" ?\d",  # digits one by one
        r"\n+",
        r" ?[^\sA-Za-z\d]",
        r"\s+",
    )
)


def build_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary holds every piece of `corpus` (questions, answers, think texts), whole.

    Deterministic: ids depend only on the corpus. Raises ValueError when the vocabulary would pass 720 entries.
    """
    vocabulary: dict[str, int] = {}
    to_byte_text = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_text = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [_as_byte_text(to_byte_text, piece) for piece in (*_answer_pieces(), *_corpus_pieces(corpus))]
    for piece in (*SPECIAL_TOKENS, *bytes_text, *pieces):
        vocabulary.setdefault(piece, len(vocabulary))
    if len(vocabulary) > MAX_VOCABULARY:
        raise ValueError(f"the tiny vocabulary has {len(vocabulary)} entries, wanted at most {MAX_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Split(Regex(_PIECE), behavior="isolated"), to_byte_text]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


def _answer_pieces() -> list[str]:
    """Numbers are listed in full, whatever the corpus happens to contain."""
    hundredths = [f"0.{k:02d}" for k in range(100)]
    cells = [f" {column}{row}" for column in "abcd" for row in range(1, 5)]
    digits = [f"{space}{k}" for space in ("", " ") for k in range(10)]
    tenths = [f".{k}0" for k in range(10)]
    return [*(f"[{h}" for h in hundredths), *(f",{h}" for h in hundredths), *cells, *digits, *tenths, "]]", "],"]


def _corpus_pieces(corpus: Iterable[str]) -> list[str]:
    counts = Counter(piece for text in corpus for piece in re.findall(_PIECE, text))
    return sorted(piece for piece in counts if not re.fullmatch(r"[\[,]0\.\d\d|.", piece))


def _as_byte_text(pre_tokenizer: pre_tokenizers.ByteLevel, piece: str) -> str:
    """How the byte-level vocabulary spells a piece (a blank becomes `Ġ`)."""
    split: Sequence[tuple[str, tuple[int, int]]] = pre_tokenizer.pre_tokenize_str(piece)
    return "".join(text for text, _ in split)
