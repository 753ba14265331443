"""One update of the original's size in miniature: two prompts, eight answers each, a policy and a reference model.

All of it follows from integer formulas and names, so that every version of every library makes the same case; only
numpy and torch are needed. What the original's own loss gives for it stands in data/original_loss.json, see
test_golden_original.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

VOCABULARY, PAD, STOP, IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END = 64, 0, 1, 59, 60, 61, 62
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "bos_token_id": PAD, "eos_token_id": STOP, "pad_token_id": PAD,
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
    "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2,
}  # fmt: skip
TOKEN_IDS = {
    "image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD,
    "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
}  # fmt: skip
ROPE_THETA, MROPE_SECTION = 100.0, [2, 1, 1]
SECOND_PER_GRID_S = 1.0  # 2 fps: the only rate at which the original scores at the positions that it samples at
REFERENCE_DISTANCE = 0.2  # of the reference's weights from the policy's, in their own size


@dataclass(frozen=True)
class Group:
    """One prompt with its answers. Rewards: one list for each of the original's reward functions, in its order."""

    name: str
    num_words: int
    grid_thw: tuple[int, int, int]
    lengths: tuple[int, ...]  # of the answers, which end with STOP but for those of the largest length
    rewards: tuple[tuple[float, ...], ...]  # format, IoU

    @property
    def token_ids(self) -> Tensor:
        """[L]: words, the video, three more words."""
        t, h, w = self.grid_thw
        words = integers(f"{self.name}/words", self.num_words + 3, 2, 50)
        video = [VISION_START, *[VIDEO_PAD] * (t * h * w // 4), VISION_END]
        return torch.tensor([*words[: self.num_words], *video, *words[self.num_words :]])

    @property
    def patches(self) -> Tensor:
        """[P, 1176], the size of normalised pixels."""
        t, h, w = self.grid_thw
        return 8 * uniform(f"{self.name}/patches", (t * h * w, 1176))

    def answer(self, index: int) -> list[int]:
        length = self.lengths[index]
        ids = integers(f"{self.name}/answer/{index}", length, 2, 50)
        return ids if length == max(self.lengths) else [*ids[:-1], STOP]


GROUPS = (
    Group(
        "a", 5, (3, 4, 8), (4, 9, 1, 6, 3, 7, 5, 2),
        ((1, 1, 0, 1, 0, 1, 1, 0), (0.25, 0.75, 0.0, 0.5, 0.0, 0.9, 0.1, 0.3)),
    ),
    Group(
        "b", 9, (2, 8, 4), (8, 3, 8, 5, 6, 4, 7, 2),
        ((1, 1, 1, 1, 0, 1, 1, 1), (0.0, 0.6, 0.2, 0.0, 0.0, 0.45, 1.0, 0.3)),
    ),
)  # fmt: skip


def _hashes(name: str, count: int) -> np.ndarray:
    """[count] uint32: MurmurHash3's finaliser of index * odd + crc32(name)."""
    x = np.arange(1, count + 1, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Multiples of 2**-24 in [-0.5, 0.5), exact in float32."""
    values = (_hashes(name, int(np.prod(shape))) >> np.uint32(8)).astype(np.float64) * 2.0**-24 - 0.5
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def integers(name: str, count: int, low: int, high: int) -> list[int]:
    """In [low, high)."""
    return [low + int(value) % (high - low) for value in _hashes(name, count)]


def weights(shapes: Mapping[str, tuple[int, ...]], is_reference: bool = False) -> dict[str, Tensor]:
    """Checkpoint name -> float32 weight: matrices of standard deviation 1 / sqrt(inputs), so that a wrong position or
    mask would show, norms around 1, biases around 0."""
    result: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        scale = 12**0.5 / float(np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.4
        values = scale * uniform(name, shape)
        if is_reference:
            values += REFERENCE_DISTANCE * scale * uniform(f"reference/{name}", shape)
        result[name] = 1 + values if len(shape) == 1 and name.endswith("weight") else values
    return result


def direction(name: str, shape: tuple[int, ...]) -> Tensor:
    """A float64 vector of length 1 in the shape of a weight: what its gradient is projected on."""
    vector = uniform(f"direction/{name}", shape).double()
    return vector / vector.norm()
