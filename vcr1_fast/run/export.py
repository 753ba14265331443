"""The trained policy -> a folder that Hugging Face's `from_pretrained` loads, and its adapter as PEFT reads it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vcr1_fast.learner.lora import adapter_factors, merged, scale_of, split_weights
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World, on_main_rank, whole_tensor
from vcr1_fast.run.folder import replace_folder
from vcr1_fast.settings.config import LoRAConfig

_EXTRA_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


def export_hugging_face(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    world: World = SINGLE_PROCESS,
    *,
    dtype: torch.dtype | None = None,
    source: str | Path | None = None,
) -> Path:
    """Write `policy.hf` as a folder that `from_pretrained` loads: safetensors, config, generation config, tokenizer.

    dtype: of the weights on disk; None keeps the float32 masters (bfloat16 halves the folder). source: folder of the
    starting model, whose image and video processor settings are copied when there are any. Adapters are added to the
    matrices they belong to. A collective: call on all ranks; one weight at a time is gathered, rank 0 holds all of them
    in host memory. The folder appears whole or not at all; an earlier export there is replaced. Raises OSError when it
    cannot be written or is something else.
    """
    final = Path(folder).absolute()
    hf = policy.get_submodule("hf")
    assert isinstance(hf, PreTrainedModel), f"policy.hf is {type(hf).__name__}, wanted a Hugging Face model"
    whole: dict[str, Tensor] = {}
    (base, factors), scale = split_weights(hf), scale_of(hf)
    for name, weight in base.items():
        value = whole_tensor(merged(name, weight, factors, scale))
        if world.is_main:
            whole[name] = value.to("cpu", dtype if value.is_floating_point() else None)

    def fill(aside: Path) -> None:
        hf.save_pretrained(aside, state_dict=whole)
        if dtype is not None:
            config = json.loads((aside / "config.json").read_text(encoding="utf-8"))
            config["dtype"] = str(dtype).removeprefix("torch.")
            _write_json(aside / "config.json", config)
        tokenizer.save_pretrained(str(aside))
        extra = [Path(source) / name for name in _EXTRA_FILES] if source is not None else []
        for path in extra:
            if path.is_file():
                shutil.copy2(path, aside / path.name)

    on_main_rank("exporting the model", lambda: _publish(final, "config.json", fill), world)
    return final


def export_adapter(
    policy: nn.Module, folder: str | Path, config: LoRAConfig, base: str, world: World = SINGLE_PROCESS
) -> Path:
    """Write the adapters of `policy.hf` alone, as PEFT's `PeftModel.from_pretrained(model, folder)` reads them.

    base: the starting model, as its name stands in adapter_config.json. float32. A collective; an earlier export there
    is replaced. Raises OSError when it cannot be written or is something else.
    """
    final = Path(folder).absolute()
    whole = {
        f"base_model.model.{name}.weight": whole_tensor(value).cpu().contiguous()
        for name, value in adapter_factors(policy.get_submodule("hf")).items()
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        # a pattern, because the vision tower's MLP has matrices of the same names
        "target_modules": rf".*language_model\.layers\.\d+\..*\.({'|'.join(config.targets)})",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }

    def fill(aside: Path) -> None:
        save_file(whole, aside / "adapter_model.safetensors", {"format": "pt"})
        _write_json(aside / "adapter_config.json", settings)

    on_main_rank("exporting the adapter", lambda: _publish(final, "adapter_config.json", fill), world)
    return final


def _publish(final: Path, marker: str, fill: Callable[[Path], None]) -> None:
    """Have `fill` write a folder, which then appears whole; it replaces one that holds the file `marker`."""
    if final.exists() and not (final / marker).is_file():
        raise FileExistsError(f"cannot export to {final}: it exists and has no {marker}; choose another path")
    aside = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        fill(aside)
        replace_folder(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
