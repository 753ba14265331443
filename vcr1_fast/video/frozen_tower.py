"""A vision tower that is never trained: each clip goes through it once, engine and learner share what it gave.

Shape letters: P patches, C values of a patch, M video tokens, D hidden size of the language model.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.families.family import ModelFamily
from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.video.embed import embed_videos

if TYPE_CHECKING:
    from vcr1_fast.types import Patches

PREFIX = "visual."  # of the tower's weights in a checkpoint


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
    files = sorted(folder.glob("*.safetensors"))
    whole: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    config = whole.vision_config
    config._attn_implementation = "sdpa"
    visual: Any = Qwen2_5_VisionTransformerPretrainedModel(config)
    digest, state = hashlib.blake2b(digest_size=16), dict[str, Tensor]()
    for path in files:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                if PREFIX in name and not name.startswith("model.language_model."):
                    state[name.split(PREFIX, 1)[1]] = file.get_tensor(name)
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().view(torch.uint8).numpy().tobytes())
    try:
        visual.load_state_dict(state)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise ConfigError(f"the vision tower is frozen, but {folder} holds another one: {problem}") from error
    visual = visual.to(device, dtype).eval().requires_grad_(False)
    (kernels or KernelChoice()).switch_tower(visual, device, dtype)
    return FrozenTower(family_of(whole), visual, digest.hexdigest())
