"""A GRPOTrainer's two steps as values to compare: what it logged and where its weights went."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

TIMINGS = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "epoch"}


def low_byte_reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]


def grpo_trainer(model: Any, output: Path, data: Any, more: Mapping[str, Any], **options: Any) -> Any:
    """Two optimizer steps of 2 prompts x 2 completions. `options` are settings, `more` is for the trainer itself."""
    trl: Any = importlib.import_module("trl")
    arguments = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "num_iterations": 2,
        "max_completion_length": 6,
        "max_steps": 2,
        "optim": "sgd",
        "temperature": 0.7,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl.GRPOTrainer(model, low_byte_reward, trl.GRPOConfig(**arguments), data, **more)


class Run:
    def __init__(self, trainer: Any) -> None:
        self.num_trainable = sum(parameter.requires_grad for parameter in trainer.model.parameters())
        self.start = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        self.end = trainer.model.state_dict()
        self.logs = [{k: v for k, v in log.items() if k not in TIMINGS} for log in trainer.state.log_history]

    def moved(self, name: str) -> float:
        return (self.end[name] - self.start[name]).abs().max().item()


def assert_same_training(theirs: Run, ours: Run, rtol: float = 1e-5) -> None:
    """Both run in float32 and add in another order. Plain SGD, so that a difference in a gradient stays that small in
    the weights (Adam would divide a zero gradient's noise by itself)."""
    assert len(ours.logs) == len(theirs.logs) == 3  # two steps and the summary
    for mine, wanted in zip(ours.logs, theirs.logs, strict=True):
        assert mine.keys() == wanted.keys()
        for name, value in wanted.items():
            assert mine[name] == pytest.approx(value, rel=rtol, abs=1e-6), name
    assert theirs.logs[0]["loss"] != theirs.logs[1]["loss"]
    trained = [name for name in theirs.end if theirs.moved(name) > 0]
    assert len(trained) == theirs.num_trainable
    for name in trained:
        wanted = theirs.end[name]
        # a part of the movement, and one rounding of the largest weight in each of the two updates
        bound = rtol * theirs.moved(name) + 2 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
        assert (ours.end[name] - wanted).abs().max().item() <= bound, name
