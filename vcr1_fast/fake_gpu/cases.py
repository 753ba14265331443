"""Runs cases (see process.Case) one after the other in the process that plays the GPUs."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from vcr1_fast.fake_gpu.groups import GroupShape
from vcr1_fast.fake_gpu.learner import FakeLearner
from vcr1_fast.fake_gpu.local_engine import answer
from vcr1_fast.fake_gpu.mode import FakeGpu
from vcr1_fast.fake_gpu.predict import Rates
from vcr1_fast.fake_gpu.whole_run import run_training
from vcr1_fast.learner.kernel_choice import KernelChoice, Pick
from vcr1_fast.settings.io import load_config


def run_cases(cases: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One report a case; see `process.run`."""
    torch.set_num_threads(1)
    gpu = FakeGpu(num_gpus=max((case["num_gpus"] for case in cases), default=1))
    for case in cases:
        try:
            with gpu:
                yield {"name": case["name"], **_run(gpu, case)}
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:2000]  # those of the dispatcher go on with a list of kernels
            where = "".join(traceback.format_tb(error.__traceback__))
            yield {"name": case["name"], "error": text, "traceback": f"{where}{text}"}
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()  # modules and FSDP's states hold each other


def _run(gpu: FakeGpu, case: dict[str, Any]) -> dict[str, Any]:
    gpu.meter.rates = Rates(**case["rates"])
    gpu.use_flash(case["flash"])
    overrides = [*case["overrides"], "--model.compile=false"]  # what it would spare is not known
    if case["trains"]:
        return run_training(gpu, case["config"], overrides, case["num_gpus"], case["engine"])
    config = load_config(case["config"], overrides)
    hf_config = AutoConfig.for_model(**case["hf_config"])
    has_features = config.model.is_tower_frozen
    if case["prompts"]:
        shapes = [GroupShape(tuple(grid), (), has_features) for grid in case["prompts"]]
        return answer(gpu, config, hf_config, shapes, case["group_size"])
    picks: dict[str, Any] = {name: Pick(way) for name, way in case["ways"].items()}
    kernels = KernelChoice(**picks) if picks else None
    learner = FakeLearner(gpu, config, hf_config, case["num_gpus"], kernels)
    updates = []
    for update in case["updates"]:
        shapes = [GroupShape(g, tuple(lengths), has_features, case["text_tokens"]) for g, lengths in update]
        groups = learner.groups(shapes)
        updates.append(asdict(learner.update(groups, case["teaches"], case["min_rows"])))
        del groups
    return {"load": asdict(learner.load), "updates": updates}
