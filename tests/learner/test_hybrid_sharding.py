"""Each of two nodes has all weights, split over its ranks (train.replicate): what one process does, in all respects."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny_policy import REPOSITORY
from vcr1_fast.learner.sharding import World, named_weights, whole_tensor
from vcr1_fast.learner.step import Learner
from vcr1_fast.run.checkpoint import load_checkpoint
from vcr1_fast.settings.checks import check_settings
from vcr1_fast.settings.config import Config, ConfigError, OptimizerConfig

LENGTHS = [(5, 3, 8), (1, 9, 2), (4, 4, 4), (7, 2, 6), (3, 3, 5), (8, 1, 1), (2, 6, 4), (6, 5, 2)]


def hybrid_config(model: Path) -> Config:
    """Two rows on each of four ranks, whose gradients are added up within a node after each, and between them once."""
    from tests.learner.test_step import make_config

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


def test_two_nodes_of_two_ranks_train_as_one_process_does(make_model, make_group, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    make_model().save_pretrained(model)
    run.mkdir()
    command = [sys.executable, "-m", "tests.learner.hybrid_ranks", str(model), str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
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
    load_checkpoint(folder, one.policy, one.optimizer, one.schedule, World())
    for name, tensor in state_of(one).items():
        assert torch.equal(tensor, ranks["saved"][name]), name


@pytest.mark.parametrize(("world_size", "fits"), [(16, True), (8, True), (2, True), (7, False), (1, False)])
def test_copies_must_divide_the_ranks(world_size: int, fits: bool):
    config = Config()
    config = replace(config, train=replace(config.train, prompts_per_step=112, replicate=2))
    if fits:
        check_settings(config, "train", world_size)
        return
    with pytest.raises(ConfigError, match=rf"train.replicate is 2, but there are {world_size} ranks"):
        check_settings(config, "train", world_size)
