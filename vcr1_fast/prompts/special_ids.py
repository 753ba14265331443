"""The ids of Qwen's special tokens, looked up by name in the tokenizer, for prompt builder and engines."""

from __future__ import annotations

from dataclasses import dataclass, fields

from transformers import PreTrainedTokenizerBase

from vcr1_fast.settings.error import ConfigError

TOKEN_TEXT = {
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "end_of_text": "<|endoftext|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "vision_pad": "<|vision_pad|>",
    "image_pad": "<|image_pad|>",
    "video_pad": "<|video_pad|>",
}


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Token ids; the values of the published checkpoints are 151643 (end_of_text) to 151656 (video_pad)."""

    im_start: int
    im_end: int
    end_of_text: int
    vision_start: int
    vision_end: int
    vision_pad: int
    image_pad: int
    video_pad: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
        """Look every token up. Raises ConfigError naming those that the tokenizer lacks."""
        vocabulary = tokenizer.get_vocab()
        missing = [text for text in TOKEN_TEXT.values() if text not in vocabulary]
        if missing:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise ConfigError(
                f"the tokenizer {name} has no token {', '.join(missing)}: use the tokenizer of the checkpoint"
            )
        return cls(**{name: vocabulary[text] for name, text in TOKEN_TEXT.items()})

    @property
    def stop(self) -> tuple[int, ...]:
        """Ids that end a completion, the two of Qwen2.5-VL's generation config."""
        return (self.im_end, self.end_of_text)

    @property
    def vision(self) -> tuple[int, ...]:
        """Ids that stand for pictures; an answer that held one would not match its own video on the next forward."""
        return (self.vision_start, self.vision_end, self.vision_pad, self.image_pad, self.video_pad)

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))
