"""Whole runs through the command line: learning, resume after kill -9, two ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.end_to_end.conftest import run_on_two_ranks
from tests.logged import logged

TASKS = {"temporal_grounding", "object_tracking"}
SAME_ON_EVERY_RUN = ("loss", "reward", "grad_norm", "entropy", "completions/mean_length", "num_tokens", "epoch")


def steps_of(run: Path) -> dict[int, dict[str, float]]:
    records = logged(run)
    return {r["step"]: r for r in records if "loss" in r}


def bytes_of_weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_run_writes_what_it_says(train_arguments, run_here, tmp_path):
    run = tmp_path / "run"
    best = ("--eval.every=1", "--checkpoint.keep_best=eval/temporal_grounding/miou", "--checkpoint.keep=1")
    options = ("--train.num_steps=3", "--checkpoint.every=1", "--train.samples_every=2", *best)
    done = run_here(train_arguments(run, *options))
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert [path.name for path in (run / "samples").iterdir()] == ["step_2.jsonl"]
    rows = [json.loads(line) for line in (run / "samples" / "step_2.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {row["task"] for row in rows} == TASKS and all(row["truth"] for row in rows)
    assert all(len(row["answers"]) == 4 and abs(sum(a["advantage"] for a in row["answers"])) < 1e-3 for row in rows)
    assert result["steps"] == 3
    for scores in (result["before"], result["after"]):
        assert set(scores) == TASKS
        assert all(0 <= value <= 1 for score in scores.values() for value in score["metrics"].values())
    steps = steps_of(run)
    assert list(steps) == [1, 2, 3]
    written = json.loads((run / "result.json").read_text())
    assert (written["before"], written["after"]) == (result["before"], result["after"]) and written["version"]
    page = (run / "report.html").read_text()
    assert (
        "data:image/jpeg;base64," in page and 'class="truth"' in page and ">rewards/object_tracking/iou/mean<" in page
    )
    assert steps[2]["sampling/sampling_logp_difference/mean"] < 1e-4  # engine and trainer agree
    assert steps[2]["tokens_per_s/unshared"] > 1.5 * steps[2]["tokens_per_s/executed"]
    assert {"reward", "kl", "clip_ratio/region_mean", "rewards/object_tracking/iou/mean"} <= set(steps[1])
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "config.yaml").read_text().count("group_size: 4") == 1
    scores = {r["step"]: r["eval/temporal_grounding/miou"] for r in logged(run) if "eval/temporal_grounding/miou" in r}
    best_step = max((1, 2, 3), key=lambda step: scores[step])  # the first of two equal ones
    assert json.loads((run / "checkpoints" / "best.json").read_text())["score"] == scores[best_step]
    assert (run / "checkpoints" / "best").resolve().name == f"step_00000{best_step}"
    kept = sorted({f"step_00000{best_step}", "step_000003"})
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best", "best.json", *kept]
    # that of step 2 waits for that of step 1
    assert steps[3]["checkpoint/write_s"] > 0 and "checkpoints: written beside the steps" in done.out
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "model")
    assert model.config.text_config.hidden_size == 128
    assert json.loads((run / "model" / "vcr1_fast.json").read_text())["reader"].startswith("pyav 1")


# With a reward that fails on some examples, which come again: in later steps, and after the kill in the same ones.
LAG = (
    *("--rollout.max_policy_lag=1", "--algorithm.sampling_correction=token_truncate", "--algorithm.sampling_cap=2.0"),
    "--rollout.over_provision=0.5",
    "--task.rewards={temporal_grounding: [tests.end_to_end.fragile_reward:fragile]}",
)
# `vcr1-fast` that is killed when it has logged step 3, whatever its threads are doing, and whose job is signalled at 1
KILLED = """
import os, signal, time
from vcr1_fast.cli import main
from vcr1_fast.run.telemetry import Telemetry

log_step = Telemetry.log_step
def log_or_die(self, step, *rest):
    log_step(self, step, *rest)
    if step == 1 and "JOB" in os.environ:
        os.kill(int(os.environ["JOB"]), signal.SIGUSR1)
        time.sleep(1)
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

