"""Small problems of a run's own shapes, one for each kernel: what the kernel gives, and what its plain path gives.

Few tokens, so that all of them take a second; but the widths, head sizes, element type, loss and temperature are the
run's, and every length is chosen so that whole tiles, ragged ends and a second chunk occur. Called by `kernel_proof`.
Those of norms, MLPs and rotary embeddings stand in `operator_problems`.
Inputs come from generators of their own.

Shape letters: N scored tokens, D hidden size, V vocabulary, T packed tokens, H K query and key heads, C head dimension,
P patches, F frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from vcr1_kernels import fused_linear_logprob, fused_linear_policy_loss, patchify, prefix_attention, reference
from vcr1_kernels.backend import Backend, is_interpreted
from vcr1_kernels.flash_routes import HALF_TYPES
from vcr1_kernels.losses import LossFunction, TokenVectors
from vcr1_kernels.prefix_attention import AttentionBackend, PrefixGroup, PrefixLayout
from vcr1_kernels.varlen_attention import varlen_attention

from vcr1_fast.learner.kernel_choice import on_device
from vcr1_fast.video.formats import FORMATS

Outputs = dict[str, Tensor]
VOCAB_STEP = 8192  # two blocks of the row kernels; 152,064 entries would be 4.4 GB of float64 for a 7B head
CHUNK_ROWS = 40  # so that the head's 64 rows are two chunks, the second of which adds to the weight's gradient
SEQUENCE_LENS = (17, 31, 9, 7)


@dataclass(frozen=True)
class Shapes:
    """What the problems take from a run."""

    dtype: torch.dtype
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    tower_heads: int
    tower_head_dim: int
    mlp_width: int
    tower_mlp_width: int
    trains_head: bool = True  # False: its weight needs no gradient
    trains_tower: bool = True
    temperature: float = 1.0
    model_type: str = "qwen2_5_vl"  # whose modules the operators are compared with

    @classmethod
    def of_model(cls, text: Any, vision: Any, dtype: torch.dtype, **options: Any) -> Shapes:
        """From the `text_config` and `vision_config` of a checkpoint."""
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            dtype, text.hidden_size, text.vocab_size, text.num_attention_heads, text.num_key_value_heads, head_dim,
            vision.num_heads, vision.hidden_size // vision.num_heads, text.intermediate_size,
            vision.intermediate_size, **options,
        )  # fmt: skip

    @property
    def vocab_chunk(self) -> int:
        """Rows of the weight that the problems have: one block of 8,192 and the ragged end of the whole vocabulary."""
        return min(self.vocab_size, VOCAB_STEP + self.vocab_size % VOCAB_STEP)


@dataclass(frozen=True)
class Problem:
    """`run(way)` is what is in question, `plain()` the same by the plain path, `exact()` in float64."""

    run: Callable[[str], Outputs]
    plain: Callable[[], Outputs]
    exact: Callable[[], Outputs]

    @classmethod
    def of(
        cls, outputs: Callable[[Any, torch.dtype], Outputs], ours: Callable[[str], Any], plain: Any, dtype: torch.dtype
    ) -> Problem:
        """Of what `outputs(function, dtype)` makes of `ours(way)` and of the plain path."""
        return cls(
            run=lambda way: outputs(ours(way), dtype),
            plain=lambda: outputs(plain, dtype),
            exact=lambda: outputs(plain, torch.float64),
        )


def normal(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """Drawn on the device: moving a head's weight there would take longer than all problems together."""
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


@dataclass(frozen=True)
class _Head:
    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    trains_weight: bool
    temperature: float

    @classmethod
    def make(cls, shapes: Shapes, device: torch.device) -> _Head:
        num_rows, width, vocab = sum(SEQUENCE_LENS), shapes.hidden_size, shapes.vocab_chunk
        generator = torch.Generator().manual_seed(2)
        return cls(
            hidden_ND=normal((num_rows, width), 0, device).to(shapes.dtype),
            # logits of standard deviation 2, where the largest probabilities of a row are a few per cent
            weight_VD=(normal((vocab, width), 1, device) * (2.0 / width**0.5)).to(shapes.dtype),
            target_N=torch.randint(0, vocab, (num_rows,), generator=generator).to(device),
            trains_weight=shapes.trains_head,
            temperature=shapes.temperature,
        )

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight_VD = self.weight_VD.detach().to(dtype).requires_grad_(self.trains_weight)
        return self.hidden_ND.detach().to(dtype).requires_grad_(), weight_VD

    def gradients(self, value: Tensor, leaves: tuple[Tensor, Tensor], cotangent: Tensor | None = None) -> Outputs:
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return dict(zip(("grad hidden", "grad weight"), torch.autograd.grad(value, wanted, cotangent), strict=False))


