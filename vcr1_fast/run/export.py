"""The trained policy -> a folder that Hugging Face's `from_pretrained` loads, and its adapter as PEFT reads it."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vcr1_fast.learner.gathering import Part, plan_buckets, whole_weights
from vcr1_fast.learner.lora import adapter_factors, merged_parts, parts_of, scale_of, split_weights
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World, on_all_ranks
from vcr1_fast.run.folder import replace_folder
from vcr1_fast.run.model_folder import weight_files
from vcr1_fast.settings.config import LoRAConfig

FILE_BYTES = 4 << 30  # of weights in one file, and in the host memory of rank 0 at once: 4 files for 7B in bfloat16
_EXTRA_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors


def stored_dtype(folder: Path) -> torch.dtype:
    """Of the floating-point weights in a model's folder: that of most numbers."""
    counts: Counter[str] = Counter()
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                entry = file.get_slice(name)
                counts[entry.get_dtype()] += prod(entry.get_shape())
    known = [dtype for dtype, _ in counts.most_common() if dtype in _DTYPES]
    return _DTYPES[known[0]] if known else torch.float32


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
    matrices they belong to. A collective: call on all ranks; weights are gathered as gathering.py says, and rank 0
    holds those of one file in host memory. The folder appears whole or not at all; an earlier export there is replaced.
    Raises OSError when it cannot be written or is something else.
    """
    final = Path(folder).absolute()
    hf = policy.get_submodule("hf")
    assert isinstance(hf, PreTrainedModel), f"policy.hf is {type(hf).__name__}, wanted a Hugging Face model"
    parts = merged_parts(*split_weights(hf), scale_of(hf), dtype)

    def fill(aside: Path, weights: Iterator[tuple[str, Tensor]]) -> None:
        _save_weights(hf, aside, weights, parts)
        if dtype is not None:
            _say_dtype(aside / "config.json", dtype)
        tokenizer.save_pretrained(str(aside))
        extra = [Path(source) / name for name in _EXTRA_FILES] if source is not None else []
        for path in extra:
            if path.is_file():
                shutil.copy2(path, aside / path.name)

    _publish_gathered("exporting the model", parts, final, "config.json", fill, world)
    return final


def _say_dtype(path: Path, dtype: torch.dtype) -> None:
    """In config.json, where the masters' stands; in those of its sections that have one, too."""
    config = json.loads(path.read_text(encoding="utf-8"))
    sections = [section for section in config.values() if isinstance(section, dict) and "dtype" in section]
    for section in (config, *sections):
        section["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(path, config)


def _save_weights(
    hf: PreTrainedModel, aside: Path, weights: Iterator[tuple[str, Tensor]], parts: Sequence[Part]
) -> None:
    """Config and weights into `aside`, by `save_pretrained` file for file; with several files their index, too."""
    sizes = [part.weight.numel() * part.dtype.itemsize for part in parts]
    files = plan_buckets(sizes, FILE_BYTES)
    home: dict[str, str] = {}  # name -> file
    for number, members in enumerate(files, start=1):
        hf.save_pretrained(aside, state_dict={n: v.to("cpu", copy=True) for n, v in islice(weights, len(members))})
        if len(files) == 1:
            return
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(aside / "model.safetensors", "pt") as file:
            home |= dict.fromkeys(file.keys(), name)  # as the published checkpoints have them
        # save_pretrained deletes what it takes for another save's files, so they get their names at the end
        os.rename(aside / "model.safetensors", aside / f"done-{name}")
    for name in set(home.values()):
        os.rename(aside / f"done-{name}", aside / name)
    metadata = {"total_size": sum(sizes), "total_parameters": sum(part.weight.numel() for part in parts)}
    index = {"metadata": metadata, "weight_map": dict(sorted(home.items()))}
    _write_json(aside / "model.safetensors.index.json", index)


def export_adapter(
    policy: nn.Module, folder: str | Path, config: LoRAConfig, base: str, world: World = SINGLE_PROCESS
) -> Path:
    """Write the adapters of `policy.hf` alone, as PEFT's `PeftModel.from_pretrained(model, folder)` reads them.

    base: the starting model, as its name stands in adapter_config.json. float32. A collective; an earlier export there
    is replaced. Raises OSError when it cannot be written or is something else.
    """
    final = Path(folder).absolute()
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

    def fill(aside: Path, factors: Iterator[tuple[str, Tensor]]) -> None:
        whole = {f"base_model.model.{name}.weight": value.to("cpu", copy=True) for name, value in factors}
        save_file(whole, aside / "adapter_model.safetensors", {"format": "pt"})
        _write_json(aside / "adapter_config.json", settings)

    parts = parts_of(adapter_factors(policy.get_submodule("hf")))
    _publish_gathered("exporting the adapter", parts, final, "adapter_config.json", fill, world)
    return final


def _publish_gathered(
    what: str,
    parts: Sequence[Part],
    final: Path,
    marker: str,
    fill: Callable[[Path, Iterator[tuple[str, Tensor]]], None],
    world: World,
) -> None:
    """`_publish` on rank 0, where `fill` gets the whole weights as well. A collective; what rank 0 raises is raised
    after the remaining gathers, and on every rank."""
    weights = whole_weights(parts)

    def action() -> None:
        try:
            if world.is_main:
                _publish(final, marker, lambda aside: fill(aside, weights))
        finally:
            for _ in weights:  # the other ranks wait in a gather for each rest
                pass

    on_all_ranks(what, action, world)


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
