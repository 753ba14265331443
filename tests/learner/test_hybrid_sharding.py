"""Each of two nodes has all weights, split over its ranks (train.replicate): what one process does, in all respects."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.learner.conftest import random_group
from tests.learner.test_step import make_config
from tests.ranks import on_ranks
from tests.recording_engine import RecordingEngine
from vcr1_fast.learner.sharding import World, named_weights, whole_tensor
from vcr1_fast.learner.step import Learner
from vcr1_fast.run.checkpoint import RunState, load_checkpoint, save_checkpoint
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.settings.config import Config, OptimizerConfig

LENGTHS = [(5, 3, 8), (1, 9, 2), (4, 4, 4), (7, 2, 6), (3, 3, 5), (8, 1, 1), (2, 6, 4), (6, 5, 2)]


def hybrid_config(model: Path) -> Config:
    """Two rows on each of four ranks, whose gradients are added up within a node after each, and between them once."""
    config = make_config(model, 1)
    train = replace(config.train, prompts_per_step=len(LENGTHS), replicate=2, reduce_gradients="each_row")
    # AdamW's step is lr g / (|g| + eps): with eps = 1 in proportion to g, where a small one gives its sign
    return replace(config, train=train, optimizer=OptimizerConfig(learning_rate=1.0, eps=1.0))


def state_of(learner: Learner) -> dict[str, torch.Tensor]:
    """Whole weights and moments. A collective."""
    state = {}
    for name, weight in named_weights(learner.policy).items():
        state[name] = whole_tensor(weight).clone()
        for moment, value in learner.optimizer.state.get(weight, {}).items():
            state[f"{moment} {name}"] = whole_tensor(value).clone()
    return state


def parts_of(learner: Learner):
    return learner.policy, learner.optimizer, learner.schedule


def train_on_four(world: World, model: str, run: str) -> None:
    """Two nodes of two ranks."""
    config = hybrid_config(Path(model))
    groups = [random_group(seed, lengths) for seed, lengths in enumerate(LENGTHS)][world.rank :: 4]
    learner = Learner(config, world, 10)
    for weight in learner.policy.parameters():
        assert isinstance(weight, DTensor) and weight.placements == (Replicate(), Shard(0))
        assert weight.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
    reports = [report for _ in range(2) for report in learner.update_grpo(groups)]
    folder = save_checkpoint(run, *parts_of(learner), RunState(2, 0, 0, 0, "", ""), world, keep=1)
    saved = state_of(learner)

    engine = RecordingEngine()
    WeightSync(learner.policy, engine).push()
    for name, weight in named_weights(learner.policy.hf).items():
        assert torch.equal(engine.loaded[name], whole_tensor(weight)), name

    flat = Learner(replace(config, train=replace(config.train, replicate=1)), world, 10)
    load_checkpoint(folder, *parts_of(flat), world)
    loaded = state_of(flat)
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    if world.is_main:
        torch.save({"saved": saved, "norms": [report.grad_norm for report in reports]}, Path(run) / "ranks.pt")


def test_two_nodes_of_two_ranks_train_as_one_process_does(make_model, make_group, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    make_model().save_pretrained(model)
    run.mkdir()
    on_ranks(train_on_four, model, run, num_ranks=4)
    ranks = torch.load(run / "ranks.pt", weights_only=True)

    one = Learner(replace(hybrid_config(model), train=replace(hybrid_config(model).train, replicate=1)), World(), 10)
    start = state_of(one)
    groups = [make_group(seed, lengths) for seed, lengths in enumerate(LENGTHS)]
    norms = [report.grad_norm for _ in range(2) for report in one.update_grpo(groups)]
    assert ranks["norms"] == pytest.approx(norms, rel=1e-5)
    alone = state_of(one)
    assert alone.keys() == ranks["saved"].keys()
    for name, weight in alone.items():
        # Only the order of float32 sums differs. A wrong sum, an average or one node's share, is off by half of it.
        moved = float((weight - start.get(name, torch.zeros(()))).abs().max())
        assert float((ranks["saved"][name] - weight).abs().max()) <= 1e-4 * moved + 1e-7, name

    folder = run / "checkpoints" / "step_000002"
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    state_bytes = sum(tensor.nbytes for tensor in ranks["saved"].values())
    assert state_bytes < num_bytes < 1.2 * state_bytes + 50_000  # once, not by both nodes; the rest are headers
    load_checkpoint(folder, *parts_of(one), World())
    for name, tensor in state_of(one).items():
        assert torch.equal(tensor, ranks["saved"][name]), name
