"""Random rollout groups of a wanted size: what the step benchmark updates on."""

from __future__ import annotations

import torch

from vcr1_fast.prompts.positions import mrope_positions
from vcr1_fast.types import Completion, Example, IntervalTruth, Patches, Prompt, RolloutGroup

WORDS = (20, 200)  # ids drawn for text: words of the tiny model's vocabulary, and of any larger one
TEXT_AFTER_VIDEO = 10


def random_group(
    grid: tuple[int, int, int], num_text: int, completion_lens: tuple[int, ...], video_token_id: int
) -> RolloutGroup:
    """A prompt of `num_text` words around one video, and completions of the given lengths with random advantages.

    Args:
        grid: frame pairs, patches down, patches across; 2 x 2 patches are one token.
    """
    generator = torch.Generator().manual_seed(0)
    num_video = grid[0] * grid[1] * grid[2] // 4
    words = torch.randint(*WORDS, (num_text,), generator=generator)
    video = torch.full((num_video,), video_token_id)
    ids = torch.cat([words[:-TEXT_AFTER_VIDEO], video, words[-TEXT_AFTER_VIDEO:]])
    positions = mrope_positions(ids, [grid], [1.0], video_token_id, tokens_per_second=2)
    patches = Patches(torch.randn(num_video * 4, 1176, generator=generator), grid, 1.0, 2 * grid[0], float(grid[0]))
    example = Example("bench", "temporal_grounding", "none", "none", 1.0, IntervalTruth(((0.0, 1.0),)))
    completions = tuple(
        Completion(torch.randint(*WORDS, (length,), generator=generator), torch.zeros(length), "stop")
        for length in completion_lens
    )
    advantages = tuple(torch.randn(len(completion_lens), generator=generator).tolist())
    return RolloutGroup(Prompt(example, ids, positions, (patches,)), completions, 1, advantages=advantages)
