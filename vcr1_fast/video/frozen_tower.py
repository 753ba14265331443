"""A vision tower that is never trained: each clip goes through it once, engine and learner share what it gave.

Shape letters: P patches, C values of a patch, M video tokens, W width of what the tower gives for
one: D, the hidden size of the language model, and more where inner layers of it get features.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.families.family import ModelFamily
from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.learner.loading import compute_buffers, load_weights, read_config
from vcr1_fast.run.model_folder import stored_weights
from vcr1_fast.video.embed import embed_videos

if TYPE_CHECKING:
    from vcr1_fast.types import Patches


class FrozenTower:
    """`embed(patches)` -> [M, W]. A function of patches and weights alone, so that it can be kept on disk."""

    def __init__(self, family: ModelFamily, visual: nn.Module, digest: str) -> None:
        """`digest`: of the weights, see `load_frozen_tower`; it belongs into the key of whatever is kept."""
        self.family = family
        self.visual = visual
        self.digest = digest
        self._lock = threading.Lock()  # clips are read by several threads; two passes at once would double the memory

    @property
    def device(self) -> torch.device:
        return next(self.visual.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.visual.parameters()).dtype

    def embed(self, patches: Patches) -> Tensor:
        """[M, W] in the tower's dtype on its device, without gradient."""
        with self._lock, torch.no_grad():
            return embed_videos(self.family, self.visual, [patches], self.device, self.dtype)


def load_frozen_tower(
    folder: Path, dtype: torch.dtype, device: torch.device, kernels: KernelChoice | None = None
) -> FrozenTower:
    """The tower of a Hugging Face checkpoint; nothing else of it is read. `kernels` as for `PolicyModel`.

    Raises ConfigError when the checkpoint holds no tower or one of other shapes.
    """
    config = read_config(folder)
    family = family_of(config)
    with torch.device("meta"):
        visual = family.build_tower(config)
    for weight in visual.parameters():  # rotary frequencies stay float32: bfloat16 ones have 8 bits of position
        weight.data = weight.data.to(dtype)
    compute_buffers(visual)
    load_weights(visual, folder, device, family, f"{family.tower_name}.")
    visual.eval().requires_grad_(False)
    kernels = kernels or KernelChoice()
    kernels.switch_tower(visual, device, dtype)
    kernels.switch_operators(visual, family.operators, device)
    return FrozenTower(family, visual, _digest(visual, folder, family))


def _digest(visual: nn.Module, folder: Path, family: ModelFamily) -> str:
    """Of the tower's weights as they are stored, of its buffers, and of how it is shown pixels."""
    digest = hashlib.blake2b(repr(family.video).encode(), digest_size=16)
    stored = stored_weights(folder)
    own = {name: family.module_name(name) for name in sorted(stored)}
    for name in (name for name in own if own[name].startswith(f"{family.tower_name}.")):
        with safe_open(stored[name].file, "pt") as file:  # pyright: ignore[reportPrivateImportUsage]
            value = file.get_tensor(name)
        digest.update(own[name].encode())
        digest.update(value.contiguous().view(torch.uint8).numpy())
    for name, buffer in visual.named_buffers():
        digest.update(f"{name} {buffer.tolist()}".encode())
    return digest.hexdigest()
