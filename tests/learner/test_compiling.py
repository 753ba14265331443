"""Compiled blocks: the numbers of eager ones, one graph for rows of any layout, under recomputation and FSDP2.

By `aot_eager`, which traces and splits graphs as the compiler does and then runs torch's own operators: the numbers are
the same bits, and no C++ is compiled.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from vcr1_kernels import varlen_attention
from vcr1_kernels.prefix_attention import PrefixGroup, PrefixLayout, layout_to_tensor

from tests.kernels.test_prefix_attention_flash import dense_backward, dense_forward
from vcr1_fast.learner import compiling
from vcr1_fast.learner.attention import use_packed_attention
from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.model import PolicyModel, load_hugging_face
from vcr1_fast.learner.sharding import whole_tensor
from vcr1_fast.learner.tower_attention import use_tower_attention
from vcr1_fast.settings.config import ModelConfig

BACKEND = "aot_eager"
CPU = torch.device("cpu")
LAYOUTS: tuple[PrefixLayout, ...] = (
    (PrefixGroup(0, 20, (5, 7)),),
    (PrefixGroup(0, 21, (5, 7, 9)),),
    (PrefixGroup(0, 33, (5, 7)), PrefixGroup(45, 11, (3,))),
    (PrefixGroup(0, 9, (2,)),),
    (PrefixGroup(0, 64, (0, 31, 7, 7)),),
    (PrefixGroup(0, 5, (2,)), PrefixGroup(7, 6, (9, 9)), PrefixGroup(31, 3, ())),
)
GRIDS = ([(4, 8, 8)] * 2, [(2, 4, 10), (1, 6, 4)], [(3, 8, 12)], [(5, 6, 6), (1, 8, 8), (2, 4, 4)], [(7, 4, 6)])


class Dense:
    """Flash attention on the CPU."""

    name = "dense"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Any, scale: float) -> tuple[Tensor, Tensor]:
        return dense_forward(query, key, value, *segments[:4], 0.0, segments.causal, False, scale=scale)[:2]

    def backward(self, grad: Tensor, tensors: Any, segments: Any, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        state = (torch.zeros(2, dtype=torch.uint64), torch.empty(0))
        return dense_backward(grad, *tensors, *segments[:4], 0.0, segments.causal, *state, scale=scale)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


def decoder_and_copy() -> tuple[Any, Any]:
    hf = load_hugging_face("tiny", torch.float32, CPU).train()
    use_packed_attention(hf.model.language_model)
    return hf.model.language_model, copy.deepcopy(hf.model.language_model)


def outputs(decoder: Any, layout: PrefixLayout) -> list[Tensor]:
    """Of two layers after one another: the result, the gradient of the input and those of their weights."""
    num_tokens, width = layout[-1].end, decoder.config.hidden_size
    hidden = torch.randn(1, num_tokens, width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    position_ids = torch.arange(num_tokens).expand(3, 1, -1)
    row: dict[str, Any] = {"position_embeddings": decoder.rotary_emb(hidden, position_ids), "attention_mask": None}
    row |= {"prefix_layout": layout_to_tensor(layout), "prefix_backend": "torch"}
    decoder.zero_grad()
    out = decoder.layers[1](decoder.layers[0](hidden, **row), **row)
    out.square().sum().backward()
    weights = [weight for layer in decoder.layers[:2] for weight in layer.parameters()]
    return [out.detach(), hidden.grad, *(whole_tensor(weight.grad) for weight in weights)]


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_layers_compile_once_for_all_layouts(mode: str, capsys: pytest.CaptureFixture[str]):
    eager, compiled = decoder_and_copy()
    compiling.compile_blocks(compiled.layers, mode, BACKEND)
    for layout in LAYOUTS:
        for got, want in zip(outputs(compiled, layout), outputs(eager, layout), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert capsys.readouterr().out.count("compiled Qwen2_5_VLDecoderLayer in") == 1


def test_tower_blocks_compile_for_windows_and_for_whole_frames(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(varlen_attention, "flash_ops", lambda device: (Dense(), ""))
    towers = [load_hugging_face("tiny", torch.float32, CPU).train().model.visual for _ in range(2)]
    for tower in towers:
        use_tower_attention(tower, "flash")
    family = family_of(load_hugging_face("tiny", torch.float32, CPU).config)
    compiling.compile_blocks(towers[1].blocks, "selective", BACKEND)
    for grids in GRIDS:
        num_patches = sum(frames * rows * columns for frames, rows, columns in grids)
        values_PC = torch.randn(num_patches, 1176, generator=torch.Generator().manual_seed(0))
        results = []
        for tower in towers:
            out = family.run_tower(tower, values_PC, family.tower_inputs(grids, tower.config))
            results.append([out, *torch.autograd.grad(out.square().sum(), list(tower.blocks.parameters()))])
        for got, want in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_under_fsdp_the_gradients_are_those_of_eager_layers():
    """Of a world of one: weights are gathered before a compiled forward, and again before its backward."""
    eager, compiled = decoder_and_copy()
    want = outputs(eager, LAYOUTS[0])
    compiling.compile_blocks(compiled.layers, "full", BACKEND)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in compiled.layers[:2]:
            fully_shard(layer, mesh=mesh)
        for _ in range(2):  # the second time with weights that were gathered and freed
            for got, expected in zip(outputs(compiled, LAYOUTS[0]), want, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
        assert counters["stats"]["unique_graphs"] == 1
    finally:
        dist.destroy_process_group()


def test_the_setting_compiles_a_policy(monkeypatch: pytest.MonkeyPatch):
    """On a CPU its decoder, whose tower calls attention for each window."""
    seen: list[tuple[int, str]] = []
    monkeypatch.setattr(compiling, "compile_blocks", lambda blocks, mode: seen.append((len(blocks), mode)))
    hf = load_hugging_face("tiny", torch.float32, CPU)
    PolicyModel(hf, ModelConfig(compile=True, gradient_checkpointing="selective"), torch.float32)
    monkeypatch.setattr("vcr1_fast.learner.model.is_one_call", lambda tower: True)  # as on CUDA
    PolicyModel(hf, ModelConfig(compile=True), torch.float32)
    num_layers, num_blocks = len(hf.model.language_model.layers), len(hf.model.visual.blocks)
    assert seen == [(num_layers, "selective"), (num_layers + num_blocks, "auto")]
    assert not ModelConfig().compile