Telemetry.log_step = log_or_die
main()
"""
SLURM = Path(__file__).parents[2] / "configs" / "slurm.sh"


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--algorithm.beta=0.01",), LAG], ids=["synchronous", "one step ahead"])
def test_ended_and_killed_run_resumes_to_the_same_bits(train_arguments, run_here, tmp_path, how):
    """One step ahead, the answers to step 3 are in the checkpoint of step 2, and those that step 2 left unfinished:
    drawn anew they would be newer. That run first was a Slurm job whose time was up in step 1."""
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    options = ("--train.num_steps=4", "--checkpoint.every=2", *how)
    result = run_here(train_arguments(whole, *options))
    assert result.code == 0

    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked')
    (tmp_path / "scontrol").chmod(0o755)
    command = [sys.executable, "-c", KILLED, *train_arguments(ended, *options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    if how is LAG:
        job = ["bash", "-c", f'export JOB=$$ SLURM_JOB_ID=7; . {SLURM} "$@"', "slurm", *command]
        stopped = subprocess.run(job, capture_output=True, text=True, timeout=300, env=environment)
        assert stopped.returncode == 128 + signal.SIGUSR1, stopped.stderr[-3000:]
        assert "ended by SIGUSR1 after step 1, which is saved" in stopped.stderr
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
    dead = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-3000:]
    assert list(steps_of(ended)) == [1, 2, 3] and not (ended / "model").exists()
    done = run_here(train_arguments(ended, *options))
    assert done.code == 0 and "resumed from" in done.out, done.err
    want, got = steps_of(whole), steps_of(ended)
    assert list(got) == list(want) == [1, 2, 3, 4]
    for step in want:
        assert {k: got[step][k] for k in SAME_ON_EVERY_RUN} == {k: want[step][k] for k in SAME_ON_EVERY_RUN}
    assert bytes_of_weights(ended) == bytes_of_weights(whole)
    before, after = (json.loads(done.out.splitlines()[-1])[name] for name in ("before", "after"))
    assert (before, after) == tuple(json.loads(result.out.splitlines()[-1])[name] for name in ("before", "after"))
    if how is LAG:
        assert [got[step]["sampling/policy_lag/max"] for step in want] == [0.0, 1.0, 2.0, 2.0]
        assert got[3]["sampling/policy_lag/mean"] >= 1 and got[4]["sampling/policy_lag/mean"] < 2  # not all are older
        assert got[3]["sampling/importance_sampling_ratio/mean"] != 1.0
        assert "time/draw_s" in got[3]
        failed = [step["reward_failures"] for step in want.values()]
        assert failed == [step["reward_failures"] for step in got.values()] and sum(failed) > 1
        assert not (whole / "quarantine.jsonl").exists() and not (ended / "quarantine.jsonl").exists()


def test_a_run_without_a_gradient_says_so_and_its_end_is_not_repeated(train_arguments, run_here, tmp_path):
    """Answers of 2 tokens have no interval, so that all rewards are 0. What is printed says why."""
    arguments = train_arguments(
        *(tmp_path / "run", "--rollout.max_new_tokens=2", "--data.eval=[]"),
        *("--checkpoint.every=1", "--checkpoint.export=false", "--train.print_every=0"),
    )
    for num_steps, code in ((0, 0), (1, 3), (1, 0), (2, 3)):  # the third has no step left; the fourth goes on from it
        done = run_here([*arguments, f"--train.num_steps={num_steps}"])
        assert done.code == code, done.err
        result = json.loads(done.out.splitlines()[-1])
        assert result["exit_code"] == code
        assert ("no update of this run had a gradient that is not 0" in result.get("no_signal", "")) == (code == 3)
        assert done.err.splitlines()[-1:] == [f"vcr1-fast: no signal: {result.get('no_signal')}"] * (code == 3)
        assert done.out.count("no signal: in 1 steps in a row") == done.out.count("  asked (") / 3 == (code == 3)
        for cause in (
            "all 16 answers were cut at rollout.max_new_tokens=2: raise it",
            "none of 16 answers has the form",
        ):
            assert (f"  likely: {cause}" in done.out) == (f"; likely: {cause}" in str(result)) == (code == 3)


def test_a_signal_of_an_earlier_start_counts(train_arguments, run_here, tmp_path):
    arguments = train_arguments(tmp_path / "run", "--data.eval=[]", "--checkpoint.export=false")
    assert run_here([*arguments, "--train.num_steps=1"]).code == 0
    assert run_here([*arguments, "--train.num_steps=2", "--rollout.max_new_tokens=2"]).code == 0


@pytest.mark.parametrize(
    ("program", "override", "message"),
    [
        ("train", "--data.eval=[]", "nothing of the first step can be used"),
        ("sft", "--data.eval=[]", "nothing of the first step can be used"),
        ("train", "--eval.max_examples=2", "none of the 4 held-out samples can be used"),
        ("eval", "--eval.max_examples=2", "none of the 4 held-out samples can be used"),
    ],
)
def test_a_wrong_video_root_is_an_error_that_names_it(train_arguments, run_here, tmp_path, program, override, message):
    arguments = train_arguments(tmp_path / "run", "--data.video_root=/their", override, program=program)
    done = run_here(arguments)
    assert done.code == 1
    assert message in done.err and "/their" in done.err and "no such file" in done.err
    assert not list((tmp_path / "run").glob("checkpoints/*")) and not (tmp_path / "run" / "model").exists()


def test_supervised_steps_lower_the_loss(train_arguments, run_here, tmp_path):
    run = tmp_path / "run"
    arguments = train_arguments(run, "--sft.num_steps=8", "--sft.examples_per_step=8", program="sft")
    assert run_here([*arguments, "--model.path=tiny", "--data.eval=[]"]).code == 0
    losses = [record["nll"] for record in steps_of(run).values()]
    assert min(losses[-2:]) < losses[0] - 0.02


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.path=nowhere", "model.path is 'nowhere', but nowhere/config.json does not exist"),
        ("--data.train=[]", "data.train is empty"),
        ("--data.train=[none.jsonl]", "none.jsonl"),
        ("--train.output_dir=/proc/run", "train.output_dir is /proc/run, which cannot be written"),
    ],
)  # fmt: skip
def test_what_a_run_finds_wrong_ends_it_in_one_line(train_arguments, run_here, tmp_path, override, message):
    done = run_here(train_arguments(tmp_path / "run", override))
    assert done.code == 1
    assert message in done.err


def test_batch_that_does_not_divide_by_the_ranks_is_refused(train_arguments, tmp_path):
    done = run_on_two_ranks(train_arguments(tmp_path / "run", "--train.prompts_per_step=3"))
    assert done.code != 0
    assert "train.prompts_per_step is 3, but there are 2 ranks" in done.err


@pytest.mark.slow
def test_co_training_options_on_two_ranks_resume_to_the_same_bits(train_arguments, tmp_path):
    """Task weights, per-task scale, ground truths and dynamic sampling together: the checkpoint is all their state.

    Only the whole run is evaluated, which must not change it.
    """
    options = (
        "--train.num_steps=2", "--checkpoint.every=1", "--train.samples_every=2",
        "--data.mixture.temporal_grounding=3", "--data.mixture.object_tracking=1",
        "--algorithm.scale_advantages=task", "--algorithm.scale_decay=0.9", "--algorithm.minibatches_per_rollout=2",
        "--rollout.num_ground_truth=1", "--rollout.max_resample_rounds=1", "--task.shaping.iou=tempsamp_r1",
        "--task.length_reward=overlong", "--task.length_tokens=[40,96]", "--optimizer.schedule=constant",
        "--task.temporal_contrast=true", "--task.reward_weights.order=0.3", "--task.iou=boundary",
    )  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = run_on_two_ranks(train_arguments(whole, *options))
    assert done.code == 0, done.err[-3000:]
    result = json.loads(done.out.splitlines()[-1])
    assert result["steps"] == 2 and set(result["after"]) == TASKS

    shutil.copytree(whole / "checkpoints" / "step_000001", resumed / "checkpoints" / "step_000001")
    done = run_on_two_ranks(train_arguments(resumed, *options, "--data.eval=[]"))
    assert done.code == 0 and "resumed from" in done.out, done.err[-3000:]
    want, got = steps_of(whole), steps_of(resumed)
    assert (list(want), list(got)) == ([1, 2], [2])
    names = [name for name in want[2] if name.startswith(("epoch/", "advantage_scale/", "sampling/", "rewards/"))]
    assert {"epoch/temporal_grounding", "advantage_scale/temporal_grounding", "sampling/ground_truths"} <= set(names)
    compared = (*SAME_ON_EVERY_RUN, *names)
    assert {k: got[2].get(k) for k in compared} == {k: want[2].get(k) for k in compared}
    assert bytes_of_weights(resumed) == bytes_of_weights(whole)
    rows = [json.loads(line) for line in (whole / "rewards.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2}
    ids = sorted(row["id"] for row in rows if row["step"] == 2)
    assert len(ids) >= 4
    samples = [json.loads(line) for line in (whole / "samples" / "step_2.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in samples) == ids  # of both ranks
    assert any(not answer["is_sampled"] for row in samples for answer in row["answers"])  # the ground truths
