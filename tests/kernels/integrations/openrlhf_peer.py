"""The installed `openrlhf.models`, imported on a machine without CUDA.

OpenRLHF imports `deepspeed` and `flash_attn` at the top of its model files, and neither installs without a compiler
and CUDA. The losses and the plain (not packed, not sharded) forward of `Actor` never call them, so for the time of
this one import empty modules stand in their place; they are gone afterwards, so that no other package finds them.
Calling one of their functions raises.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

ABSENT = {
    "deepspeed": (),
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
}


def _absent(name: str) -> Callable[..., None]:
    def call(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError(f"{name} is not installed here; only its import was replaced")

    return call


def _stand_in(name: str, functions: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    for function in functions:
        setattr(module, function, _absent(f"{name}.{function}"))
    return module


def import_openrlhf_models() -> ModuleType:
    """`openrlhf.models` (Actor, PolicyLoss, ...); ImportError when openrlhf itself is not installed."""
    # Before the stand-ins: these look for deepspeed and flash_attn themselves, once, and must find them absent.
    for name in ("peft", "peft.tuners.lora", "transformers.integrations.deepspeed"):
        importlib.import_module(name)
    missing = {root for root in ("deepspeed", "flash_attn") if importlib.util.find_spec(root) is None}
    added = [name for name in ABSENT if name.split(".")[0] in missing]
    sys.modules.update({name: _stand_in(name, ABSENT[name]) for name in added})
    try:
        return importlib.import_module("openrlhf.models")
    finally:
        for name in added:
            del sys.modules[name]
