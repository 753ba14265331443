"""Does the order of the frames matter? Answers to the same clip with its frames shuffled, beside those in order.

T-GRPO (Video-R1, 2503.21776): G answers to the clip, and G / 2 to the shuffled clip, which are only compared with and
never trained on. p and q are the mean scores of the two. Where p >= 0.8 q every correct answer in order earns the part
"order" (there worth 0.3: set task.reward_weights.order); where the shuffled clip does better, nobody does. 0.8 and the
test for correct (above 0.1) are those of the released code. The unit that is shuffled is what the vision tower sees as
one time step, a pair of frames.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import torch

from vcr1_fast.tasks.shaping import Parts, is_correct, scores
from vcr1_fast.types import Patches, Prompt, RolloutGroup

MIN_RATIO = 0.8  # of the mean score in order to that of the shuffled clip
SHUFFLED_SEED = 1 << 55  # added to the seed of the step: the shuffled clip is not answered with the same random numbers


def shuffled_prompt(prompt: Prompt, seed: int) -> Prompt:
    """The prompt with the pairs of frames of each video in another order; tokens and positions stay. Of one pair: as it
    is.

    A pure function of the example's id and the seed.
    """
    stream = np.random.Philox(np.random.SeedSequence([seed % 2**128, zlib.crc32(prompt.example.id.encode())]))
    return replace(prompt, media=tuple(_shuffled(patches, stream) for patches in prompt.media))


def _shuffled(patches: Patches, stream: np.random.Philox) -> Patches:
    num_pairs, embeddings_MD = patches.grid_thw[0], patches.embeddings_MD
    order = torch.from_numpy(np.argsort(stream.random_raw(num_pairs), kind="stable"))
    if bool((order == torch.arange(num_pairs)).all()):
        order = order.flip(0)
    if embeddings_MD is not None:  # the tower sees one pair at a time, so its output moves with the pair
        embeddings_MD = _reordered(embeddings_MD, order)
    return replace(patches, values_PC=_reordered(patches.values_PC, order), embeddings_MD=embeddings_MD)


def has_order(prompt: Prompt) -> bool:
    """Whether it shows a video; the others have no part "order"."""
    return any(patches.kind == "video" for patches in prompt.media)


def _reordered(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of len(order) equal pieces, in another order; nothing stays nothing."""
    if rows.shape[0] == 0:
        return rows
    return rows.reshape(len(order), -1, rows.shape[1])[order.to(rows.device)].reshape(rows.shape)


def order_part(group: RolloutGroup, shuffled: Parts) -> tuple[float, ...]:
    """1 for the correct answers of a group that does well enough in order, else 0.

    Args:
        shuffled: reward parts of the answers to the shuffled clip.
    """
    drawn = [s for s, c in zip(scores(group.reward_parts), group.completions, strict=True) if c.is_sampled]
    other = scores(shuffled)
    needs_order = sum(drawn) / len(drawn) >= MIN_RATIO * sum(other) / len(other)
    return tuple(float(ok and needs_order) for ok in is_correct(group.reward_parts))
