"""Clips, images and text alone in one mixture: both packaged models train on it, on two ranks, and go on from where
they stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Ended, run_on_two_ranks
from tests.logged import logged
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset

CONFIG = Path(__file__).parents[2] / "configs" / "tiny_mixture_cpu.yaml"
KINDS = ("grounding", "choice", "image", "text")
SHORT = (  # each group has a row of its own, and is run whatever its rewards are
    *("--rollout.group_size=2", "--rollout.max_new_tokens=24", "--train.tokens_per_microbatch=64"),
    *("--train.samples_every=1", "--train.prompts_per_step=8", "--algorithm.entropy_coef=0.01"),
    "--optimizer.warmup_steps=0",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    write_dataset(SynthConfig(output_dir=str(folder), num_train=3, num_eval=1, kinds=KINDS), show_progress=False)
    return folder


def arguments(data: Path, run: Path, *overrides: str, program: str = "train") -> list[str]:
    files = {split: ",".join(f"{data}/{split}_{kind}.jsonl" for kind in KINDS) for split in ("train", "eval")}
    named = [f"--data.{split}=[{names}]" for split, names in files.items()]
    return [program, str(CONFIG), *named, f"--train.output_dir={run}", *overrides]


def asked_about(run: Path) -> set[str]:
    """Kinds of the questions of all steps, by their ids."""
    lines = [line for file in (run / "samples").iterdir() for line in file.read_text().splitlines()]
    return {json.loads(line)["id"].split("-")[1] for line in lines}


def test_two_ranks_train_on_rows_with_and_without_video(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    done = run_on_two_ranks(arguments(data, run, "--train.num_steps=2", "--data.eval=[]", *SHORT))
    assert done.code == 0, done.err[-3000:]
    assert asked_about(run) == set(KINDS)
    steps = [record for record in logged(run) if "loss" in record]
    assert [step["step"] for step in steps] == [1, 2] and all(step["grad_norm"] > 0 for step in steps)
    assert all(step["bad_samples"] == 0 for step in steps)
    assert all(step["sampling/sampling_logp_difference/max"] < 1e-3 for step in steps)  # engine and trainer agree


def test_qwen3_vl_trains_on_the_mixture_with_a_frozen_tower_and_resumes_to_the_same_bits(
    data: Path, tmp_path: Path, run_here: Callable[[list[str]], Ended]
):
    run = tmp_path / "run"
    asked = arguments(
        *(data, run, "--model.path=tiny3", "--train.num_steps=2", "--checkpoint.every=1", "--checkpoint.keep=2"),
        *("--eval.max_new_tokens=8", "--video.num_workers=0", "--model.freeze_vision=true", *SHORT),
    )
    done = run_here(asked)
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert result["after"]["multiple_choice"]["num_examples"] == 3 and not result["after"]["multiple_choice"]["num_bad"]
    assert asked_about(run) == set(KINDS)
    gaps = [r["sampling/sampling_logp_difference/max"] for r in logged(run) if "loss" in r]
    assert len(gaps) == 2 and max(gaps) < 1e-3
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step_000002")
    again = run_here(asked)
    assert again.code == 0 and "resumed from" in again.out, again.err
    assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_the_mixture_can_be_taught(data: Path, tmp_path: Path, run_here: Callable[[list[str]], Ended]):
    how = ("--sft.num_steps=1", "--data.eval=[]", "--video.num_workers=0")
    done = run_here(arguments(data, tmp_path / "run", *how, program="sft"))
    assert done.code == 0, done.err
