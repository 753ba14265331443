"""A checkpoint's folder -> a model with its weights, of which each rank reads and holds its own rows only.

In three steps, with FSDP between the first and the second:
    empty_model      the architecture on the meta device: shapes without memory, and buffers with their real values
    (sharding.shard  splits those shapes over the ranks)
    load_weights     allocates this rank's part on its device and copies its rows from the files

Building the whole model before it is sharded costs each GPU 33 GB for 7 billion weights, and the host as much for each
rank. Here a device holds its shards and 64 MiB, and the files are mapped: a rank's pages of them are read when they are
copied, so the ranks of one machine together read each byte once.

Nothing stays random that was meant to be loaded: names and shapes of checkpoint and model must be the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedModel

from vcr1_fast.learner.families import family_of, require_known
from vcr1_fast.learner.families.family import ModelFamily
from vcr1_fast.learner.lora import base_name
from vcr1_fast.run.model_folder import CONFIG_FILE, StoredWeight, read_json, stored_weights
from vcr1_fast.settings.error import ConfigError

PIECE_BYTES = 64 << 20  # of a file in one copy: beside its shards a device holds this much, and not a whole embedding
_STORED_DTYPES = ("BF16", "F16", "F32", "F64")


def read_config(folder: Path) -> Any:
    """The model's config.json.

    Raises ConfigError when it cannot be read, is of an architecture not known here, or of quantized weights.
    """
    path = folder / CONFIG_FILE
    content = read_json(path)
    require_known(content.get("model_type"), path)
    if content.get("quantization_config"):
        method = content["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise ConfigError(
            f"the weights in {folder} are quantized ({method}, says quantization_config in {CONFIG_FILE}), which "
            "cannot be trained: set model.path to the checkpoint in bfloat16 that they were made of"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever its checks of single fields raise
        raise ConfigError(f"{path} does not describe a model ({' '.join(str(error).split())}): download it") from error


def check_weights(folder: Path) -> None:
    """Raises ConfigError as `load_weights` does for the whole model; nothing but the heads of the files is read."""
    hf = empty_model(folder, torch.float32)
    _sources(dict(_meta_tensors(hf)), stored_weights(folder), family_of(hf.config), "", folder)


def empty_model(folder: Path, dtype: torch.dtype) -> Any:
    """The folder's model without its weights: parameters of `dtype` on the meta device, buffers real, on the CPU."""
    config = read_config(folder)
    model_class: Any = family_of(config).model_class
    with torch.device("meta"):
        hf = model_class._from_config(config, dtype=dtype)
    compute_buffers(hf)
    return hf.eval()


def compute_buffers(model: PreTrainedModel) -> None:
    """Give buffers that no checkpoint holds (rotary frequencies) the values that `from_pretrained` gives them."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, torch.full_like(buffer, torch.nan, device="cpu"))
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)
    for name, buffer in model.named_non_persistent_buffers():
        if buffer.isnan().any():  # another transformers might have moved how it computes them
            raise RuntimeError(f"transformers' _init_weights does not compute {name} of {type(model).__name__}")


@torch.no_grad()
def load_weights(module: nn.Module, folder: Path, device: torch.device, family: ModelFamily, part: str = "") -> None:
    """Bring `module`, of weights on meta, to `device` with the checkpoint's values, in the dtypes that it has.

    Weights and buffers that are real already are moved. Sharded weights (DTensors, split along rows over the last
    dimension of the mesh) get this rank's rows. Tied weights stay tied. No collective; the optimizer is made after it.

    Args:
        family: whose names the checkpoint may have, beside those of the model's modules.
        part: the module's name in the model, with a dot, when it is a part of it, such as the tower's.

    Raises ConfigError, before anything is allocated, when names, shapes or dtypes in the folder are not the module's.
    """
    wanted = {part + base_name(name): tensor for name, tensor in _meta_tensors(module)}
    stored = stored_weights(folder)
    sources = _sources(wanted, stored, family, part, folder)
    tensors = _tensors(module)  # kept until the end: an id is of one tensor as long as that lives
    new = _move(tensors, module, device)
    copies = {first: new[id(tensor)] for tensor, (first, *_) in sources}
    for file, names in _by_file(copies, stored):
        for name in names:
            _copy_rows(file.get_slice(name), copies[name])
    for tensor, (first, *others) in sources:
        for other in others:
            _require_equal(stored, first, other, tensor)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under each of their names."""
    buffers = module.named_buffers(remove_duplicate=False)
    return [*module.named_parameters(remove_duplicate=False), *buffers]


