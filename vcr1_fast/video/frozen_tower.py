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

from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.learner.tower_attention import use_varlen_tower
from vcr1_fast.settings.config import ConfigError

if TYPE_CHECKING:
    from vcr1_fast.types import Patches

PREFIX = "visual."  # of the tower's weights in a checkpoint


class FrozenTower:
    """`embed(patches)` -> [M, D]. A function of patches and weights alone, so that it can be kept on disk."""

    def __init__(self, visual: nn.Module, digest: str) -> None:
        """`digest`: of the weights, see `load_frozen_tower`; it belongs into the key of whatever is kept."""
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
        values_PC = patches.values_PC.to(self.device, self.dtype)
        with self._lock, torch.no_grad():
            output: Any = self.visual(values_PC, grid_thw=torch.tensor([patches.grid_thw]))
        return output.pooler_output


def load_frozen_tower(
    folder: Path, dtype: torch.dtype, device: torch.device, kernels: KernelChoice | None = None
) -> FrozenTower:
    """The tower of a Hugging Face checkpoint; nothing else of it is read. `kernels` as for `PolicyModel`.

    Raises ConfigError when the checkpoint holds no tower or one of other shapes.
    """
    files = sorted(folder.glob("*.safetensors"))
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True).vision_config
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
    if (kernels or KernelChoice()).has_varlen_tower(device, dtype):
        use_varlen_tower(visual)
    return FrozenTower(visual, digest.hexdigest())
