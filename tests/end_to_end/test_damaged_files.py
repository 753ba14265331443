"""A data set of which one file in twenty is damaged: the run ends, and names exactly those."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.video import clips, damaged
from vcr1_fast.video.quarantine import reason_class

NUM_FILES = 2000
PROMPTS_PER_STEP = 100
BAD_EVERY = 20  # 5 %


def write_data(folder: Path) -> dict[str, str]:
    """Annotations of NUM_FILES clips in train.jsonl; returns file name -> kind of damage of the bad ones."""
    sound = clips.write_clip(folder / "sound.mp4", num_frames=32, fps=8, size_px=(56, 56))
    kinds: dict[str, str] = {}
    templates: dict[str, Path] = {}
    rows: list[str] = []
    for k in range(NUM_FILES):
        name = f"{k:05d}.mp4"
        row = {
            "task": "temporal_grounding",
            "video": name,
            "query": "a light goes on",
            "duration_s": 4.0,
            "intervals": [[1.0, 2.0]],
        }
        rows.append(json.dumps(row) + "\n")
        if k % BAD_EVERY != 7:
            os.link(sound, folder / name)
            continue
        kinds[name] = kind = list(damaged.KINDS)[k // BAD_EVERY % len(damaged.KINDS)]
        if kind not in templates:
            templates[kind] = folder / f"template-{kind}.mp4"
            damaged.KINDS[kind][0](sound, templates[kind])
        if templates[kind].exists():  # "missing" has none
            os.link(templates[kind], folder / name)
    (folder / "train.jsonl").write_text("".join(rows))
    return kinds


def check_list(run: Path, kinds: dict[str, str]) -> None:
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    found = {Path(line["source"]).name: line["reason"] for line in lines}
    assert len(lines) == len(found)
    assert set(found) == set(kinds)
    for name, reason in found.items():
        assert damaged.is_class_of(kinds[name], reason_class(reason)), (kinds[name], reason)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_over_a_data_set_with_damaged_files_names_exactly_those(
    tmp_path: Path, num_ranks: int, run_command: Callable[[list[str]], CompletedProcess[str]]
):
    kinds = write_data(tmp_path)
    assert len(kinds) == NUM_FILES // BAD_EVERY
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = [
        *(sys.executable, *(torchrun if num_ranks > 1 else []), "-m", "vcr1_fast", "train", "tiny"),
        f"--data.train=[{tmp_path}/train.jsonl]", "--data.eval=[]", f"--train.output_dir={run}",
        f"--train.num_steps={NUM_FILES // PROMPTS_PER_STEP}", f"--train.prompts_per_step={PROMPTS_PER_STEP}",
        "--rollout.group_size=2", "--rollout.max_new_tokens=1", "--checkpoint.every=0",
        "--video.num_workers=1", f"--video.max_source_pixels={damaged.MAX_SOURCE_PIXELS}",
        "--video.max_frames=4", "--video.min_frame_pixels=784", "--video.max_frame_pixels=784",
    ]  # fmt: skip
    done = run_command(command)
    assert done.returncode == 0, done.stderr[-3000:]
    check_list(run, kinds)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "bad_samples" in record][-1]
    assert last["step"] == NUM_FILES // PROMPTS_PER_STEP and last["bad_samples"] == len(kinds)
    assert last["bad_samples/empty"] == Counter(kinds.values())["empty"]
    assert last["bad_samples/missing"] == Counter(kinds.values())["missing"]
    assert last["bad_samples/too_large"] == Counter(kinds.values())["huge"] + Counter(kinds.values())["bomb"]


def test_too_many_damaged_files_stop_the_run_with_a_summary(
    tmp_path: Path, run_command: Callable[[list[str]], CompletedProcess[str]]
):
    rows = [
        {
            "task": "temporal_grounding",
            "video": f"{k}.mp4",
            "query": "a light goes on",
            "duration_s": 4.0,
            "intervals": [[1.0, 2.0]],
        }
        for k in range(24)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for k in range(10):
        (tmp_path / f"{k}.mp4").touch()
    command = [
        *(sys.executable, "-m", "vcr1_fast", "train", "tiny", f"--data.train=[{tmp_path}/train.jsonl]"),
        *("--data.eval=[]", f"--train.output_dir={tmp_path / 'run'}", "--train.num_steps=1"),
        *("--train.prompts_per_step=24", "--video.num_workers=1"),
    ]
    done = run_command(command)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "24 of 24 samples could not be used, more than train.max_bad_sample_frac = 0.5" in done.stderr
    assert "24 files (14 missing, 10 empty):" in done.stderr
    assert "  and 19 more" in done.stderr
