"""Packed rows for the tests of prefix attention, and what a result is compared with.

The layouts: one completion; unequal lengths; an empty one in the middle; none, and only empty ones; two groups, the
second with a prompt of one token (its causal part is a single 1 x 1 softmax); completions in one group of three.
"""

import torch
from vcr1_kernels import reference
from vcr1_kernels.prefix_layout import PrefixGroup

LAYOUTS = {
    "single": (PrefixGroup(0, 5, (3,)),),
    "unequal": (PrefixGroup(0, 7, (1, 6, 3, 2)),),
    "empty_completion": (PrefixGroup(0, 4, (3, 0, 2)),),
    "no_completions": (PrefixGroup(0, 4, ()), PrefixGroup(4, 3, (0, 0))),
    "two_groups": (PrefixGroup(0, 6, (2, 5)), PrefixGroup(13, 1, (4, 1, 0))),
    "one_of_three_has_completions": (PrefixGroup(0, 3, (0,)), PrefixGroup(3, 4, (2, 2)), PrefixGroup(11, 2, ())),
}
SCALE = 0.3


def make_inputs(layout, heads, kv_heads, dtype=torch.float64, head_dim=8, device="cpu"):
    """query, key, value, and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(layout[-1].end, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def run(attention, query, key, value, grad):
    """[result, dQ, dK, dV] of a function of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = attention(*leaves)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def by_definition(inputs, layout, scale=SCALE):
    """The same of one masked softmax, in the type of the inputs."""
    return run(lambda *x: reference.prefix_attention(*x, layout, scale), *inputs)


def exact(inputs, layout, scale=SCALE):
    """The same in float64."""
    return by_definition([x.double() for x in inputs], layout, scale)


def relative_errors(got, want):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
