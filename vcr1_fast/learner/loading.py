"""A checkpoint's weights -> a model that was built without any: each rank reads the rows that it keeps, no others.

In: a Hugging Face folder. A model is built with parameters that have a shape and no memory (`empty_model`), wrapped and
divided over the ranks like any other, and then filled (`fill`): memory on the device for this rank's rows, read from
the files that the index names. So a device never holds more than its shards and the rows of one weight, and the ranks
of a node read each byte once between them, from the page cache.

Nothing is random that was meant to be loaded: a weight that is missing or too many, or of another shape, is an error.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.initialization import no_init_weights

from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.families.family import ModelFamily
from vcr1_fast.learner.gathering import rows_here
from vcr1_fast.learner.lora import is_factor, start_adapters
from vcr1_fast.learner.sharding import first_row
from vcr1_fast.run.model_folder import weight_files
from vcr1_fast.settings.error import ConfigError


class WeightSource(Protocol):
    """Weights by the names that a model has for them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop - 1, on the host; of a scalar all of it."""
        ...


class Checkpoint:
    """The safetensors files of a folder, open. See `WeightSource`."""

    def __init__(self, folder: Path, family: ModelFamily) -> None:
        """Raises ConfigError for a file that cannot be read and a weight that two files hold."""
        self._stack = ExitStack()
        self._slices: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in weight_files(folder):
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path} cannot be read ({error}): fetch it again") from None
            for stored in file.keys():  # noqa: SIM118 - not a mapping
                name = family.weight_name(stored)
                if name is None:
                    continue
                if name in self.shapes:
                    raise ConfigError(f"{folder} holds {name} twice, the second time in {path.name}: fetch it again")
                self._slices[name] = file.get_slice(stored)
                self.shapes[name] = tuple(self._slices[name].get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._slices[name][start:stop] if self.shapes[name] else self._slices[name][:]

    def close(self) -> None:
        self._slices.clear()
        self._stack.close()


def empty_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a folder's config.json: parameters of `dtype` without memory, buffers as they are to be.

    Raises ConfigError for an architecture that is not known here.
    """
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    model_class: Any = family_of(config).model_class
    hf = empty_module(lambda: model_class._from_config(config, dtype=dtype), dtype)
    hf.tie_weights()
    if (folder / "generation_config.json").is_file():
        hf.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return hf.eval()


def empty_module(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    """What `build` makes, with parameters of `dtype` without memory."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _parameters_without_memory(), no_init_weights():
            return build()
    finally:
        torch.set_default_dtype(default)


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Modules made within it register their parameters on the meta device. Buffers, such as rotary frequencies, are
    computed as always: on meta they would be lost."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@torch.no_grad()
def fill(module: nn.Module, weights: Mapping[str, Tensor], source: WeightSource, device: torch.device) -> None:
    """Give `module` memory on `device` and these of its weights their values.

    Args:
        module: with parameters without memory, divided over the ranks or not.
        weights: those that the source has, by its names: parameters and persistent buffers of `module`. Parameters that
            are not among them are left with memory and no values.

    Raises ConfigError when the source lacks one of them, has others, or has one of another shape.
    """
    _check_names(weights, source.shapes)
    names = {id(weight): name for name, weight in weights.items()}
    filled: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for attribute, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in filled:  # tied ones stay one
                fresh = _with_memory(parameter, device)
                filled[id(parameter)] = fresh
                if id(parameter) in names:
                    _read(fresh, names[id(parameter)], source)
            owner._parameters[attribute] = filled[id(parameter)]
        for attribute, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[attribute] = buffer.to(device)
                if id(buffer) in names:
                    _read(owner._buffers[attribute], names[id(buffer)], source)


def _with_memory(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if not parameter.is_meta:
        return nn.Parameter(parameter.to(device), parameter.requires_grad)
    return nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)


def _read(target: Any, name: str, source: WeightSource) -> None:
    local, start = rows_here(target), first_row(target)
    if local.numel():
        local.copy_(source.rows(name, start, start + (local.shape[0] if local.ndim else 1)))


def _check_names(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing, others = sorted(weights.keys() - shapes.keys()), sorted(shapes.keys() - weights.keys())
    problems = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("has in excess", others)) if names]
    if problems:
        raise ConfigError(
            f"the checkpoint {' and '.join(problems)}: wanted the weights of the model that its config.json describes"
        )
    for name, weight in weights.items():
        if tuple(weight.shape) != tuple(shapes[name]):
            raise ConfigError(
                f"{name} is {list(shapes[name])} in the checkpoint, but {list(weight.shape)} in the model that its "
                "config.json describes"
            )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return f"{', '.join(listed[:3])}{more}"


def weights_by_name(hf: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under their state-dict names, each once: tied ones under the first.

    With adapters, those of the model without them. Before `fill`: FSDP's state-dict hooks want memory."""
    persistent = {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in hf.named_modules()
        for name in owner._buffers
        if name not in owner._non_persistent_buffers_set
    }
    named: dict[str, Tensor] = dict(hf.named_parameters())
    named |= {name: buffer for name, buffer in hf.named_buffers() if name in persistent}
    return {name.replace(".base_layer.", "."): weight for name, weight in named.items()}


def load_whole(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A checkpoint's model, all of it on `device`, in eval mode.

    Raises ConfigError when folder and model do not fit each other, see `fill`.
    """
    hf = empty_model(folder, dtype)
    load_into(hf, hf, folder, device)
    return hf


def load_into(module: nn.Module, hf: Any, folder: Path, device: torch.device) -> None:
    """`fill` `module`, a policy around `hf` or `hf` itself, from the folder; adapters get their starting values."""
    weights = {name: weight for name, weight in weights_by_name(hf).items() if not is_factor(name)}
    source = open_checkpoint(folder, hf)
    try:
        fill(module, weights, source, device)
    finally:
        source.close()
    start_adapters(hf)
    if device.type == "cuda":
        # What casts and copies took goes back: a rollout engine on this GPU sizes itself by what is free.
        gc.collect()
        torch.cuda.empty_cache()


def open_checkpoint(folder: Path, hf: Any) -> Checkpoint:
    """The weights of `folder` for the model `hf`; of a tied head only the embedding."""
    source = Checkpoint(folder, family_of(hf.config))
    if getattr(hf.config, "tie_word_embeddings", False):
        source.shapes.pop("lm_head.weight", None)
    return source
