"""A run goes on from its checkpoint, and leaves a model that answers as it did at the end: with adapters, and whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.logged import logged
from vcr1_fast.evaluate import evaluate_command
from vcr1_fast.settings.config import Config
from vcr1_fast.settings.io import load_settings
from vcr1_fast.train import train


@pytest.mark.parametrize(("model", "rank"), [("tiny", 4), ("tiny3", 0)])
def test_it_resumes_and_leaves_a_model_that_evaluates_alike(
    data_folder: Path, tmp_path: Path, model: str, rank: int
) -> None:
    run = tmp_path / "run"

    def settings(num_steps: int, *overrides: str) -> Config:
        sources = [f"--data.{name}=[{data_folder}/{name}_grounding.jsonl]" for name in ("train", "eval")]
        sizes = ["--train.prompts_per_step=4", "--rollout.group_size=4", "--rollout.max_new_tokens=32"]
        where = [f"--train.output_dir={run}", f"--train.num_steps={num_steps}", "--video.num_workers=0"]
        return load_settings(Config, model, [*sources, *where, *sizes, "--checkpoint.every=1", *overrides])

    rate = "1e-2" if rank else "1e-4"
    how = (f"--model.lora.rank={rank}", f"--optimizer.learning_rate={rate}", "--algorithm.beta=0.01")
    train(settings(1, *how))
    after = train(settings(2, *how))["after"]
    lines = logged(run)
    first, second = [line for line in lines if "loss" in line]
    assert abs(first["kl"]) < 1e-6 < second["kl"]  # to the start: a second model, or the adapters switched off
    assert second["sampling/sampling_logp_difference/mean"] < 1e-4  # the engine has the weights, or their sums

    with safe_open(next((run / "checkpoints" / "step_000002").glob("shard-*")), "pt") as file:
        of_adapters = [name.endswith(("lora_A", "lora_B")) for name in file.keys()]  # noqa: SIM118 - not a dict
    assert all(of_adapters) if rank else not any(of_adapters)
    assert not rank or json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == rank
    result = evaluate_command(settings(2, f"--model.path={run / 'model'}", f"--eval.output_dir={tmp_path / 'eval'}"))
    assert result["scores"] == after

    checkpoint = run / "checkpoints" / "step_000002"  # the same weights, before they were exported
    of_checkpoint = evaluate_command(settings(2, f"--model.path={checkpoint}"))
    assert (of_checkpoint["model"], of_checkpoint["scores"]) == (str(checkpoint), after)
    [made] = (run / "eval" / "models").glob("step_000002-*")
    assert (made / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert (made / "vcr1_fast.json").read_bytes() == (run / "model" / "vcr1_fast.json").read_bytes()
