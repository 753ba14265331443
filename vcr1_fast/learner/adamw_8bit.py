"""AdamW with moments of 8 bits (arXiv 2110.02861): torchao's arithmetic and formats, on the rows that a rank has.

A block of 256 numbers is 256 codes into a table of 256 values in [-1, 1], and one float32 scale: 2.03 bytes a weight
for both moments where float32 takes 8. Rows that are no multiple of a block, or below 4,096 numbers, stay float32.

torchao's own AdamW8bit keeps its moments in DTensors and compiles each step for the shape that a DTensor has on one
rank; where the last rank has fewer rows (3,420 of the tower's MLP over 8) it stops at a size that does not fit (torch
2.13, torchao 0.18). Here every rank's rows lie flat, and a checkpoint gets them as float32: it is that of plain AdamW,
so that a run can go on with either of the two, on any number of GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vcr1_fast.settings.config import ConfigError

BLOCK, MIN_NUMBERS = 256, 4096
MOMENT_BYTES = 2 * (1 + 4 / BLOCK)  # of both moments of a weight
_PIECE = BLOCK << 16  # numbers that are made codes at once: their float32 copies take 64 MB each


class AdamW8bit(Optimizer):
    """AdamW over float32 weights, plain or sharded; see the module's docstring."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient. `closure`: none, it is there for torch's signature."""
        assert closure is None, "no closure is taken"
        with torch._dynamo.utils.disable_cache_limit():  # one compiled step for each size of weight, and no more
            for group in self.param_groups:
                rate = torch.tensor(group["lr"], dtype=torch.float32)  # as a number it would be compiled in
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    state = self.state[parameter]
                    if not state:
                        state.update(empty_state(parameter))
                    state["step"] += 1
                    moments = (state["step"], state["exp_avg"], state["exp_avg_sq"], None)
                    numbers = (rate, *group["betas"], group["weight_decay"], group["eps"])
                    _compiled_step()(_flat(parameter), _flat(parameter.grad), *moments, *numbers, True, False)


@functools.cache
def _compiled_step() -> Callable[..., None]:
    from torchao.optim.adam import single_param_adam  # pyright: ignore[reportMissingImports]

    return torch.compile(single_param_adam, fullgraph=True, dynamic=False)


def require_torchao() -> None:
    """Raises ConfigError where it is not installed."""
    try:
        import torchao.optim  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"optimizer.name is adamw_8bit, which needs torchao ({error}): pip install 'vcr1-fast[torchao]', or set "
            "optimizer.name=adamw"
        ) from None


def empty_state(parameter: Tensor) -> dict[str, Tensor]:
    """Of a parameter without an update so far: moments of this rank's rows, flat."""
    from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

    flat = _flat(parameter)
    is_coded = flat.numel() >= MIN_NUMBERS and flat.numel() % BLOCK == 0

    def zeros(signed: bool) -> Tensor:
        if is_coded:
            return OptimState8bit.zeros(flat.shape, signed, BLOCK, flat.device, dtype=flat.dtype)
        return torch.zeros_like(flat)

    return {"step": torch.zeros((), dtype=torch.float32), "exp_avg": zeros(True), "exp_avg_sq": zeros(False)}


def as_stored(parameter: Tensor, moment: Tensor) -> Tensor:
    """A moment for a checkpoint: float32 on the host, of the parameter's shape and division."""
    if moment.ndim == 0:  # the number of updates
        return moment
    rows = _rows(parameter)
    values = (moment.dequantize() if hasattr(moment, "codes") else moment).view(rows.shape).cpu()
    return DTensor(values, parameter._spec, requires_grad=False) if isinstance(parameter, DTensor) else values


def take_stored(moment: Tensor, stored: Tensor) -> None:
    """Put what `as_stored` gave into a moment: the same codes where the rank has the rows that it had."""
    from torchao.optim.quant_utils import quantize_8bit_with_qmap  # pyright: ignore[reportMissingImports]

    coded: Any = moment
    if moment.ndim == 0:
        return  # it was loaded in place
    flat = _flat(stored)
    if not hasattr(coded, "codes"):
        moment.copy_(flat)
        return
    # The table ends at 1 above and before -1 below: a block whose largest number is negative was scaled by more than it
    lowest = min(float(coded.qmap[0]), -1e-12)
    for start in range(0, flat.numel(), _PIECE):
        blocks = flat[start : start + _PIECE].to(moment.device).view(-1, BLOCK)
        scale = torch.maximum(blocks.amax(-1), blocks.amin(-1) / lowest if coded.signed else blocks.amax(-1))
        scale = scale.clamp(min=1e-12)
        coded.codes[start : start + blocks.numel()] = quantize_8bit_with_qmap(
            (blocks / scale[:, None]).flatten(), coded.qmap
        ).to(torch.uint8)
        coded.scale[start // BLOCK : start // BLOCK + len(scale)] = scale


def _rows(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _flat(tensor: Tensor) -> Tensor:
    return _rows(tensor).view(-1)
