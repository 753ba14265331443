"""A data set of which one file in twenty is damaged: the run ends, and names exactly those."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Ended, run_on_two_ranks
from tests.logged import logged
from tests.video import clips, damaged
from vcr1_fast.video.quarantine import reason_class

NUM_FILES = 400
PROMPTS_PER_STEP = 40
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
    rows.append(json.dumps(row | {"intervals": [[2.0, 1.0]]}) + "\n")
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
def test_a_run_over_a_data_set_with_damaged_files_names_exactly_those(tmp_path: Path):
    kinds = write_data(tmp_path)
    assert len(kinds) == NUM_FILES // BAD_EVERY and set(kinds.values()) == damaged.KINDS.keys()
    run = tmp_path / "run"
    arguments = [
        *("train", "tiny"),
        f"--data.train=[{tmp_path}/train.jsonl]", "--data.eval=[]", f"--train.output_dir={run}",
        f"--train.num_steps={NUM_FILES // PROMPTS_PER_STEP}", f"--train.prompts_per_step={PROMPTS_PER_STEP}",
        "--rollout.group_size=2", "--rollout.max_new_tokens=1", "--checkpoint.every=0",
        "--video.num_workers=1", f"--video.max_source_pixels={damaged.MAX_SOURCE_PIXELS}",
        "--video.max_frames=4", "--video.min_frame_pixels=784", "--video.max_frame_pixels=784",
    ]  # fmt: skip
    done = run_on_two_ranks(arguments)
    # Answers of one token have no gradient: both ranks end with 3, which torchrun reports.
    assert done.code == 1 and "exitcode  : 3" in done.err and "vcr1-fast: no signal: " in done.err, done.err[-3000:]
    assert f"train.jsonl:{NUM_FILES + 1}: interval 0 ends (1.0 s) before it starts (2.0 s)" in done.err
    check_list(run, kinds)
    records = logged(run)
    last = [record for record in records if "bad_samples" in record][-1]
    assert last["step"] == NUM_FILES // PROMPTS_PER_STEP and last["bad_samples"] == len(kinds)
    assert last["bad_samples/empty"] == Counter(kinds.values())["empty"]
    assert last["bad_samples/missing"] == Counter(kinds.values())["missing"]
    assert last["bad_samples/too_large"] == Counter(kinds.values())["huge"] + Counter(kinds.values())["bomb"]


def test_too_many_damaged_files_stop_the_run_with_a_summary(tmp_path: Path, run_here: Callable[[list[str]], Ended]):
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
    arguments = [
        *("train", "tiny", f"--data.train=[{tmp_path}/train.jsonl]"),
        *("--data.eval=[]", f"--train.output_dir={tmp_path / 'run'}", "--train.num_steps=1"),
        *("--train.prompts_per_step=24", "--video.num_workers=1"),
    ]
    done = run_here(arguments)
    assert done.code == 1
    assert "nothing of the first step can be used, nor of the 32 samples after it" in done.err
    assert "24 files (14 missing, 10 empty):" in done.err
    assert "  and 19 more" in done.err
