"""torch.compile of decoder layers and tower blocks, one by one: `model.compile`.

All blocks of one kind share one graph, for rows of any layout: attention is one registered operator, and what differs
from row to row (tokens, layout, segments) comes in tensors whose sizes are marked as dynamic. (`dynamic=True` would do
the same to numbers, and an epsilon or a scale would then be read from a tensor.) Without gradients, and for a tower's
windows and whole frames, there is a graph each.

What backward runs again is decided inside of the graph (`recompute`), so that the compiler sees it. FSDP's hooks stay
outside: they gather a block's weights before its forward, compiled or not, and blocks are compiled before they are
sharded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._dynamo  # a second; not imported for runs that do not compile
from torch import Tensor, nn
from torch._dynamo.utils import compilation_time_metrics
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from vcr1_fast.learner import recompute
from vcr1_fast.run.telemetry import say

MAX_GRAPHS = 32  # of one function, torch's default is 8: policy and reference, with and without gradients, 3 kinds


def compile_blocks(blocks: Iterable[nn.Module], mode: str, backend: str | Callable[..., Any] = "inductor") -> None:
    """Has each block's forward compiled at its first use, recomputing as `mode` (model.gradient_checkpointing) says.

    A break in a graph is an error, and so are more than `MAX_GRAPHS` of them: both would cost time in silence.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    options = recompute.checkpoint_options(mode)

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = type(block).forward
        if options is None:
            return forward(block, *args, **kwargs)
        return checkpoint(forward, block, *args, **options, **kwargs)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    block: Any
    for block in blocks:
        block.gradient_checkpointing = False  # transformers' own, outside of the graph
        block.forward = functools.partial(_call, compiled, block)


def _call(compiled: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, Tensor):
            _mark(x)
    before = compiled_so_far()
    result = compiled(block, *args, **kwargs)
    graphs, seconds = compiled_so_far()
    if graphs > before[0]:
        say(f"compiled {type(block).__name__} in {seconds - before[1]:.1f} s, forward and backward (graph {graphs})")
    return result


def _mark(x: Tensor) -> None:
    """All dimensions may differ from row to row, but the last one of numbers, which is a width of the model."""
    for dim in range(x.ndim - x.is_floating_point()):
        if x.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(x, dim)


def compiled_so_far() -> tuple[int, float]:
    """Graphs compiled in this process, and the seconds that this took."""
    spent_s = compilation_time_metrics.get("_compile.compile_inner", [])
    return len(spent_s), sum(spent_s)
