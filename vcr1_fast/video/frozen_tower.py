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
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from vcr1_fast.learner.loading import compute_buffers, load_weights, read_config
from vcr1_fast.learner.tower_attention import use_varlen_tower
from vcr1_fast.run.model_folder import module_name, stored_weights

if TYPE_CHECKING:
    from vcr1_fast.types import Patches

PREFIX = "model.visual."  # of the tower's weights in the model


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


def load_frozen_tower(folder: Path, dtype: torch.dtype, device: torch.device) -> FrozenTower:
    """The tower of a Hugging Face checkpoint; nothing else of it is read.

    Raises ConfigError when the checkpoint holds no tower or one of other shapes.
    """
    config: Any = read_config(folder).vision_config
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        visual: Any = Qwen2_5_VisionTransformerPretrainedModel(config)
    for weight in visual.parameters():  # rotary frequencies stay float32: bfloat16 ones have 8 bits of position
        weight.data = weight.data.to(dtype)
    compute_buffers(visual)
    load_weights(visual, folder, device, PREFIX)
    visual.eval().requires_grad_(False)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        use_varlen_tower(visual)
    return FrozenTower(visual, _digest(visual, folder))


def _digest(visual: nn.Module, folder: Path) -> str:
    """Of the tower's weights as they are stored, and of its buffers."""
    digest = hashlib.blake2b(digest_size=16)
    stored = stored_weights(folder)
    for name in sorted(name for name in stored if module_name(name).startswith(PREFIX)):
        with safe_open(stored[name].file, "pt") as file:  # pyright: ignore[reportPrivateImportUsage]
            value = file.get_tensor(name)
        digest.update(module_name(name).encode())
        digest.update(value.contiguous().view(torch.uint8).numpy())
    for name, buffer in visual.named_buffers():
        digest.update(f"{name} {buffer.tolist()}".encode())
    return digest.hexdigest()
