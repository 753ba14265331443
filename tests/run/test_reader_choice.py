"""What `video.reader: auto` comes to: measured in a new run, taken again by what goes on from it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.tiny_policy import run_ranks
from vcr1_fast.evaluate import evaluate_command
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run import reader_choice
from vcr1_fast.run.reader_choice import candidates, reader_of, with_reader
from vcr1_fast.settings.config import Config, ConfigError, VideoConfig
from vcr1_fast.settings.io import load_config, load_settings
from vcr1_fast.settings.video import ReaderName
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset
from vcr1_fast.tasks import make_tasks
from vcr1_fast.train import train
from vcr1_fast.video import dali_codecs
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.read import open_reader
from vcr1_fast.video.reader_speed import Speed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    settings = SynthConfig(output_dir=str(folder), num_train=4, num_eval=2, kinds=("grounding",))
    write_dataset(settings, show_progress=False)
    return folder


def settings(data: Path, *overrides: str) -> Config:
    files = [f"--data.{name}=[{data}/{name}_grounding.jsonl]" for name in ("train", "eval")]
    return load_config("tiny", [*files, *overrides])


def chosen(config: Config, kept: str | None = None, *, trains: bool = True) -> Config:
    return with_reader(config, SINGLE_PROCESS, make_tasks(config.task), kept, trains=trains)


@pytest.mark.parametrize("setting", ["pyav", "decord", "torchcodec", "dali", "dali+pyav", "torchcodec+pyav"])
def test_the_name_of_a_reader_says_its_setting(setting: ReaderName) -> None:
    try:
        reader = open_reader(VideoConfig(reader=setting))
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    with contextlib.closing(reader):
        assert reader_of(reader.name) == setting


def test_names_of_other_machines() -> None:
    names = {
        "dali 2.4.0 gpu h264+hevc, others pyav 18.1.0, images pyav 18.1.0": "dali+pyav",
        "torchcodec_cuda 0.14.1 h264+vp9 (FFmpeg 7), others pyav 18.1.0, images pyav 18.1.0": "torchcodec_cuda+pyav",
        "torchcodec 0.13.0 (FFmpeg 6), others pyav 18.1.0, images pyav 18.1.0": "torchcodec+pyav",
        **dict.fromkeys(("", "vlc 3", "vlc 3, others pyav 18"), None),
    }
    assert {name: reader_of(name) for name in names} == names


def test_only_a_gpu_gives_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert candidates(cpu) == ["pyav"]
    monkeypatch.setattr(dali_codecs, "version", lambda: "2.4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert candidates(gpu) == ["dali+pyav", "pyav", "torchcodec_cuda+pyav", "torchcodec+pyav"]
    monkeypatch.setattr(dali_codecs, "version", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert candidates(gpu) == ["pyav"]


def test_measured_for_real_on_the_runs_own_clips(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reader_choice, "candidates", lambda device: ["decord", "pyav"])
    config = chosen(settings(data, "--video.num_workers=1", "--eval.video.reader=auto"))
    taken = config.video.reader
    assert taken in ("decord", "pyav") and config.eval.video.reader == taken
    told = capsys.readouterr().out
    assert f"taken and kept: {taken}" in told and "a clip, pyav 0." in told and "(by 4 clips, on " in told


def test_what_was_there_before_is_taken_without_measuring(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_choice, "candidates", lambda device: ["decord", "pyav"])
    monkeypatch.setattr(reader_choice, "measure_readers", lambda *_: pytest.fail("measured"))
    auto = settings(data)
    for kept, trains, reader in (
        ("decord 0.6.0, images pyav 18", True, "decord"),
        ("decord 0.6.0, images pyav 18", False, "decord"),
        ("dali 2.4.0 cpu vp9, others pyav 18", True, "dali+pyav"),  # no candidate, but the run's own
    ):
        assert chosen(auto, kept, trains=trains).video.reader == reader
    asked = settings(data, "--video.reader=decord")
    assert chosen(asked, "pyav 18") is asked
    nothing_to_read = load_config("tiny", ["--data.train=[]", "--data.eval=[]"])
    assert chosen(nothing_to_read).video.reader == "pyav"
    not_there = load_config("tiny", ["--data.train=[gone.jsonl]", "--data.eval=[]"])
    assert chosen(not_there, trains=False).video.reader == chosen(not_there).video.reader == "pyav"
    monkeypatch.setattr(reader_choice, "candidates", lambda device: ["pyav"])
    assert chosen(auto, "decord 0.6.0", trains=False).video.reader == "pyav"


def test_a_run_keeps_its_reader_when_it_goes_on_and_when_its_model_is_scored(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part of the run, and the evaluation, would find pyav faster, but never look."""

    def measured(readers: Sequence[ReaderName], clips: Sequence[ClipRequest], cores: Sequence[int]) -> list[Speed]:
        assert len(clips) == 4 and set(cores) <= os.sched_getaffinity(0)
        num_measured.append(len(readers))
        return [Speed(reader, reader, 1, dict.fromkeys(clips, 1 + readers.index(reader))) for reader in readers]

    num_measured: list[int] = []
    monkeypatch.setattr(reader_choice, "measure_readers", measured)
    monkeypatch.setattr(reader_choice, "candidates", lambda device: ["decord", "pyav"])
    sizes = ["--train.prompts_per_step=2", "--rollout.group_size=2", "--rollout.max_new_tokens=4"]
    run = [f"--train.output_dir={tmp_path}", "--checkpoint.every=1", "--video.num_workers=0", "--eval.max_examples=1"]
    files = [f"--data.{name}=[{data}/{name}_grounding.jsonl]" for name in ("train", "eval")]

    def config(num_steps: int, *overrides: str) -> Config:
        return load_settings(Config, "tiny", [*files, *sizes, *run, f"--train.num_steps={num_steps}", *overrides])

    def reader(step: int) -> str:
        return json.loads((tmp_path / "checkpoints" / f"step_{step:06d}" / "state.json").read_text())["reader"]

    train(config(1))
    assert reader(1).startswith("decord 0.") and num_measured == [2]
    monkeypatch.setattr(reader_choice, "candidates", lambda device: ["pyav", "decord"])
    train(config(2))
    assert reader(2) == reader(1) and num_measured == [2]
    assert load_config(str(tmp_path / "config.yaml"), []).video.reader == "auto"
    scored = evaluate_command(config(2, f"--model.path={tmp_path / 'model'}"))
    assert scored["reader"] == reader(1) and num_measured == [2]
    with pytest.raises(ConfigError, match=r"made with the video reader 'decord .*, this run has 'pyav"):
        train(config(3, "--video.reader=pyav"))


def test_all_ranks_take_what_rank_0_takes_at_their_part_of_the_cores(data: Path, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("reader_choice_ranks.py")
    run_ranks(worker, str(tmp_path), f"{data}/train_grounding.jsonl")
    first, second = (json.loads((tmp_path / f"rank_{rank}").read_text()) for rank in (0, 1))
    assert first[0] == second[0] == "decord"
    assert first[1] == second[1] and first[1].startswith("rank 1 has the video reader 'decord 0.1', rank 0 has 'decord")
    assert len(first[2]) == max(1, len(os.sched_getaffinity(0)) // 2) and second[2] == []
