"""The trained policy -> a folder that Hugging Face's `from_pretrained` loads, and its adapter as PEFT reads it.

Training changes weights and nothing else, so all other files are those of the starting model, byte for byte but for the
dtype in config.json, and weights have the names of the published checkpoints: what could read the starting model, of
whatever release, reads the trained one. Those files are read and tried when a run starts, not at its end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.families.family import ModelFamily
from vcr1_fast.learner.gathering import Part, plan_buckets, whole_weights
from vcr1_fast.learner.lora import adapter_factors, merged_parts, parts_of, scale_of, split_weights, targets_of
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World, on_all_ranks
from vcr1_fast.run.folder import replace_folder
from vcr1_fast.run.hub_model import hub_model
from vcr1_fast.run.model_folder import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, settings_files, stored_weights
from vcr1_fast.run.tensor_files import write_tensors
from vcr1_fast.settings.config import LoRAConfig

FILE_BYTES = 4 << 30  # of weights in one file, and in the host memory of rank 0 at once: 4 files for 7B in bfloat16
ADAPTER_CONFIG = "adapter_config.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors
_SAID_DTYPE = re.compile(rb'("(?:torch_)?dtype"\s*:\s*)(?:"[^"]*"|null)')


@dataclass(frozen=True)
class ExportPlan:
    """An export but for its weights."""

    folder: Path
    files: Mapping[str, bytes]  # by name
    dtype: torch.dtype  # of floating weights
    num_bytes: int  # of weights and files


def plan_export(
    source: Path, folder: Path, dtype: torch.dtype | None = None, further: Mapping[str, bytes] | None = None
) -> ExportPlan:
    """What a run from the model in `source` will put into `folder`; `source` is not read again.

    dtype: None is that of the starting weights. further: files beside those of the starting model.
    Raises ConfigError as `settings_files` and `stored_weights` do, and OSError.
    """
    dtype = dtype or stored_dtype(source)
    files = {path.name: path.read_bytes() for path in settings_files(source)} | dict(further or {})
    files[CONFIG_FILE] = with_dtype(files[CONFIG_FILE], dtype)
    num_numbers = sum(prod(weight.shape) for weight in stored_weights(source).values())
    num_bytes = num_numbers * dtype.itemsize + sum(map(len, files.values()))
    return ExportPlan(folder.absolute(), files, dtype, num_bytes)


def stored_dtype(folder: Path) -> torch.dtype:
    """Of the floating-point weights in a model's folder: that of most numbers."""
    counts: Counter[str] = Counter()
    for weight in stored_weights(folder).values():
        counts[weight.dtype] += prod(weight.shape)
    known = [dtype for dtype, _ in counts.most_common() if dtype in _DTYPES]
    return _DTYPES[known[0]] if known else torch.float32


def with_dtype(config_json: bytes, dtype: torch.dtype) -> bytes:
    """A config.json that says `dtype` where it said another, in its sections as well; its other bytes stay."""
    name = str(dtype).removeprefix("torch.").encode()
    changed = _SAID_DTYPE.sub(rb'\1"' + name + rb'"', config_json)
    if {"dtype", "torch_dtype"} & json.loads(changed).keys():
        return changed
    return changed.replace(b"{", b'{\n  "torch_dtype": "' + name + b'",', 1)  # the older key, which all releases read


def try_export(folder: Path, marker: str, files: Mapping[str, bytes], num_bytes: int = 0) -> None:
    """Write these files beside `folder` and delete them again.

    Raises OSError when they cannot be written, when the disk has not `num_bytes` left for the whole (an earlier export
    goes only when the new one is complete), or when `folder` is something else: it exists without the file `marker`.
    """
    with _aside(folder, marker) as aside:
        _write_files(aside, files)
        free = shutil.disk_usage(aside).free
        if free < num_bytes:
            raise OSError(
                f"the export to {folder} will take {num_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB "
                "free: make room, choose another train.output_dir, or set checkpoint.export=false"
            )


def export_hugging_face(policy: nn.Module, plan: ExportPlan, world: World = SINGLE_PROCESS) -> Path:
    """Write `policy.hf` as the folder that `plan` says, its adapters added to the matrices they belong to.

    A collective: call on all ranks; weights are gathered as gathering.py says, and rank 0 holds those of one file in
    host memory. The folder appears whole or not at all; an earlier export there is replaced. Raises OSError when it
    cannot be written or is something else.
    """
    hf = policy.get_submodule("hf")
    family = family_of(hf.config)
    parts = merged_parts(*split_weights(hf), scale_of(hf), plan.dtype)

    def fill(aside: Path, weights: Iterator[tuple[str, Tensor]]) -> None:
        _write_files(aside, plan.files)
        _save_weights(aside, weights, parts, family)

    _publish_gathered("exporting the model", parts, plan.folder, CONFIG_FILE, fill, world)
    return plan.folder


def _save_weights(
    aside: Path, weights: Iterator[tuple[str, Tensor]], parts: Sequence[Part], family: ModelFamily
) -> None:
    """Weights into `aside`, file for file; with several files their index, too."""
    sizes = [part.weight.numel() * part.dtype.itemsize for part in parts]
    files = plan_buckets(sizes, FILE_BYTES)
    home: dict[str, str] = {}  # name -> file
    for number, members in enumerate(files, start=1):
        file = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        taken = islice(weights, len(members))
        whole = {family.checkpoint_name(name): value.to("cpu", copy=True).contiguous() for name, value in taken}
        write_tensors(whole, aside / file, {"format": "pt"})
        home |= dict.fromkeys(whole, file)
    if len(files) > 1:
        metadata = {"total_size": sum(sizes), "total_parameters": sum(part.weight.numel() for part in parts)}
        _write_json(aside / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(home.items()))})


def export_adapter(
    policy: nn.Module, folder: str | Path, config: LoRAConfig, base: str, world: World = SINGLE_PROCESS
) -> Path:
    """Write the adapters of `policy.hf` alone, as PEFT's `PeftModel.from_pretrained(model, folder)` reads them.

    base: the starting model, as `model.path` names it. float32. A collective; an earlier export there
    is replaced. Raises OSError when it cannot be written or is something else.
    """
    final = Path(folder).absolute()
    hf = policy.get_submodule("hf")
    family, of_hub = family_of(hf.config), hub_model(base)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": of_hub.repo if of_hub else base,
        "revision": of_hub.revision if of_hub else None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        # a pattern, because the vision tower's MLP has matrices of the same names
        "target_modules": rf".*{re.escape(family.layers_name)}\.\d+\..*\.({'|'.join(targets_of(config, family))})",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }

    def fill(aside: Path, factors: Iterator[tuple[str, Tensor]]) -> None:
        whole = {f"base_model.model.{name}.weight": value.to("cpu", copy=True) for name, value in factors}
        write_tensors(whole, aside / "adapter_model.safetensors", {"format": "pt"})
        _write_json(aside / ADAPTER_CONFIG, settings)

    parts = parts_of(adapter_factors(hf))
    _publish_gathered("exporting the adapter", parts, final, ADAPTER_CONFIG, fill, world)
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
    with _aside(final, marker) as aside:
        fill(aside)
        replace_folder(aside, final)


@contextmanager
def _aside(final: Path, marker: str) -> Iterator[Path]:
    """A new folder beside `final`, which goes with what is still in it. Raises OSError as `try_export` does."""
    if final.exists() and not (final / marker).is_file():
        raise FileExistsError(f"cannot export to {final}: it exists and has no {marker}; choose another path")
    aside = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
