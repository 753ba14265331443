"""Buckets of weights on a GPU that another process opens by a handle, without a copy. Needs a GPU: untested so far.

The learner makes the handle (`share`), messages carry it as JSON, SGLang's own process opens it (update.py).
torch counts for each handle whether the other process has let go of it; until then the memory is not given back.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

# Memory of expandable segments has no handle of the kind that SGLang's process opens.
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def has_handles() -> bool:
    """Whether this process's GPU memory can be opened by another one."""
    return not any("expandable_segments:true" in os.environ.get(name, "").lower() for name in _ALLOCATOR_VARIABLES)


def share(flat_B: Tensor) -> dict[str, Any]:
    """A handle of these bytes on a GPU, for one process to open once; what was queued to write them is waited for.

    The device is named by its UUID: two processes may count GPUs differently.
    """
    torch.cuda.current_stream(flat_B.device).synchronize()
    arguments: Any = reductions.reduce_tensor(flat_B)[1]
    return {
        "num_bytes": flat_B.numel(),
        "tensor_offset": arguments[3],
        "device_uuid": str(torch.cuda.get_device_properties(flat_B.device).uuid),
        # of storage, counter and event, in torch's order; texts stand for bytes
        "handles": [base64.b64encode(each).decode() if isinstance(each, bytes) else each for each in arguments[7:]],
    }


def release() -> None:
    """Give buckets back that nobody has open any more to the GPU, where SGLang may need the memory."""
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()
