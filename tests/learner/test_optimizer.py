import math
import sys

import pytest
import torch
from torch import nn

from vcr1_fast.learner.optimizer import build_optimizer, build_schedule, clip_grad_norm
from vcr1_fast.settings.config import ConfigError, OptimizerConfig


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(1, 2, 2)  # weight has 5 dimensions: a matrix
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def rates(num_updates: int, num_asked: int, **settings: object) -> list[float]:
    """Learning rates that updates 1 .. num_asked really use."""
    config = OptimizerConfig(learning_rate=2.0, **settings)  # pyright: ignore[reportArgumentType]
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=config.learning_rate)
    schedule = build_schedule(optimizer, config, num_updates)
    used = []
    for _ in range(num_asked):
        before = weight.item()
        weight.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
        used.append(before - weight.item())
    return used


def test_only_matrices_decay_and_frozen_weights_are_left_out():
    policy = Mixed()
    optimizer = build_optimizer(policy, OptimizerConfig(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-7))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(policy.patch.weight), id(policy.linear.weight)}
    assert {id(p) for p in plain["params"]} == {
        id(p) for p in (policy.patch.bias, policy.linear.bias, policy.norm.weight, policy.norm.bias)
    }
    assert (decayed["betas"], plain["eps"]) == ((0.8, 0.9), 1e-7)


def test_a_tower_has_a_learning_rate_of_its_own_and_the_same_schedule():
    policy = Mixed()
    config = OptimizerConfig(learning_rate=0.5, vision_learning_rate=0.1, weight_decay=0.1, warmup_steps=2)
    optimizer = build_optimizer(policy, config, tower=policy.patch)
    schedule = build_schedule(optimizer, config, 10)
    kinds = [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert kinds == [(0.25, 0.1, 1), (0.25, 0.0, 3), (0.05, 0.1, 1), (0.05, 0.0, 1)]  # half of it, in the first of 2
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.1, 0.1]
    assert len(build_optimizer(policy, OptimizerConfig(), tower=policy.patch).param_groups) == 2


def test_weights_that_are_not_float32_are_refused_by_name():
    with pytest.raises(TypeError, match=r"weight is torch.bfloat16, wanted float32"):
        build_optimizer(nn.Linear(2, 2).bfloat16(), OptimizerConfig())


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimizerConfig())


def test_a_model_of_vectors_only_makes_one_group():
    assert len(build_optimizer(nn.LayerNorm(3), OptimizerConfig()).param_groups) == 1


def test_schedules_by_hand():
    assert rates(4, 6, schedule="constant") == pytest.approx([2.0] * 6)
    assert rates(6, 6, schedule="constant", warmup_steps=4) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    # N = 6, W = 2: after the warm-up (6 - k + 1) / 4 for k = 3..6, then 0
    assert rates(6, 8, schedule="linear", warmup_steps=2) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0])
    half = math.sqrt(0.5)
    assert rates(4, 5, schedule="cosine") == pytest.approx([2.0, 1.0 + half, 1.0, 1.0 - half, 0.0], abs=1e-6)


def test_a_warmup_longer_than_the_run_and_a_run_of_no_updates():
    assert rates(2, 2, schedule="linear", warmup_steps=4) == pytest.approx([0.5, 1.0])
    assert rates(0, 1, schedule="cosine") == pytest.approx([2.0])


@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 1.0 / 13.0), (100.0, 1.0)])
def test_clip_grad_norm(max_norm: float, scale: float):
    policy = nn.Linear(2, 1)
    policy.weight.grad = torch.tensor([[3.0, 4.0]])
    policy.bias.grad = torch.tensor([12.0])  # norm: sqrt(9 + 16 + 144) = 13
    assert clip_grad_norm(policy, max_norm) == pytest.approx(13.0)
    torch.testing.assert_close(policy.weight.grad, torch.tensor([[3.0, 4.0]]) * scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(policy.bias.grad, torch.tensor([12.0]) * scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_reported_and_leaves_the_gradients_alone(bad: float):
    policy = nn.Linear(2, 1)
    policy.weight.grad = torch.tensor([[3.0, 4.0]])
    policy.bias.grad = torch.tensor([bad])
    assert not math.isfinite(clip_grad_norm(policy, 1.0))
    assert policy.weight.grad.tolist() == [[3.0, 4.0]]


def test_no_gradient_has_norm_zero():
    assert clip_grad_norm(nn.Linear(2, 1), 1.0) == 0.0


def test_eight_bits_ask_for_torchao(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"optimizer.name is adamw_8bit, which needs torchao .*pip install"):
        build_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(name="adamw_8bit"))
