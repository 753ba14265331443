"""One update: how micro-batches, mini-batches and ranks are split never changes the gradient."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from tests.learner.conftest import random_group
from tests.ranks import on_ranks
from vcr1_fast.learner.row_cost import group_size
from vcr1_fast.learner.sharding import World, whole_tensor
from vcr1_fast.learner.step import Learner, UpdateReport
from vcr1_fast.settings.config import AlgorithmConfig, Config, ModelConfig, OptimizerConfig, TrainConfig
from vcr1_fast.types import RunError

LENGTHS = [(5, 3, 8), (1, 9, 2), (4, 4, 4), (7, 2, 6)]


def make_config(path: Path, tokens_per_microbatch: int = 100_000, **algorithm) -> Config:
    return Config(
        model=ModelConfig(path=str(path), compute_dtype="float32", device="cpu"),
        algorithm=AlgorithmConfig(**algorithm),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(tokens_per_microbatch=tokens_per_microbatch, prompts_per_step=4),
    )


@pytest.fixture
def model_path(make_model, tmp_path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def groups(make_group):
    return [make_group(seed, lengths) for seed, lengths in enumerate(LENGTHS)]


def update_and_capture(learner: Learner, groups) -> tuple[list, dict[str, torch.Tensor]]:
    """The reports of one rollout's updates and the gradients the first of them clipped."""
    captured: dict[str, torch.Tensor] = {}
    real_step = learner.optimizer.step

    def step():
        if not captured:
            named = learner.policy.hf.named_parameters()
            captured.update({n: whole_tensor(p.grad).clone() for n, p in named if p.grad is not None})
        real_step()

    learner.optimizer.step = step
    return learner.update_grpo(groups), captured


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_micro_batches_never_change_the_gradient(model_path, groups, loss):
    # 100,000 tokens: all groups in one row; 110: two rows of two; 1: every group alone
    results = []
    for tokens in (100_000, 110, 1):
        learner = Learner(make_config(model_path, tokens, loss=loss), World(), 10)
        results.append(update_and_capture(learner, groups))
    [whole], want = results[0]
    for [report], got in results[1:]:
        assert report.sums["loss"] == pytest.approx(whole.sums["loss"], rel=1e-5, abs=1e-7)
        assert report.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
        for name in want:
            assert (got[name] - want[name]).norm() <= 1e-5 * want[name].norm() + 1e-9, name


def test_zero_advantage_groups_count_in_the_mean_but_are_not_run(model_path, groups):
    dead = dataclasses.replace(groups[1], advantages=(0.0, 0.0, 0.0))
    learner = Learner(make_config(model_path), World(), 10)
    [report] = learner.update_grpo([groups[0], dead])
    assert report.sums["tokens_executed"] == 34 + 4 + 2 + 7
    alone = Learner(make_config(model_path), World(), 10)
    [half] = alone.update_grpo([groups[0]])
    assert report.grad_norm == pytest.approx(half.grad_norm / 2, rel=1e-5)  # 6 sequences instead of 3


@pytest.mark.parametrize(("advantages", "is_skipped"), [((0.0, 0.0, 0.0), False), ((math.nan, 1.0, -1.0), True)])
def test_without_a_finite_gradient_the_weights_stay(model_path, groups, advantages, is_skipped):
    learner = Learner(make_config(model_path), World(), 10)
    before = copy.deepcopy(learner.policy.state_dict())
    [report] = learner.update_grpo([dataclasses.replace(groups[0], advantages=advantages)])
    assert report.skipped == is_skipped and (is_skipped or report.grad_norm == 0.0)
    assert all(torch.equal(before[name], value) for name, value in learner.policy.state_dict().items())


def test_nothing_but_skipped_updates_ends_the_run(model_path, groups):
    """Two in a row are allowed, counted anew after one that is not skipped."""
    config = make_config(model_path)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, max_skipped_updates=3))
    learner = Learner(config, World(), 10)
    broken = dataclasses.replace(groups[0], advantages=(math.nan, 1.0, -1.0))
    for group in (broken, broken, groups[0], broken, broken):
        learner.update_grpo([group])
    with pytest.raises(RunError, match=r"3 updates in a row were skipped because the gradient's norm was nan.*earlier"):
        learner.update_grpo([broken])


def test_minibatches_split_the_rollout_and_use_engine_logprobs(model_path, groups):
    learner = Learner(make_config(model_path, minibatches_per_rollout=2), World(), 10)
    reports = learner.update_grpo(groups)
    assert [r.sums["tokens"] for r in reports] == [sum(map(sum, LENGTHS[:2])), sum(map(sum, LENGTHS[2:]))]
    assert all(r.sums["clipped_low"] + r.sums["clipped_high"] > 0 for r in reports)  # engine log-probs here are random


CORRECTED = {"sampling_correction": "token_truncate", "sampling_cap": 2.0}


