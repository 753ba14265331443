"""Stock models with the kernels of a run: the same loss and gradients, and nobody else's model is changed."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from vcr1_kernels import rotary

from tests.learner.conftest import random_group, random_model, random_qwen3
from tests.learner.interpreted_liger import interpret_floats
from vcr1_fast.learner import model_operators
from vcr1_fast.learner.families.qwen2_5_vl import Qwen25VL
from vcr1_fast.learner.families.qwen3_vl import Qwen3VL
from vcr1_fast.learner.kernel_choice import KernelChoice, Pick, plain_choice
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.model_operators import RotaryCall, use_operators
from vcr1_fast.learner.packing import pack
from vcr1_fast.settings.config import ModelConfig

CUDA, ALL = torch.device("cuda"), ("norm", "mlp", "rotary")
OPERATORS = Qwen25VL.operators


def attention_of(model: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The first layer's, and what its rotary function needs of a row of 5 tokens."""
    layer = model.model.language_model.layers[0].self_attn
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5).expand(3, 1, 5)
    tables = model.model.language_model.rotary_emb(hidden, positions)
    return layer, {"hidden_states": hidden, "position_embeddings": tables}


@pytest.mark.parametrize(("make", "family"), [(random_model, Qwen25VL), (random_qwen3, Qwen3VL)])
def test_loss_and_gradients_of_a_policy_are_those_of_the_stock_model(monkeypatch, make, family):
    """Every norm, MLP and rotary embedding of decoder and tower, in float32. Products are kept and the rest is run
    again, so that backward overwrites gates that a recomputation was handed."""
    interpret_floats(monkeypatch)
    group = random_group(0, (3, 2), grid=(1, 4, 4), num_values=family.video.patch_values)
    batch = pack([group], [[0.1, 0.2]])
    results = []
    for kernels in ((), ALL):
        hf = make()
        use_operators(hf, family.operators, kernels)
        config = ModelConfig(gradient_checkpointing="selective")
        policy = PolicyModel(hf, config, torch.float32, plain_choice()).train()
        logprob_N, _ = policy(policy.device_batch(batch), 1.0)
        logprob_N.sum().backward()
        results.append((logprob_N.detach(), {name: p.grad for name, p in policy.named_parameters()}))
    (stock_N, stock), (ours_N, ours) = results
    torch.testing.assert_close(ours_N, stock_N, atol=1e-5, rtol=1e-5)
    for name, grad in stock.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_each_kernel_is_switched_alone(make_tiny_model):
    counts = {}
    for kernel in ALL:
        model = make_tiny_model()
        use_operators(model, OPERATORS, [kernel])
        counts[kernel] = [type(m).__name__ for m in model.modules() if "forward" in vars(m)]
    # 3 layers and 2 tower blocks: two norms each, the decoder's last and the merger's
    assert counts["norm"] == ["Qwen2_5_VLRMSNorm"] * 12
    assert sorted(counts["mlp"]) == ["Qwen2MLP"] * 3 + ["Qwen2_5_VLMLP"] * 2
    assert sorted(counts["rotary"]) == ["Qwen2_5_VLAttention"] * 3 + ["Qwen2_5_VLVisionAttention"] * 2


def test_another_model_of_the_process_keeps_its_own(make_tiny_model, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(model_operators, "rotary", lambda *inputs: calls.append(1) or rotary(*inputs))
    switched, other = make_tiny_model(), make_tiny_model()
    use_operators(switched, OPERATORS, ["rotary"])
    for model in (switched, other):
        layer, inputs = attention_of(model)
        layer(**inputs)
    assert calls == [1]  # of the first
    assert OPERATORS.text.stock is getattr(modeling, OPERATORS.text.name)


def test_a_copy_computes_with_its_own_weights(make_tiny_model, monkeypatch):
    monkeypatch.setattr(model_operators, "rms_norm", lambda hidden, weight, eps: weight)
    model = make_tiny_model()
    use_operators(model, OPERATORS, ["norm"])
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.language_model.norm.weight.fill_(7.0)
    assert copied.model.language_model.norm(torch.zeros(1)).eq(7.0).all()
    assert not model.model.language_model.norm(torch.zeros(1)).eq(7.0).any()


def test_a_compiled_attention_has_the_operator(make_tiny_model):
    """Within another function, as in a decoder layer, torch.compile looks globals up in the module that they name,
    where the stock function stands."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = make_tiny_model()
    use_operators(model, OPERATORS, ["rotary"])
    layer, inputs = attention_of(model)
    expected = layer(**inputs)[0]
    torch._dynamo.reset()
    got = torch.compile(lambda: layer(**inputs)[0], backend=backend)()
    torch.testing.assert_close(got, expected)
    assert any("vcr1_kernels.rotary" in name for name in seen)


def test_a_rotary_function_of_another_name_is_named():
    with pytest.raises(RuntimeError, match=r"Qwen2_5_VLAttention\.forward calls none of renamed"):
        RotaryCall(modeling.Qwen2_5_VLAttention, ("renamed",)).stock  # noqa: B018 - the property is what is tested


def test_functions_with_sections_get_them(monkeypatch):
    """transformers before 5.17 hands tables by axis and `mrope_section`: 3 columns of time, 2 of height, 3 of width."""
    query, key = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    tables = [torch.cat([x, x], -1) for x in (torch.randn(3, 1, 5, 8), torch.randn(3, 1, 5, 8))]
    axis = [0, 0, 0, 1, 1, 2, 2, 2] * 2
    chosen = [torch.stack([x[a, ..., c] for c, a in enumerate(axis)], -1) for x in tables]
    expected = modeling.apply_rotary_pos_emb(query, key, *chosen)
    for got, value in zip(model_operators.text_rotary(query, key, *tables, [3, 2, 3]), expected, strict=True):
        torch.testing.assert_close(got, value)


def test_what_fits_no_module_is_said(make_tiny_model):
    model = make_tiny_model()
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = nn.GELU()
    with pytest.raises(RuntimeError, match="has no module for the kernel mlp"):
        use_operators(model, OPERATORS, ["mlp"])
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_tower_alone_may_have_none_of_some():
    """Qwen3-VL's has norms with bias and an MLP without a gate."""
    tower = random_qwen3().model.visual
    use_operators(tower, Qwen3VL.operators, ALL)
    assert [type(m).__name__ for m in tower.modules() if "forward" in vars(m)] == ["Qwen3VLVisionAttention"] * 4
    with pytest.raises(RuntimeError, match="has no module for the kernel rotary"):
        use_operators(tower.merger, Qwen3VL.operators, ALL)


def test_the_choice_switches_on_cuda_alone(monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr("vcr1_fast.learner.kernel_choice.use_operators", lambda *arguments: seen.append(arguments))
    model = SimpleNamespace()
    KernelChoice().switch_operators(model, OPERATORS, torch.device("cpu"))
    KernelChoice().switch_operators(model, OPERATORS, CUDA)
    replace(plain_choice(), mlp=Pick("liger")).switch_operators(model, OPERATORS, CUDA)
    assert [names for _, _, names in seen] == [list(ALL), ["mlp"]]
