"""Names of this package's torch operators. A Hugging Face Hub build replaces this file by one with a unique namespace.

Both names below are those of that generated file, so the same sources work installed by pip and loaded from the Hub.
"""

from __future__ import annotations

import torch

OPS_NAMESPACE = "vcr1_kernels"
ops = getattr(torch.ops, OPS_NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """`patchify` -> `vcr1_kernels::patchify`, the name to register an operator under."""
    return f"{OPS_NAMESPACE}::{op_name}"
