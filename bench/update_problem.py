"""What `python -m bench update` runs on: one clip and one question with P prompt tokens, as pictures or as a video.

Both layouts hold the same pixels and equally many tokens, so that a step on either does the same work:

    pictures  <start> 16 places <end> for each of T pictures, as a trainer has it that takes pictures alone
    video     <start> 16 T places <end>; each picture is shown for the two frames that one step of a video stands for

The two marks that a picture needs and a video does not are made up for by words in the question.

Shape letters: T pictures, G completions, R tokens of one, L prompt tokens, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vcr1_fast.learner.advantages import with_advantages
from vcr1_fast.prompts.positions import mrope_positions
from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.types import Completion, Example, Frames, IntervalTruth, Patches, Prompt, RolloutGroup
from vcr1_fast.video.patches import to_patches

Layout = Literal["pictures", "video"]
LAYOUTS: tuple[Layout, ...] = ("pictures", "video")
SIDE_PX = 112  # 8 x 8 patches of a picture, 16 tokens
TOKENS_PER_PICTURE = 16
TOKENS_PER_SECOND = 2  # of the published checkpoints and of the packaged one
CHECKSUM = 9973  # a prime
NO_CLIPPING = 1e9  # a bound of the gradient's norm: the norm is taken, and the gradient stays what it is
FILLING_WORD = " the"  # one token of the packaged tokenizer
Gradients = dict[str, Tensor]  # by name of the model's weights
PLACES = {"pictures": "<|image_pad|>", "video": "<|video_pad|>"}


@dataclass(frozen=True)
class Point:
    """One workload. `num_pictures` T, `prompt_len` P, `completion_len` R, `num_completions` G."""

    num_pictures: int
    prompt_len: int
    completion_len: int = 60
    num_completions: int = 8

    @property
    def name(self) -> str:
        return f"P={self.prompt_len} R={self.completion_len} G={self.num_completions}"


POINTS = {196: Point(8, 196), 597: Point(30, 597), 1096: Point(58, 1096)}


@dataclass(frozen=True)
class Problem:
    """A point with its question and its pixels, for one layout."""

    point: Point
    layout: Layout
    tokenizer: Any

    @cached_property
    def pictures(self) -> np.ndarray:
        """[T, 112, 112, 3] uint8 noise."""
        shape = (self.point.num_pictures, SIDE_PX, SIDE_PX, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    @cached_property
    def question(self) -> str:
        """With as many words as the prompt needs to have P tokens. Raises ValueError where P is too small."""
        short = len(self._ids("When?"))
        missing = self.point.prompt_len - short
        if missing < 0:
            raise ValueError(f"{self.point.name}: the prompt has {short} tokens without any filling, wanted fewer")
        return "When?" + FILLING_WORD * missing

    @property
    def content(self) -> list[dict[str, Any]]:
        """Of the user's message: pictures or video first, as TRL puts them, then the question."""
        kinds = ["video"] if self.layout == "video" else ["image"] * self.point.num_pictures
        return [{"type": kind} for kind in kinds]

    def token_ids(self) -> Tensor:
        """[P] int64, written by the chat template, places expanded."""
        return torch.tensor(self._ids(self.question))

    def _ids(self, question: str) -> list[int]:
        message = {"role": "user", "content": [*self.content, {"type": "text", "text": question}]}
        text = self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        each = TOKENS_PER_PICTURE * (self.point.num_pictures if self.layout == "video" else 1)
        place = PLACES[self.layout]
        return self.tokenizer(text.replace(place, place * each))["input_ids"]

    def as_video(self, ids_L: Tensor) -> Tensor:
        """The same with a video's places for pictures'."""
        special = SpecialIds.of(self.tokenizer)
        return torch.where(ids_L == special.image_pad, special.video_pad, ids_L)

    def patches(self) -> Patches:
        """One step of the video for each picture."""
        twice = torch.from_numpy(self.pictures).repeat_interleave(2, dim=0)
        times_s = torch.arange(len(twice), dtype=torch.float64) / TOKENS_PER_SECOND
        return to_patches(Frames(twice, times_s, 2.0, len(twice) / 2.0, "none"))

    def prompt(self) -> Prompt:
        """As the trainer has it. Pictures are to it so many videos of one step, which is what they are to the model:
        the same positions, and the tower sees one step at a time. The places' own embedding is never used."""
        ids_L, patches = self.as_video(self.token_ids()), self.patches()
        steps, *frame = patches.grid_thw
        grids: list[Any] = [(1, *frame)] * steps if self.layout == "pictures" else [patches.grid_thw]
        seconds = [patches.second_per_grid_s] * len(grids)
        video_pad = SpecialIds.of(self.tokenizer).video_pad
        positions = mrope_positions(ids_L, grids, seconds, video_pad, TOKENS_PER_SECOND)
        example = Example("bench", "temporal_grounding", "none", "none", 1.0, IntervalTruth(((0.0, 1.0),)))
        return Prompt(example, ids_L, positions, (patches,))


@dataclass(frozen=True)
class StepResult:
    """One whole step: prompt, G answers, rewards, and one update."""

    total_ms: float
    update_ms: float  # of that: loss, backward, clipping, optimizer
    prompt_ids: list[int]
    completion_ids: list[list[int]]  # [G][R]
    loss: float
    gradients: Gradients = field(default_factory=dict)  # only where asked for


def reward(token_ids: list[int]) -> float:
    """A checksum in [0, 1): costs nothing, and differs between answers, so that every group has a gradient."""
    return sum((index + 1) * token for index, token in enumerate(token_ids)) % CHECKSUM / CHECKSUM


def group_of(prompt: Prompt, completion_ids: list[list[int]]) -> RolloutGroup:
    """The answers with their rewards and advantages. Raises ValueError where all rewards are equal: ours would skip
    the group, and its time would be none."""
    completions = tuple(
        Completion(ids_R, torch.zeros(len(ids_R)), "length") for ids_R in map(torch.tensor, completion_ids)
    )
    rewards = tuple(reward(ids) for ids in completion_ids)
    if len(set(rewards)) == 1:
        raise ValueError(f"the {len(rewards)} answers of the group have one reward, {rewards[0]}: run again")
    return with_advantages([RolloutGroup(prompt, completions, 1, rewards=rewards)])[0]
