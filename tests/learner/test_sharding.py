from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_policy import TinyPolicy, patches, run_ranks, tokens
from vcr1_fast.learner.optimizer import build_optimizer, clip_grad_norm
from vcr1_fast.learner.sharding import (
    World,
    all_max_int,
    all_reduce_sum,
    barrier,
    init_distributed,
    named_weights,
    on_all_ranks,
    shard,
    shutdown,
    whole_tensor,
)
from vcr1_fast.settings.config import ConfigError, OptimizerConfig

WORKER = Path(__file__).with_name("sharded_training.py")
TWO = World(rank=0, world_size=2)


def one_process_update(policy: TinyPolicy) -> tuple[dict[str, torch.Tensor], float]:
    """The update that sharded_training.py makes on two ranks: gradients, and their norm; the policy takes the step."""
    optimizer = build_optimizer(policy, OptimizerConfig(learning_rate=1.0, eps=1.0))
    for index in range(4):
        (policy(tokens(index), patches(index)) / 4).backward()
    gradients = {n: w.grad.clone() for n, w in named_weights(policy).items() if w.grad is not None}
    norm = clip_grad_norm(policy, 0.05)
    optimizer.step()
    return gradients, norm


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_make_the_update_of_one_process(tmp_path: Path, tied: bool):
    run_ranks(WORKER, str(tmp_path / "out.safetensors"), "tied" if tied else "untied", "float32")
    got = load_file(tmp_path / "out.safetensors")
    policy = TinyPolicy(tied=tied)
    gradients, norm = one_process_update(policy)
    assert {name for name in got if name.startswith("grad.")} == {f"grad.{name}" for name in gradients}
    for name, gradient in gradients.items():
        # Only the order of four float32 sums differs: a few ulps of the largest gradient of the weight.
        bound = 32 * torch.finfo(torch.float32).eps * float(gradient.abs().max()) + 1e-9
        assert (got[f"grad.{name}"] - gradient).abs().max() <= bound, name
    assert float(got["norm"]) == pytest.approx(norm, rel=1e-6)
    # AdamW's first step is lr g / (|g| + eps): with lr = eps = 1 close to g itself, where a small eps gives its sign.
    start = named_weights(TinyPolicy(tied=tied))
    for name, weight in named_weights(policy).items():
        assert (got[f"weight.{name}"] - weight.detach()).abs().max() < 1e-6, name
    embedding = "hf.model.language_model.embed_tokens.weight"
    assert (got[f"weight.{embedding}"] - start[embedding].detach()).abs().max() > 1e-3


def test_two_ranks_compute_in_bfloat16_and_keep_float32_gradients(tmp_path: Path):
    run_ranks(WORKER, str(tmp_path / "out.safetensors"), "untied", "bfloat16")
    got = load_file(tmp_path / "out.safetensors")
    policy = TinyPolicy()
    gradients, norm = one_process_update(policy)
    assert {tensor.dtype for name, tensor in got.items() if name != "norm"} == {torch.float32}
    assert float(got["norm"]) != norm and float(got["norm"]) == pytest.approx(norm, rel=0.05)
    name = "hf.lm_head.weight"
    cosine = torch.cosine_similarity(got[f"grad.{name}"].flatten(), gradients[name].flatten(), dim=0)
    assert cosine > 0.999


def test_weights_that_are_not_float32_are_refused():
    with pytest.raises(TypeError, match=r"torch.bfloat16, wanted float32 masters"):
        shard(TinyPolicy().bfloat16(), TWO, torch.bfloat16)


def test_one_process_needs_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = init_distributed("cpu")
    assert world == World() and world.is_main and not torch.distributed.is_initialized()
    policy = TinyPolicy()
    before = list(policy.parameters())
    shard(policy, world, torch.bfloat16)
    assert all(a is b for a, b in zip(before, policy.parameters(), strict=True))
    assert all_reduce_sum({"a": 1.5}, world) == {"a": 1.5}
    assert all_max_int(-3, world) == -3
    barrier(world)
    with pytest.raises(ZeroDivisionError):
        on_all_ranks("dividing", lambda: 1 // 0, world)
    shutdown(world)


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: start the run with"):
        init_distributed("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"model.device is cuda, but torch sees no GPU"):
        init_distributed("cuda")


@pytest.mark.parametrize("tied", [False, True])
def test_named_weights_gives_each_weight_once_under_its_first_name(tied: bool):
    policy = TinyPolicy(tied=tied)
    weights = named_weights(policy)
    assert {id(w) for w in weights.values()} == {id(p) for p in policy.parameters()}
    assert ("hf.lm_head.weight" in weights) is not tied
    assert whole_tensor(policy.one).data_ptr() == policy.one.data_ptr() and not whole_tensor(policy.one).requires_grad