def logprob_problem(shapes: Shapes, device: torch.device) -> Problem:
    """Log-prob and entropy of the head, and the gradients of a random combination of log-probs."""
    head = _Head.make(shapes, device)
    cotangent_N = normal((len(head.target_N),), 3, device)

    def outputs(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> Outputs:
        leaves = head.leaves(dtype)
        logprob_N, entropy_N = function(*leaves, head.target_N, head.temperature)
        grads = head.gradients(logprob_N, leaves, cotangent_N.to(logprob_N.dtype))
        return {"logprob": logprob_N.detach(), "entropy": entropy_N.detach(), **grads}

    def fused(way: str) -> Callable[..., tuple[Tensor, Tensor]]:
        backend = cast(Backend, way)
        return lambda *inputs: fused_linear_logprob(*inputs, keep="none", chunk_rows=CHUNK_ROWS, backend=backend)

    return Problem.of(outputs, fused, reference.linear_logprob, shapes.dtype)


def _loss_vectors(head: _Head, beta: float) -> TokenVectors:
    """Four sequences: two near the old policy, one far from it on either side, one of them without an advantage.

    Ratios are near 1 or beyond e^2, away from the bounds of every clip in use, where the rounding of a plain bfloat16
    path would decide which side of a bound a token falls on.
    """
    with torch.no_grad():
        exact = (head.hidden_ND.double(), head.weight_VD.double(), head.target_N)
        logprob_N = reference.linear_logprob(*exact, head.temperature)[0].float().cpu()
    lens = torch.tensor(SEQUENCE_LENS)

    def per_token(values: Sequence[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(lens)

    return TokenVectors(
        advantage_N=per_token((1.0, -0.7, -0.5, 0.0)),
        weight_N=1.0 / (len(lens) * per_token(SEQUENCE_LENS)),
        old_logprob_N=logprob_N - per_token((0.05, -0.03, 2.0, 0.0)),
        ref_logprob_N=logprob_N + per_token((0.1, -0.2, 0.3, 0.1)) if beta else None,
        sampling_logprob_N=logprob_N - per_token((0.02, 0.04, 2.1, 0.0)),
        sequence_lens=SEQUENCE_LENS,
    )


def policy_loss_problem(shapes: Shapes, device: torch.device, losses: Mapping[str, LossFunction]) -> Problem:
    """Value and gradients of each of the run's losses, by the head that makes gradients in forward."""
    head = _Head.make(shapes, device)
    vectors = {
        name: on_device(_loss_vectors(head, getattr(loss, "beta", 0.0)), device) for name, loss in losses.items()
    }

    def outputs(function: Callable[..., tuple[Tensor, Any]], dtype: torch.dtype) -> Outputs:
        found: Outputs = {}
        for name, loss in losses.items():
            leaves = head.leaves(dtype)
            value = function(*leaves, head.target_N, loss, vectors[name], head.temperature)[0]
            found[f"{name} loss"] = value.detach()
            found |= {f"{name} {output}": grad for output, grad in head.gradients(value, leaves).items()}
        return found

    def fused(way: str) -> Callable[..., tuple[Tensor, Any]]:
        backend = cast(Backend, way)
        return lambda *inputs: fused_linear_policy_loss(*inputs, chunk_rows=CHUNK_ROWS, backend=backend)

    return Problem.of(outputs, fused, reference.linear_policy_loss, shapes.dtype)


def _row_layout() -> PrefixLayout:
    """Two groups: prompts of more than one tile and of less, completions of several tiles, of one token and of none.

    Tiles are at most 128 rows and 128 keys, in the interpreter 32 and 32.
    """
    if is_interpreted():
        return (PrefixGroup(0, 37, (33, 1, 5)), PrefixGroup(76, 9, (6, 0, 4)))
    return (PrefixGroup(0, 165, (200, 1, 35)), PrefixGroup(401, 40, (33, 0, 9)))


def attention_problem(shapes: Shapes, device: torch.device) -> Problem:
    """Shared-prefix attention of a row with two groups, and the gradients of queries, keys and values."""
    layout, scale = _row_layout(), shapes.head_dim**-0.5
    heads = (shapes.num_heads, shapes.num_key_heads, shapes.num_key_heads, shapes.num_heads)
    made = [normal((layout[-1].end, n, shapes.head_dim), seed, device).to(shapes.dtype) for seed, n in enumerate(heads)]

    def outputs(attend: Callable[..., Tensor], dtype: torch.dtype) -> Outputs:
        return _attention_outputs(lambda *qkv: attend(*qkv, layout, scale), made, dtype)

    def ours(way: str) -> Callable[..., Tensor]:
        backend = cast(AttentionBackend, way)
        return lambda query, key, value, layout, scale: prefix_attention(query, key, value, layout, scale, backend)

    # Not backend "torch", which does a bfloat16 run's scores in float32 and is off by one rounding, 2e-3. A flash
    # backward takes sum(dout out) from the rounded output: dQ of rows with few keys is then off by up to 3e-2, by the
    # definition in bfloat16 up to 3e-2 as well (emulated at the sizes of 3B and 7B, three seeds each).
    return Problem.of(outputs, ours, reference.prefix_attention, shapes.dtype)


def _attention_outputs(
    attend: Callable[..., Tensor], made: Sequence[Tensor], dtype: torch.dtype, has_grads: bool = True
) -> Outputs:
    """Output and gradients from (query, key, value, gradient of the output)."""
    leaves = [x.detach().to(dtype).requires_grad_(has_grads) for x in made[:3]]
    out = attend(*leaves)
    if not has_grads:
        return {"out": out}
    grads = torch.autograd.grad(out, leaves, made[3].to(out.dtype))
    return {"out": out.detach(), **dict(zip(("grad query", "grad key", "grad value"), grads, strict=True))}


def tower_problem(shapes: Shapes, device: torch.device) -> Problem:
    """The tower's attention over windows of several sizes; gradients too where the tower is trained."""
    lengths = [64, 64, 40, 16, 200] if not is_interpreted() else [16, 9]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    shape, scale = (sum(lengths), shapes.tower_heads, shapes.tower_head_dim), shapes.tower_head_dim**-0.5
    made = [normal(shape, seed, device).to(shapes.dtype) for seed in range(4)]

    def in_one_call(query_PHC: Tensor, key_PHC: Tensor, value_PHC: Tensor) -> Tensor:
        return varlen_attention(query_PHC, key_PHC, value_PHC, ends, torch.tensor(lengths), scale)

    def window_by_window(query_PHC: Tensor, key_PHC: Tensor, value_PHC: Tensor) -> Tensor:
        windows = []
        for query, key, value in zip(*(x.split(lengths) for x in (query_PHC, key_PHC, value_PHC)), strict=True):
            scores = torch.einsum("qhc,khc->hqk", query, key) * scale
            windows.append(torch.einsum("hqk,khc->qhc", torch.softmax(scores, dim=-1), value))
        return torch.cat(windows)

    def outputs(attend: Callable[..., Tensor], dtype: torch.dtype) -> Outputs:
        return _attention_outputs(attend, made, dtype, shapes.trains_tower)

    return Problem.of(outputs, lambda way: in_one_call, window_by_window, shapes.dtype)


def patchify_problem(shapes: Shapes, device: torch.device) -> Problem:
    """An odd number of frames, so that the last one is repeated."""
    video, generator = FORMATS[shapes.model_type], torch.Generator().manual_seed(0)
    size = (5, 3 * video.factor_px, 5 * video.factor_px, 3)
    rgb_FHW3 = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device)

    def outputs(function: Callable[..., Tensor], dtype: torch.dtype) -> Outputs:
        cut = {"patch_px": video.patch_px, "mean": video.mean, "std": video.std}
        return {"patches": function(rgb_FHW3, dtype, **cut)}

    return Problem.of(
        outputs, lambda way: partial(patchify, backend=cast(Backend, way)), reference.patchify, shapes.dtype
    )


def ways_of(kernel: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Names for `Problem.run`, fastest first; what is left when none of them holds needs no proof.

    The same on every rank, so that all ranks try them in step.
    """
    half = dtype in HALF_TYPES
    return {
        "logprob": ("triton", "torch"),
        "policy_loss": ("triton", "torch"),
        "attention": ("flash", "triton") if half else ("triton",),  # no flash attention has float32
        "tower": ("flash",) if half else (),
        "patchify": ("triton",),
        "norm": ("liger",),
        "mlp": ("liger",),
        "rotary": ("triton",),
    }[kernel]
