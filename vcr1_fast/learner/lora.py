"""LoRA (arXiv 2106.09685): trained low-rank adapters beside frozen matrices of the language model.

    y = x W^T + b + (alpha / rank) (x A^T) B^T        W [N, K], A [rank, K], B [N, rank]; B = 0 at the start

Two ways out of here: the weights of an ordinary model, each changed matrix W + (alpha / rank) B A (`merged_parts`:
export, rollout engines), and the factors alone (`adapter_factors`: checkpoints).

Own code and not PEFT, because PEFT's layer casts the whole input to the adapter's float32 under autocast and adds the
two products in a pass of their own; both are passes over a whole activation for each of 196 matrices. Its
initialisation is kept: A as `nn.Linear` has it (uniform within 1 / sqrt(K)). export.py writes the factors as it names
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.families.family import ModelFamily
from vcr1_fast.learner.gathering import Part, rows_here
from vcr1_fast.learner.sharding import named_weights
from vcr1_fast.settings.config import ConfigError, LoRAConfig

FACTORS = ("lora_A", "lora_B")


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` and its adapter. See the module's docstring for the formula."""

    def __init__(self, base_layer: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        """`scale`: alpha / rank. `generator`: on the CPU, so that every rank and device begins with the same A.

        Beside a matrix that is still on meta, A and B are real and on the CPU: no checkpoint will bring them.
        """
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.scale = scale
        self.is_on = True
        weight_NK = base_layer.weight
        bound = weight_NK.shape[1] ** -0.5
        device = torch.device("cpu") if weight_NK.is_meta else weight_NK.device
        a_RK = torch.empty(rank, weight_NK.shape[1]).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a_RK.to(device))
        self.lora_B = nn.Parameter(a_RK.new_zeros(weight_NK.shape[0], rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if not self.is_on:
            return y
        low_TR = linear(x, self.lora_A).flatten(0, -2) * self.scale  # scaled where it is narrow
        return torch.addmm(y.flatten(0, -2), low_TR, self.lora_B.t()).view_as(y)


def targets_of(config: LoRAConfig, family: ModelFamily) -> tuple[str, ...]:
    """Names of the matrices that get an adapter."""
    return family.lora_targets if config.targets is None else config.targets


def add_adapters(hf: PreTrainedModel, config: LoRAConfig, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Freeze the whole model and put an adapter beside each matrix that `targets_of` names, in place.

    dtype: that is computed in, and that frozen weights are kept in: in bfloat16 17 GB for 7B instead of 33, and no
    copies for autocast. The adapters are float32. Raises ConfigError for a target that a decoder layer does not have.
    """
    hf.requires_grad_(False)
    for weight in hf.parameters():
        weight.data = weight.data.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    family = family_of(hf.config)
    targets = targets_of(config, family)
    for layer in hf.get_submodule(family.layers_name).children():
        linears = {name.rsplit(".", 1)[-1]: name for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        unknown = [target for target in targets if target not in linears]
        if unknown:
            raise ConfigError(
                f"model.lora.targets names {', '.join(unknown)}, but a decoder layer has {', '.join(linears)}"
            )
        for target in targets:
            parent, _, attribute = linears[target].rpartition(".")
            owner = layer.get_submodule(parent)
            adapted = LoRALinear(getattr(owner, attribute), config.rank, config.scale, generator)
            setattr(owner, attribute, adapted)


def lora_layers(module: nn.Module) -> list[LoRALinear]:
    """Those of the model; none where it is trained as a whole."""
    return [layer for layer in module.modules() if isinstance(layer, LoRALinear)]


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The model with its starting weights: what a KL is taken to, with no second copy of them."""
    layers = lora_layers(module)
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def scale_of(hf: nn.Module) -> float:
    """alpha / rank, 0 without adapters."""
    return next((layer.scale for layer in lora_layers(hf)), 0.0)


def split_weights(hf: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`sharding.named_weights` in two: the model's under the names that it has without adapters, and A and B of each
    adapter, `<matrix>.lora_A` [rank, K], `<matrix>.lora_B` [N, rank]. All live."""
    named = named_weights(hf)
    base = {base_name(name): value for name, value in named.items() if not is_factor(name)}
    return base, {name: value for name, value in named.items() if is_factor(name)}


def adapter_factors(hf: nn.Module) -> dict[str, Tensor]:
    """The second part of `split_weights`."""
    return split_weights(hf)[1]


def base_name(name: str) -> str:
    """The name that a weight of the model has without adapters."""
    return name.replace(".base_layer.", ".")


def is_factor(name: str) -> bool:
    """Whether a weight of that name is A or B of an adapter."""
    return name.endswith(FACTORS)


def has_adapter(name: str, factors: Mapping[str, Tensor]) -> bool:
    """Whether the weight of that name is one that an adapter changes."""
    return f"{name.removesuffix('.weight')}.lora_A" in factors


def parts_of(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> list[Part]:
    """For `gathering.whole_weights`: each weight as it is, floating ones cast to `dtype` (None: as stored)."""
    return [Part(name, weight, _handed_over(weight.dtype, dtype)) for name, weight in weights.items()]


def merged_parts(
    base: Mapping[str, Tensor], factors: Mapping[str, Tensor], scale: float, dtype: torch.dtype | None = None
) -> list[Part]:
    """`parts_of(base)` with W + scale B A, added up in float32, for each matrix that has an adapter."""
    parts = []
    for part in parts_of(base, dtype):
        if has_adapter(part.name, factors):
            a_RK, b_NR = (factors[f"{part.name.removesuffix('.weight')}.{factor}"] for factor in FACTORS)
            summed = torch.promote_types(part.weight.dtype, b_NR.dtype)
            rows = partial(_merged_rows, part.weight, b_NR, scale)
            part = Part(part.name, part.weight, _handed_over(summed, dtype), a_RK, rows)
        parts.append(part)
    return parts


def _merged_rows(base: Tensor, b_NR: Tensor, scale: float, a_RK: Tensor) -> Tensor:
    """Of this rank: W and B are divided alike, and A is whole."""
    return rows_here(base) + scale * (rows_here(b_NR) @ a_RK)


def _handed_over(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored.is_floating_point else stored
