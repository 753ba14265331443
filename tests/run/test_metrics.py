"""What a step reports, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from vcr1_fast.learner.sharding import SINGLE_PROCESS, World
from vcr1_fast.learner.step import UpdateReport
from vcr1_fast.run import pace
from vcr1_fast.run.metrics import rollout_metrics, update_metrics
from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Completion, RolloutGroup


def completion(length: int, reason: str = "stop") -> Completion:
    return Completion(torch.zeros(length, dtype=torch.long), torch.zeros(length), reason)  # type: ignore[arg-type]


def test_rewards_and_lengths_by_hand(make_prompt):
    prompt = make_prompt((1, 4, 4), "text")
    prompt = replace(prompt, example=replace(prompt.example, task="object_tracking"))
    groups = [
        RolloutGroup(
            prompt, (completion(4), completion(10, "length")), 1,
            reward_parts={"format": (1.0, 0.0), "iou": (0.5, 0.5)}, rewards=(1.5, 0.5),
        ),
        RolloutGroup(
            prompt, (completion(6), completion(2)), 1,
            reward_parts={"format": (1.0, 1.0), "iou": (0.0, 0.0)}, rewards=(1.0, 1.0),
        ),
    ]  # fmt: skip
    metrics = rollout_metrics(groups, make_tasks(TaskConfig()), SINGLE_PROCESS)
    want = {
        "reward": 1.0,
        "reward_std": math.sqrt(0.5) / 2,
        "frac_reward_zero_std": 0.5,
        "completions/count": 4.0,
        "completions/mean_length": 5.5,
        "completions/min_length": 2.0,
        "completions/max_length": 10.0,
        "completions/clipped_ratio": 0.25,
        "completions/mean_terminated_length": 4.0,
        "rewards/object_tracking/format/mean": 0.75,
        "rewards/object_tracking/format/std": math.sqrt(0.1875),
        "rewards/object_tracking/iou/mean": 0.25,
        "rewards/object_tracking/iou/std": 0.25,
    }
    assert metrics == pytest.approx(want)


def test_a_step_without_groups_reports_that_and_nothing_else():
    assert rollout_metrics([], make_tasks(TaskConfig()), SINGLE_PROCESS) == {"completions/count": 0.0}


def test_update_sums_become_means_per_token():
    sums = {"loss": 0.5, "tokens": 100.0, "entropy": 50.0, "kl": 2.0, "clipped_low": 3.0, "clipped_high": 5.0}
    sums |= {"tokens_executed": 400.0, "tokens_unshared": 900.0, "engine_gap": 0.01}
    sums |= {"planned_work_s": 3.0, "planned_available_s": 4.0, "groups_too_large": 2.0}
    reports = [UpdateReport(sums, 2.0, 0.1, False), UpdateReport(sums, 4.0, 0.05, True)]
    metrics = update_metrics(reports)
    assert metrics["loss"] == 0.5
    assert metrics["grad_norm"] == 3.0
    assert metrics["learning_rate"] == 0.05
    assert metrics["skipped_updates"] == 1.0
    assert metrics["entropy"] == 0.5
    assert metrics["kl"] == pytest.approx(0.02)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(0.03)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(0.08)
    assert metrics["step_tokens/executed"] == 800.0
    assert metrics["step_tokens/unshared"] == 1800.0
    assert (metrics["busy_frac"], metrics["groups_too_large"]) == (0.75, 4.0)


def test_pace_is_of_each_gpu_and_mfu_of_a_known_one_alone(monkeypatch: pytest.MonkeyPatch):
    """2 updates of 400 tokens and 989e12 operations in 4 s on 8 GPUs: 25 tokens a second, and 2 / 32 of the peak."""
    reports = [UpdateReport({"tokens_executed": 400.0, "model_flop": 989e12}, 1.0, 0.1, False)] * 2
    on_cpu = pace.pace_metrics(reports, 4.0, World(0, 8))
    assert on_cpu == {"train/tokens_per_second_per_gpu": 25.0}
    on_gpu = World(0, 8, 0, torch.device("cuda", 0))
    names = {"NVIDIA H100 80GB HBM3": 2 / 32, "NVIDIA H100 PCIe": 2 / 32 * 989 / 756, "NVIDIA Tesla T4": None}
    for name, mfu in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        wanted = on_cpu | ({} if mfu is None else {"train/mfu": pytest.approx(mfu)})
        assert pace.pace_metrics(reports, 4.0, on_gpu) == wanted
