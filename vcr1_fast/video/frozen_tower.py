"""A vision tower that is never trained: each clip goes through it once, engine and learner share what it gave.

Shape letters: P patches, C values of a patch, M video tokens, D hidden size of the language model.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.families.family import ModelFamily
from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.learner.loading import Checkpoint, empty_module, fill, weights_by_name
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.video.embed import embed_videos

if TYPE_CHECKING:
    from vcr1_fast.types import Patches

PREFIX = "model.visual."  # of the tower's weights in a whole model


class FrozenTower:
    """`embed(patches)` -> [M, D]. A function of patches and weights alone, so that it can be kept on disk."""

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
        """[M, D] in the tower's dtype on its device, without gradient."""
        with self._lock, torch.no_grad():
            return embed_videos(self.family, self.visual, [patches], self.device, self.dtype)


def load_frozen_tower(
    folder: Path, dtype: torch.dtype, device: torch.device, kernels: KernelChoice | None = None
) -> FrozenTower:
    """The tower of a Hugging Face checkpoint; nothing else of it is read. `kernels` as for `PolicyModel`.

    Raises ConfigError when the checkpoint holds no tower or one of other shapes.
    """
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    family = family_of(config)
    source = _TowerWeights(Checkpoint(folder, family))
    try:
        visual = empty_module(lambda: family.build_tower(config), dtype)
        fill(visual, weights_by_name(visual), source, device)
        digest = source.digest()
    except ConfigError as error:
        raise ConfigError(f"the vision tower is frozen, but {folder} holds another one: {error}") from None
    finally:
        source.checkpoint.close()
    visual.eval().requires_grad_(False)
    (kernels or KernelChoice()).switch_tower(visual, device, dtype)
    return FrozenTower(family, visual, digest)


class _TowerWeights:
    """The tower's part of a checkpoint, by the tower's own names. See `loading.WeightSource`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        shapes = checkpoint.shapes.items()
        self.shapes = {name.removeprefix(PREFIX): shape for name, shape in shapes if name.startswith(PREFIX)}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.checkpoint.rows(PREFIX + name, start, stop)

    def digest(self) -> str:
        """Of all names and bytes, as they are stored."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.shapes):
            digest.update(name.encode())
            rows = self.rows(name, 0, self.shapes[name][0])
            digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
