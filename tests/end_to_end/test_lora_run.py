"""A run with adapters: it goes on from its checkpoint, and the model that it leaves answers as it did at the end."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from tests.logged import logged
from vcr1_fast.evaluate import evaluate_command
from vcr1_fast.settings.config import Config
from vcr1_fast.settings.io import load_settings
from vcr1_fast.train import train


def test_adapters_resume_and_leave_a_model_that_evaluates_alike(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def settings(num_steps: int, *overrides: str) -> Config:
        sources = [f"--data.{name}=[{data_folder}/{name}_grounding.jsonl]" for name in ("train", "eval")]
        sizes = ["--train.prompts_per_step=4", "--rollout.group_size=4", "--rollout.max_new_tokens=32"]
        where = [f"--train.output_dir={run}", f"--train.num_steps={num_steps}", "--video.num_workers=0"]
        return load_settings(Config, "tiny", [*sources, *where, *sizes, "--checkpoint.every=1", *overrides])

    lora = ("--model.lora.rank=4", "--optimizer.learning_rate=1e-2", "--algorithm.beta=0.01")
    train(settings(1, *lora))
    after = train(settings(2, *lora))["after"]
    lines = logged(run)
    first, second = [line for line in lines if "loss" in line]
    assert abs(first["kl"]) < 1e-6 < second["kl"]  # to the adapters switched off
    assert second["sampling/sampling_logp_difference/mean"] < 1e-4  # the engine has the sums

    with safe_open(next((run / "checkpoints" / "step_000002").glob("shard-*")), "pt") as file:
        assert all(name.endswith(("lora_A", "lora_B")) for name in file.keys())  # noqa: SIM118 - not a dict
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == 4
    result = evaluate_command(settings(2, f"--model.path={run / 'model'}", f"--eval.output_dir={tmp_path / 'eval'}"))
    assert result["scores"] == after

    checkpoint = run / "checkpoints" / "step_000002"  # the same weights, before they were exported
    of_checkpoint = evaluate_command(settings(2, f"--model.path={checkpoint}"))
    assert (of_checkpoint["model"], of_checkpoint["scores"]) == (str(checkpoint), after)
    [made] = (run / "eval" / "models").glob("step_000002-*")
    assert (made / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert (made / "vcr1_fast.json").read_bytes() == (run / "model" / "vcr1_fast.json").read_bytes()
