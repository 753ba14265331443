"""Whole runs through the command line: learning, resume after kill -9, bad data, two ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import Qwen2_5_VLForConditionalGeneration

from vcr1_fast.run.checkpoint import latest_checkpoint

SAME_ON_EVERY_RUN = ("loss", "reward", "grad_norm", "entropy", "completions/mean_length", "num_tokens", "epoch")


def steps_of(run: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in records if "loss" in r}


def bytes_of_weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_run_writes_what_it_says(train_command, run_command, tmp_path):
    run = tmp_path / "run"
    done = run_command(train_command(run, "--train.num_steps=2", "--checkpoint.every=1"))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 2
    for scores in (result["before"], result["after"]):
        assert set(scores) == {"temporal_grounding", "object_tracking"}
        assert all(0 <= value <= 1 for score in scores.values() for value in score["metrics"].values())
    steps = steps_of(run)
    assert list(steps) == [1, 2]
    assert steps[2]["sampling/sampling_logp_difference/mean"] < 1e-4  # engine and trainer agree
    assert steps[2]["tokens_per_s/unshared"] > 1.5 * steps[2]["tokens_per_s/executed"]
    assert {"reward", "kl", "clip_ratio/region_mean", "rewards/object_tracking/iou/mean"} <= set(steps[1])
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "config.yaml").read_text().count("group_size: 4") == 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "model")
    assert model.config.text_config.hidden_size == 128
    assert json.loads((run / "model" / "vcr1_fast.json").read_text())["reader"].startswith("pyav 1")


LAG = ("--rollout.max_policy_lag=1", "--algorithm.sampling_correction=token_truncate", "--algorithm.sampling_cap=2.0")


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--algorithm.beta=0.01",), LAG], ids=["synchronous", "one step ahead"])
def test_killed_run_resumes_to_the_same_bits(train_command, run_command, tmp_path, how):
    """One step ahead, the answers to step 3 are in the checkpoint of step 2: drawn anew they would be newer."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--train.num_steps=6", "--checkpoint.every=2", *how)
    done = run_command(train_command(whole, *options))
    assert done.returncode == 0, done.stderr[-3000:]

    process = subprocess.Popen(
        train_command(killed, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while latest_checkpoint(killed) is None or len(steps_of(killed)) < 3:  # killed after step 3, saved at step 2
            assert time.monotonic() < deadline and process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "model").exists()
    done = run_command(train_command(killed, *options))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stdout
    want, got = steps_of(whole), steps_of(killed)
    assert list(got) == list(want) == [1, 2, 3, 4, 5, 6]
    for step in want:
        assert {k: got[step][k] for k in SAME_ON_EVERY_RUN} == {k: want[step][k] for k in SAME_ON_EVERY_RUN}
    assert bytes_of_weights(killed) == bytes_of_weights(whole)
    if how is LAG:
        assert [got[step]["sampling/policy_lag/mean"] for step in want] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
        assert got[3]["sampling/importance_sampling_ratio/mean"] != 1.0
        assert "time/draw_s" in got[3]


def test_bad_videos_and_rows_are_named_and_training_goes_on(train_command, run_command, data_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(data_folder, data)
    (data / "videos" / "train-grounding-00000.mp4").write_bytes(b"")
    (data / "videos" / "train-tracking-00003.mp4").unlink()
    video = data / "videos" / "train-tracking-00004.mp4"
    video.write_bytes(video.read_bytes()[:20_000])
    rows = (data / "train_grounding.jsonl").read_text().splitlines()
    reversed_row = json.loads(rows[1]) | {"intervals": [[5.0, 2.0]]}
    (data / "train_grounding.jsonl").write_text("\n".join([rows[0], json.dumps(reversed_row), *rows[2:]]) + "\n")
    run = tmp_path / "run"
    command = [part.replace(str(data_folder), str(data)) for part in train_command(run, "--train.num_steps=4")]
    done = run_command([*command, "--data.eval=[]"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train_grounding.jsonl:2: interval 0 ends (2.0 s) before it starts (5.0 s)" in done.stderr
    bad = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(Path(record["source"]).name for record in bad) == [
        "train-grounding-00000.mp4",
        "train-tracking-00003.mp4",
        "train-tracking-00004.mp4",
    ]
    assert len(steps_of(run)) == 4
    assert steps_of(run)[4]["bad_samples"] >= 3


def test_two_ranks_train_and_write_one_run(train_command, run_command, tmp_path):
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_command([*torchrun, *train_command(run, "--train.num_steps=2")[1:]])
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(steps_of(run)) == [1, 2]
    assert steps_of(run)[1]["completions/count"] == 16
    json.loads(done.stdout.splitlines()[-1])


def test_supervised_steps_lower_the_loss(train_command, run_command, tmp_path):
    run = tmp_path / "run"
    command = train_command(run, "--sft.num_steps=8", "--sft.examples_per_step=8", program="sft")
    done = run_command([*command, "--model.path=tiny", "--data.eval=[]"])
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [record["nll"] for record in steps_of(run).values()]
    assert min(losses[-2:]) < losses[0] - 0.02


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--rollout.group_sise=4",
         "unknown setting rollout.group_sise on the command line: did you mean rollout.group_size?"),
        ("--algorithm.minibatches_per_rollout=3",
         "train.prompts_per_step is 4, but algorithm.minibatches_per_rollout is 3"),
        ("--model.path=nowhere", "model.path is 'nowhere', but nowhere/config.json does not exist"),
        ("--data.train=[]", "data.train is empty"),
        ("--data.train=[none.jsonl]", "none.jsonl"),
        ("--train.output_dir=/proc/run", "train.output_dir is /proc/run, which cannot be written"),
    ],
)  # fmt: skip
def test_wrong_settings_end_in_one_line(train_command, run_command, tmp_path, override, message):
    done = run_command(train_command(tmp_path / "run", override))
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_batch_that_does_not_divide_by_the_ranks_is_refused(train_command, run_command, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_command([*torchrun, *train_command(tmp_path / "run", "--train.prompts_per_step=3")[1:]])
    assert done.returncode != 0
    assert "train.prompts_per_step is 3, but there are 2 ranks" in done.stderr


@pytest.mark.slow
def test_co_training_options_on_two_ranks_resume_to_the_same_bits(train_command, run_command, tmp_path):
    """Task weights, per-task scale, ground truths and dynamic sampling together: the checkpoint is all their state."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = (
        "--data.mixture.temporal_grounding=3", "--data.mixture.object_tracking=1", "--data.eval=[]",
        "--algorithm.scale_advantages=task", "--algorithm.scale_decay=0.9", "--algorithm.minibatches_per_rollout=2",
        "--rollout.num_ground_truth=1", "--rollout.max_resample_rounds=1", "--task.shaping.iou=tempsamp_r1",
        "--task.length_reward=overlong", "--task.length_tokens=[40,96]", "--optimizer.schedule=constant",
        "--task.temporal_contrast=true", "--task.reward_weights.order=0.3", "--task.iou=boundary",
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run, num_steps in ((whole, 3), (parts, 2), (parts, 3)):
        done = run_command([*torchrun, *train_command(run, *options, f"--train.num_steps={num_steps}")[1:]])
        assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stdout
    want, got = steps_of(whole), steps_of(parts)
    assert list(got) == list(want) == [1, 2, 3]
    names = [name for name in want[3] if name.startswith(("epoch/", "advantage_scale/", "sampling/", "rewards/"))]
    assert {"epoch/temporal_grounding", "advantage_scale/temporal_grounding", "sampling/ground_truths"} <= set(names)
    for step in want:
        assert {k: got[step].get(k) for k in (*SAME_ON_EVERY_RUN, *names)} == {
            k: want[step].get(k) for k in (*SAME_ON_EVERY_RUN, *names)
        }
    assert bytes_of_weights(parts) == bytes_of_weights(whole)
    rows = [json.loads(line) for line in (whole / "rewards.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2, 3}
    assert sum(row["step"] == 3 for row in rows) >= 4
