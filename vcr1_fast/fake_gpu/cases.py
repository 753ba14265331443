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

from vcr1_fast.fake_gpu.learner import FakeLearner
from vcr1_fast.fake_gpu.mode import FakeGpu
from vcr1_fast.fake_gpu.models import GroupShape, public_config
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES
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
            lines = traceback.format_exception(error)
            yield {"name": case["name"], "error": f"{type(error).__name__}: {error}", "traceback": "".join(lines)}
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()  # modules and FSDP's states hold each other


def _run(gpu: FakeGpu, case: dict[str, Any]) -> dict[str, Any]:
    config = load_config(case["config"], case["overrides"])
    described = dict(case["hf_config"])
    if "public" in described:
        sizes = PUBLIC_SIZES[described["public"]]
        hf_config: Any = public_config(sizes, described.get("layers"), described.get("depth"))
    else:
        hf_config = AutoConfig.for_model(**described)
    learner = FakeLearner(gpu, config, hf_config, case["num_gpus"])
    has_features = config.model.is_tower_frozen
    shapes = [GroupShape(tuple(grid), tuple(lengths), has_features) for grid, lengths in case["groups"]]
    groups = learner.groups(shapes)
    updates = [learner.update(groups, case["teaches"], case["min_rows"]) for _ in range(case["num_updates"])]
    return {"load": asdict(learner.load), "updates": [asdict(update) for update in updates]}
