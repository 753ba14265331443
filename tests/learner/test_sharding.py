from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from tests.ranks import on_ranks
from tests.tiny_policy import TinyPolicy, patches, tokens
from vcr1_fast.learner.optimizer import build_optimizer, clip_grad_norm
from vcr1_fast.learner.sharding import (
    World,
    all_max_int,
    all_reduce_sum,
    barrier,
    init_distributed,
    named_weights,
    on_all_ranks,
    on_main_rank,
    shard,
    shutdown,
    whole_tensor,
)
from vcr1_fast.settings.config import ConfigError, OptimizerConfig

TWO = World(rank=0, world_size=2)


def check_collectives(world) -> None:
    rank = world.rank
    assert all_max_int(10 * rank - 5, world) == 5
    values = torch.tensor([1.0, rank])
    assert all_reduce_sum(values, world).tolist() == [2.0, 1.0]
    assert values.tolist() == [1.0, rank]
    names = {"b": 1.0, "a": 2.0} if rank else {"a": 10.0, "b": 0.5}  # order does not matter
    assert all_reduce_sum(names, world) == {"a": 12.0, "b": 1.5}
    with pytest.raises(ValueError, match=rf"rank {rank} has \['only_{rank}'\]"):
        all_reduce_sum({f"only_{rank}": 1.0}, world)

    def fail() -> None:
        raise PermissionError("no")

    said = "^rank 0 failed while trying; its own message says why$" if rank else "^no$"
    with pytest.raises(OSError if rank else PermissionError, match=said):
        on_main_rank("trying", fail, world)
    barrier(world)


def check_shards(policy: TinyPolicy, world: World, tied: bool) -> None:
    assert (world.world_size, world.device.type) == (2, "cpu")
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in policy.parameters())
    assert policy.hf.lm_head.weight.to_local().shape == ((34, 33)[world.rank], 32)  # 67 rows
    assert (policy.hf.lm_head.weight is policy.hf.model.language_model.embed_tokens.weight) == tied


def train(world: World, output: str, tied: str, dtype_name: str) -> None:
    """One update by four micro-batches, a rank's share each; gradients, weights and the norm are written by rank 0."""
    policy = TinyPolicy(tied=bool(tied))
    shard(policy, world, getattr(torch, dtype_name))
    if world != World():
        check_collectives(world)
        check_shards(policy, world, bool(tied))
    optimizer = build_optimizer(policy, OptimizerConfig(learning_rate=1.0, eps=1.0))
    share = 4 // world.world_size
    for index in range(share * world.rank, share * (world.rank + 1)):
        (policy(tokens(index), patches(index)) / 4).backward()
    gradients = {n: whole_tensor(w.grad).clone() for n, w in named_weights(policy).items() if w.grad is not None}
    norm = clip_grad_norm(policy, 0.05)
    optimizer.step()
    with torch.no_grad():
        policy(tokens(0))  # leaves the root gathered; named_weights must still see the masters
    weights = {n: whole_tensor(w) for n, w in named_weights(policy).items()}
    if world.is_main:
        tensors = {f"grad.{n}": g for n, g in gradients.items()} | {f"weight.{n}": w for n, w in weights.items()}
        save_file({**tensors, "norm": torch.tensor([norm], dtype=torch.float64)}, output)


def on_one_and_two(folder: Path, tied: bool, dtype_name: str) -> tuple[dict[str, torch.Tensor], ...]:
    """What one process in float32 writes, and two ranks."""
    files = [folder / f"{num_ranks}.safetensors" for num_ranks in (1, 2)]
    train(World(), str(files[0]), "tied" * tied, "float32")
    on_ranks(train, files[1], "tied" * tied, dtype_name)
    return tuple(load_file(file) for file in files)


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_make_the_update_of_one_process(tmp_path: Path, tied: bool):
    want, got = on_one_and_two(tmp_path, tied, "float32")
    assert got.keys() == want.keys()
    assert float(got["norm"]) == pytest.approx(float(want["norm"]), rel=1e-6)
    for name, tensor in want.items():
        # Only the order of four float32 sums differs: a few ulps of the largest gradient of the weight.
        bound = 32 * torch.finfo(torch.float32).eps * float(tensor.abs().max()) + 1e-9
        # AdamW's first step is lr g / (|g| + eps): with lr = eps = 1 close to g, where a small eps gives its sign.
        assert (got[name] - tensor).abs().max() <= (bound if name.startswith("grad.") else 1e-6), name
    embedding = "hf.model.language_model.embed_tokens.weight"
    start = named_weights(TinyPolicy(tied=tied))[embedding].detach()
    assert (got[f"weight.{embedding}"] - start).abs().max() > 1e-3


def test_two_ranks_compute_in_bfloat16_and_keep_float32_gradients(tmp_path: Path):
    want, got = on_one_and_two(tmp_path, False, "bfloat16")
    assert {tensor.dtype for name, tensor in got.items() if name != "norm"} == {torch.float32}
    assert got["norm"] != want["norm"] and float(got["norm"]) == pytest.approx(float(want["norm"]), rel=0.05)
    name = "grad.hf.lm_head.weight"
    assert torch.cosine_similarity(got[name].flatten(), want[name].flatten(), dim=0) > 0.999


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