def _meta_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Those that a checkpoint is to give."""
    return [(name, tensor) for name, tensor in _tensors(module) if tensor.device.type == "meta"]


def _sources(
    wanted: dict[str, Tensor], stored: dict[str, StoredWeight], family: ModelFamily, part: str, folder: Path
) -> list[tuple[Tensor, list[str]]]:
    """For each tensor the names under which the folder has it: one, or for tied weights at least one."""
    given: dict[str, str] = {}
    twice: list[str] = []
    for name in stored:
        own = family.module_name(name)
        if own.endswith("rotary_emb.inv_freq"):  # computed, not read; old checkpoints hold it
            continue
        if own in given:
            twice.append(own)
        if own.startswith(part):
            given[own] = name
    tensors = {id(tensor): tensor for tensor in wanted.values()}
    found: dict[int, list[str]] = {key: [] for key in tensors}
    shapes: list[str] = []
    for own, tensor in wanted.items():
        if own not in given:
            continue
        found[id(tensor)].append(given[own])
        weight = stored[given[own]]
        if weight.shape != tuple(tensor.shape) or weight.dtype not in _STORED_DTYPES:
            shapes.append(f"{own} is {weight.dtype} {list(weight.shape)}, wanted floating {list(tensor.shape)}")
    missing = [own for own, tensor in wanted.items() if not found[id(tensor)]]
    unexpected = [own for own in given if own not in wanted]
    problems = {"missing": missing, "unexpected": unexpected, "given twice": twice, "of another shape or type": shapes}
    said = [f"{len(names)} {what} ({_first(names)})" for what, names in problems.items() if names]
    if said:
        raise ConfigError(
            f"the weights in {folder} are not those of its config.json: {'; '.join(said)}: "
            f"{_advice(missing, unexpected, family)}"
        )
    return [(tensors[key], names) for key, names in found.items()]


def _advice(missing: Sequence[str], unexpected: Sequence[str], family: ModelFamily) -> str:
    """What to do about them: many such checkpoints are whole ones, saved from within a wrapper."""
    if any(".lora_" in name or ".base_layer." in name for name in unexpected):
        return (
            "these are PEFT's adapters beside their base: merge them (merge_and_unload) and save_pretrained the result"
        )
    parts = unexpected[0].split(".") if missing and unexpected else []
    for prefix in (".".join(parts[:count]) + "." for count in range(1, min(len(parts), 4))):
        if set(missing) <= {family.module_name(name.removeprefix(prefix)) for name in unexpected}:
            return f"its names begin with {prefix!r}, of a wrapper that was saved as a whole: take that off the names"
    return "give a complete checkpoint that is not quantized and whose config.json belongs to it"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def move_values(module: nn.Module, device: torch.device) -> None:
    """Bring what has values already, buffers and the adapters' start, to `device`. To be called before sharding."""
    _move([(name, tensor) for name, tensor in _tensors(module) if tensor.device.type != "meta"], module, device)


def _move(tensors: Sequence[tuple[str, Tensor]], module: nn.Module, device: torch.device) -> dict[int, Tensor]:
    """These of the module's tensors on the device, meta ones without values; gives the new ones by the old one's id."""
    new: dict[int, Tensor] = {}
    for name, tensor in tensors:
        if id(tensor) not in new:
            new[id(tensor)] = _on_device(tensor, device)
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, new[id(tensor)])
    return new


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    if tensor.device.type != "meta":
        value = tensor.detach().to(device)
    elif isinstance(tensor, DTensor):
        local = torch.empty(tensor.to_local().shape, dtype=tensor.dtype, device=device)
        layout = (tensor.device_mesh, tensor.placements)
        value = DTensor.from_local(local, *layout, run_check=False, shape=tensor.shape, stride=tensor.stride())
    else:
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, and which row of the whole that begins with."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh, row = tensor.device_mesh, tensor.device_mesh.ndim - 1
    assert tensor.placements[row].is_shard(0), f"weights are split along rows, not as {tensor.placements[row]}"
    share = -(-tensor.shape[0] // mesh.size(row))  # as torch.chunk cuts: the last ranks may have fewer rows, or none
    return tensor.to_local(), min(mesh.get_local_rank(row) * share, tensor.shape[0])


def _pieces(tensor: Tensor, first_row: int) -> Iterator[tuple[slice, slice]]:
    """Rows of a tensor in pieces of at most PIECE_BYTES (or one row): in the tensor, and in the whole weight."""
    num_rows = tensor.shape[0]
    step = max(1, PIECE_BYTES // max(1, tensor.nbytes // max(1, num_rows)))
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        yield slice(start, stop), slice(first_row + start, first_row + stop)


def _copy_rows(source: Any, tensor: Tensor) -> None:
    """Fill this rank's rows from a slice of a file, which is read where it is asked for only."""
    own, first_row = _own_rows(tensor)
    for here, there in _pieces(own, first_row):
        own[here].copy_(source[there].to(own.device))  # sent as it is stored, cast where it arrives


def _by_file(names: Iterable[str], stored: dict[str, StoredWeight]) -> Iterator[tuple[Any, list[str]]]:
    """Each file, open, with those of the names that are in it."""
    by_file: dict[Path, list[str]] = {}
    for name in sorted(names):
        by_file.setdefault(stored[name].file, []).append(name)
    for path, inside in sorted(by_file.items()):
        with safe_open(path, "pt") as file:  # pyright: ignore[reportPrivateImportUsage]
            yield file, inside


def _require_equal(stored: dict[str, StoredWeight], first: str, other: str, tensor: Tensor) -> None:
    """Both of two tied weights are in the checkpoint: then they must be one."""
    own, first_row = _own_rows(tensor)
    with safe_open(stored[first].file, "pt") as a, safe_open(stored[other].file, "pt") as b:  # pyright: ignore[reportPrivateImportUsage]
        left, right = a.get_slice(first), b.get_slice(other)
        if any(not torch.equal(left[there], right[there]) for _, there in _pieces(own, first_row)):
            raise ConfigError(
                f"{first} and {other} in {stored[first].file.parent} differ, but tie_word_embeddings in config.json is "
                "true: set it to false there"
            )
