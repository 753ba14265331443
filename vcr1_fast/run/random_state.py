"""The state of every global random generator as tensors, so that safetensors can hold it (no pickle), and back.

Called by the checkpoint code, once per rank.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int, rank: int) -> None:
    """torch alike on all ranks, which begin with the same adapters; python and numpy, for users' code, apart."""
    torch.manual_seed(seed)
    random.seed(f"{seed} {rank}")
    np.random.seed((seed * 8192 + rank) % 2**32)


def rng_state() -> dict[str, Tensor]:
    """State of the generators of python, numpy (the legacy global one), torch on the CPU and on the current GPU."""
    python_version, python_words, python_gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict) and numpy_state["bit_generator"] == "MT19937", "numpy's global generator"
    state = {
        "python_words": torch.tensor([python_version, *python_words], dtype=torch.int64),
        "numpy_words": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([numpy_state["state"]["pos"], numpy_state["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if python_gauss is not None:
        state["python_gauss"] = torch.tensor([python_gauss], dtype=torch.float64)
    if torch.cuda.is_available():
        state["torch_cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Continue every generator where `rng_state` was taken. CUDA's is left alone where there is no GPU, or was none."""
    python_version, *python_words = state["python_words"].tolist()
    python_gauss = float(state["python_gauss"]) if "python_gauss" in state else None
    random.setstate((python_version, tuple(python_words), python_gauss))
    position, has_gauss = state["numpy_position"].tolist()
    words = state["numpy_words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"])
    if "torch_cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["torch_cuda"])
