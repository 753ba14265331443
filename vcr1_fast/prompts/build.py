"""Example -> Prompt: asks the task for its question, reads videos and images, lays out tokens and positions.

Called by the prompt stream of a training run and by evaluation.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vcr1_fast.prompts.limits import PromptLimits
from vcr1_fast.prompts.positions import mrope_positions
from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example, Patches, Prompt, SampleError
from vcr1_fast.video.reader import ReaderError
from vcr1_fast.video.source_name import SourceName

MAX_REASON_LETTERS = 1000
MARK = re.compile("<(video|image)>")  # where one stands in a question, as in LLaVA's data
SYSTEM_MESSAGE = "You are a helpful assistant."  # the default of Qwen's chat template; the original trains with it


@dataclass(frozen=True, slots=True)
class _Source:
    """A video or an image that is still to be read."""

    name: str

    @property
    def kind(self) -> str:
        return "image" if SourceName.parse(self.name).is_image else "video"


class PromptBuilder:
    """Builds prompts of the original's layout: one user turn, text first, then the video, under Qwen's system message.
    With `video_first` the other way round, as VideoChat-R1.5 and Qwen's own examples have it. Several videos and images
    stand there together, or each where a mark in the question, `<video>` or `<image>`, has its place. With
    `writes_times` the time of each pair of frames stands before it in words, `<12.5 seconds>`, and each pair is a video
    of its own to the position rule, as in Qwen3-VL; without, positions alone tell the time.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, Task],
        read: Callable[[str], Patches],
        *,
        prefetch: Callable[[Sequence[str]], None] = lambda videos: None,
        limits: PromptLimits | None = None,
        video_first: bool = False,
        writes_times: bool = False,
        tokens_per_second: float = 2.0,
    ) -> None:
        """`read` gives the patches of one of `Example.sources` and raises SampleError if it cannot; `prefetch` has them
        read ahead. `limits` None: nothing is too long. `tokens_per_second`: of the model's vision config; 2 in every
        published Qwen2.5-VL.

        Raises ValueError when the tokenizer lacks a special token.
        """
        self.tokenizer = tokenizer
        self.tasks = tasks
        self.special_ids = SpecialIds.of(tokenizer)
        self._read, self._prefetch = read, prefetch
        self.limits = limits
        self.video_first, self.writes_times = video_first, writes_times
        self.tokens_per_second = tokens_per_second
        self._newline = self._text_ids("\n")

    def placing(self, video_first: bool) -> PromptBuilder:
        """The same, but for where the video stands."""
        builder = copy.copy(self)
        builder.video_first = video_first
        return builder

    def reading(
        self, read: Callable[[str], Patches], prefetch: Callable[[Sequence[str]], None], limits: PromptLimits | None
    ) -> PromptBuilder:
        """The same questions about videos that are read in another way."""
        builder = copy.copy(self)
        builder._read, builder._prefetch, builder.limits = read, prefetch, limits
        return builder

    def read_ahead(self, examples: Sequence[Example]) -> None:
        """A hint that these will be built next, in this order."""
        self._prefetch([source for example in examples for source in example.sources])

    def build(self, example: Example) -> Prompt:
        """The prompt of one example. Raises SampleError when its video or its text cannot be used, whatever goes wrong,
        and ReaderError when no video can be read any more."""
        with _blamed_on(example, "building its prompt"):
            return self._build(example)

    def _build(self, example: Example) -> Prompt:
        pieces = self._pieces(self.tasks[example.task].question(example), example)
        read = [self._read(piece.name) if isinstance(piece, _Source) else piece for piece in pieces]
        media = [piece for piece in read if isinstance(piece, Patches)]
        token_ids_L = torch.tensor(self._layout(read, example), dtype=torch.int64)
        steps = [step for patches in media for step in self._grids(patches)]
        positions_3L = mrope_positions(
            token_ids_L,
            [grid for grid, _ in steps],
            [second_per_grid_s for _, second_per_grid_s in steps],
            self.special_ids.video_pad,
            self.tokens_per_second,
            self.special_ids.image_pad,
        )
        prompt = Prompt(example, token_ids_L, positions_3L, tuple(media))
        if self.limits is not None:
            self.limits.check_length(prompt)
            lengths_s = [patches.duration_s for patches in media if patches.kind == "video"]
            if len(lengths_s) == 1:
                self.limits.check_duration(example, lengths_s[0])
        return prompt

    def completion_ids(self, example: Example) -> Tensor:
        """[R] int64: the answer that supervised training teaches, ended by <|im_end|>. Raises SampleError."""
        with _blamed_on(example, "making its target"):
            target = self.tasks[example.task].target(example)
            return torch.tensor([*self._safe_ids(target, example), self.special_ids.im_end], dtype=torch.int64)

    def decode(self, token_ids: list[list[int]]) -> list[str]:
        """The texts of completions, without special tokens."""
        return self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)

    def _pieces(self, question: str, example: Example) -> list[str | _Source]:
        """Text, and what is shown between. Raises SampleError unless there are no marks, or one for each source."""
        sources = [_Source(name) for name in example.sources]
        parts = MARK.split(question)  # text, kind, text, ... text
        kinds: list[str] = parts[1::2]
        if not kinds:
            return [*sources, question] if self.video_first else [question, *sources]
        of_kind = {kind: [source for source in sources if source.kind == kind] for kind in ("video", "image")}
        if any(kinds.count(kind) != len(found) for kind, found in of_kind.items()):
            counts = [f"{kinds.count(kind)} <{kind}> for {len(found)} {kind}s" for kind, found in of_kind.items()]
            raise SampleError(
                example.id, f"its text has {' and '.join(counts)} of its row, wanted one mark for each, or none at all"
            )
        shown = [of_kind[kind].pop(0) for kind in kinds]
        return [piece for pair in zip(parts[::2], [*shown, ""], strict=True) for piece in pair if piece]

    def _has_times(self, patches: Patches) -> bool:
        return self.writes_times and patches.kind == "video"

    def _grids(self, patches: Patches) -> list[tuple[tuple[int, int, int], float]]:
        """What it is to the position rule: grids, each with the seconds of a step."""
        t, h, w = patches.grid_thw
        grids = [(1, h, w)] * t if self._has_times(patches) else [patches.grid_thw]
        return [(grid, patches.second_per_grid_s) for grid in grids]

    def _layout(self, pieces: Sequence[str | Patches], example: Example) -> list[int]:
        special, newline = self.special_ids, self._newline
        first, *others = pieces
        turn = self._safe_ids(f"user\n{first}", example) if isinstance(first, str) else self._text_ids("user\n")
        for piece in others if isinstance(first, str) else pieces:
            turn += self._safe_ids(piece, example) if isinstance(piece, str) else self._seen(piece)
        return [
            special.im_start,
            *self._text_ids(f"system\n{SYSTEM_MESSAGE}"),
            special.im_end,
            *newline,
            special.im_start,
            *turn,
            special.im_end,
            *newline,
            special.im_start,
            *self._text_ids("assistant\n"),
        ]

    def _seen(self, patches: Patches) -> list[int]:
        special = self.special_ids
        if not self._has_times(patches):
            pad = special.image_pad if patches.kind == "image" else special.video_pad
            return [special.vision_start, *[pad] * patches.num_tokens, special.vision_end]
        num_tokens = patches.num_tokens // patches.grid_thw[0]
        pair = [special.vision_start, *[special.video_pad] * num_tokens, special.vision_end]
        times = [self._text_ids(f"<{time_s:.1f} seconds>") for time_s in patches.pair_times_s]
        return [token_id for time in times for token_id in (*time, *pair)]

    def _text_ids(self, text: str) -> list[int]:
        # The flag is a state of the shared tokenizer object. All our text goes through here with the same value, so
        # threads that build prompts at the same time cannot switch it under each other.
        # Not verbose: what is too long is for `limits` to say.
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return ids["input_ids"]  # pyright: ignore

    def _safe_ids(self, text: str, example: Example) -> list[int]:
        """Ids of text from an annotation file, in which "<|video_pad|>" is ten letters and not a placeholder."""
        ids = self._text_ids(text)
        forged = set(ids) & set(self.special_ids.all)
        if forged:  # a tokenizer whose added tokens are not flagged special ignores split_special_tokens
            names = ", ".join(str(self.tokenizer.convert_ids_to_tokens(i)) for i in sorted(forged))
            raise SampleError(example.id, f"its text would become the control token {names}: remove it from the text")
        return ids


@contextlib.contextmanager
def _blamed_on(example: Example, doing: str) -> Iterator[None]:
    """Make any error a SampleError: a bug that one example meets, ours or that of a user's task, must not end a run."""
    try:
        yield
    except (SampleError, ReaderError):
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{doing} raised {type(error).__name__}: {error}".split())
        raise SampleError(example.id, reason[:MAX_REASON_LETTERS]) from error