@pytest.mark.parametrize(
    ("algorithm", "lag", "what"),
    [
        ({}, 0, "current"),
        ({}, 1, "engine"),
        ({"minibatches_per_rollout": 2}, 0, "engine"),
        (CORRECTED, 0, "current"),
        (CORRECTED, 1, "current"),
        (CORRECTED | {"minibatches_per_rollout": 2}, 1, "before the updates"),
    ],
)
def test_what_ratios_are_taken_against(model_path, groups, algorithm, lag, what):
    config = make_config(model_path, **algorithm)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_policy_lag=lag))
    learner = Learner(config, World(), 10)
    sizes = [group_size(group, mask_truncated=False, is_run=True) for group in groups[:2]]
    [[row]] = [update.rows for update in learner._rows(groups[:2], sizes, "grpo")]
    minibatches = [[row]] * config.algorithm.minibatches_per_rollout
    [old_N, *_] = [made.old_logprob_N for rows in learner._with_old_logprobs(minibatches) for made in rows]
    with torch.no_grad():
        before_N = learner.policy(learner.policy.device_batch(row), config.rollout.temperature)[0]
    learner.update_grpo(groups)
    if what == "current":
        assert old_N is None
    else:
        assert old_N is not None and torch.equal(old_N, row.engine_logprob_N if what == "engine" else before_N)


def test_corrected_minibatches_train(model_path, groups):
    """Ratios are taken against the policy before the first update, which in that update is the current one."""
    learner = Learner(make_config(model_path, minibatches_per_rollout=2, **CORRECTED), World(), 10)
    first, second = learner.update_grpo(groups)
    assert first.sums["clipped_low"] + first.sums["clipped_high"] == 0
    assert 0 < first.sums["sampling_weight"] != first.sums["tokens"]  # engine log-probs here are random
    assert not (first.skipped or second.skipped)


def test_kl_is_zero_at_the_start_and_grows(model_path, groups):
    learner = Learner(make_config(model_path, beta=0.1), World(), 10)
    [first] = learner.update_grpo(groups)
    [second] = learner.update_grpo(groups)
    assert first.sums["kl"] == pytest.approx(0.0, abs=1e-6)
    assert second.sums["kl"] > 1e-4


def test_truncated_completions_can_be_left_out(model_path, groups):
    first, *rest = groups[0].completions
    truncated = dataclasses.replace(
        groups[0],
        completions=(first, *(dataclasses.replace(c, finish_reason="length") for c in rest)),
    )  # fmt: skip
    learner = Learner(make_config(model_path, mask_truncated=True), World(), 10)
    rows = []
    learner._update = lambda given, objective, temperature: rows.extend(given) or UpdateReport({}, 0.0, 0.0, False)
    learner.update_grpo([truncated])
    assert rows[0].weight_N.tolist() == pytest.approx([1 / (5 * 3)] * 5 + [0.0] * (3 + 8))


def test_groups_above_the_limit_are_named_and_counted_but_not_run(model_path, groups):
    config = make_config(model_path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, max_group_tokens=46))
    [report] = Learner(config, World(), 10).update_grpo(groups[:2])  # of 47 and 43 packed tokens
    assert report.sums["tokens_executed"] == 43 and report.sums["groups_too_large"] == 1
    [error] = report.too_large
    assert str(error) == ("e: its prompt and answers are 47 packed tokens, wanted at most train.max_group_tokens, 46")
    [alone] = Learner(make_config(model_path), World(), 10).update_grpo([groups[1]])
    assert report.grad_norm == pytest.approx(alone.grad_norm / 2, rel=1e-5)  # it stays in the denominators


def test_one_rank_is_busy_but_for_the_fixed_time_of_its_rows(model_path, groups):
    [report] = Learner(make_config(model_path, 110), World(), 10).update_grpo(groups)
    fixed_s = report.sums["planned_available_s"] - report.sums["planned_work_s"]
    assert fixed_s == pytest.approx(2 * (2 + 2) * 172 * 5e-6)  # two rows of 2 layers and 2 tower blocks


def train_share(world: World, path: str, shares: str, beta: str, out: str) -> None:
    """An update by this rank's share of the groups, one in a row; rank 0 writes what became of it."""
    learner = Learner(make_config(Path(path), 1, beta=float(beta)), world, 10)
    own = [random_group(seed, LENGTHS[seed]) for seed in json.loads(shares)[world.rank]]
    [report], gradients = update_and_capture(learner, own)
    if world.is_main:
        torch.save({"grads": gradients, "loss": report.sums["loss"], "norm": report.grad_norm}, out)


@pytest.mark.parametrize(
    ("shares", "beta"),
    [
        ([[0, 1], [2, 3]], 0.0),
        ([[0, 1, 2, 3], []], 0.0),  # a rank without work keeps the collectives aligned
        ([[0, 1, 2], [3]], 0.04),
    ],
    ids=["even", "one_rank_idle", "uneven_with_kl"],
)
def test_two_fsdp_processes_equal_one(model_path, tmp_path, shares, beta):
    files = [tmp_path / f"{num_ranks}.pt" for num_ranks in (1, 2)]
    train_share(World(), str(model_path), "[[0, 1, 2, 3]]", beta, str(files[0]))
    on_ranks(train_share, model_path, shares, beta, files[1])
    one, two = (torch.load(file, weights_only=True) for file in files)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-7)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert one["grads"].keys() == two["grads"].keys()
    for name, want in one["grads"].items():
        assert (two["grads"][name] - want).norm() <= 1e-5 * want.norm() + 1e-9, name


def test_frozen_vision_tower_stays_as_it_is(model_path, groups):
    config = dataclasses.replace(make_config(model_path), model=ModelConfig(path=str(model_path), freeze_vision=True))
    learner = Learner(config, World(), 10)
    before = copy.deepcopy(learner.policy.hf.state_dict())
    learner.update_grpo(groups)
    changed = {name for name, value in learner.policy.hf.state_dict().items() if not torch.equal(before[name], value)}
    assert changed and not any("visual" in name for name in changed)
