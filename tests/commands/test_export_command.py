"""`vcr1-fast export` of a run's checkpoint gives what the run itself exported; what it refuses; what it pushes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import run
from tests.tiny_policy import run_ranks
from vcr1_fast import cli, tiny
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run.checkpoint_model import with_model_of_checkpoint
from vcr1_fast.run.named_model import named_model
from vcr1_fast.settings.config import Config
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one supervised step with adapters."""
    folder = tmp_path_factory.mktemp("run")
    clips = SynthConfig(output_dir=str(folder / "data"), num_train=2, num_eval=1, kinds=("grounding",))
    write_dataset(clips, show_progress=False)
    sizes = ["--sft.num_steps=1", "--sft.examples_per_step=2", "--video.num_workers=0", "--model.lora.rank=2"]
    files = [f"--data.train={folder / 'data' / 'train_grounding.jsonl'}", "--data.eval=[]"]
    where = [f"--train.output_dir={folder / 'run'}", "--optimizer.learning_rate=0.1"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["sft", "tiny", *sizes, *files, *where])
    assert ended.value.code == 0
    return folder / "run"


def test_the_export_of_a_checkpoint_is_that_of_its_run(trained: Path, tmp_path: Path, capsys) -> None:
    code, out, _ = run(capsys, "export", str(trained), str(tmp_path / "merged"))
    assert code == 0
    checkpoint = str(trained / "checkpoints" / "step_000001")
    assert json.loads(out.splitlines()[-1]) == {"checkpoint": checkpoint, "folder": str(tmp_path / "merged")}
    own = {file.name: file.read_bytes() for file in (trained / "model").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()} == own
    assert own[WEIGHTS] != (Path(tiny.__file__).parent / WEIGHTS).read_bytes()  # it was trained

    assert run(capsys, "export", checkpoint, str(tmp_path / "half"), "--dtype", "bfloat16")[0] == 0
    whole, half = load_file(trained / "model" / WEIGHTS), load_file(tmp_path / "half" / WEIGHTS)
    assert all(torch.equal(half[name], whole[name].to(torch.bfloat16)) for name in whole)
    assert '"bfloat16"' in (tmp_path / "half" / "config.json").read_text()

    assert run(capsys, "export", str(trained), str(tmp_path / "adapter"), "--no-merge")[0] == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (trained / "adapter" / name).read_bytes()


def test_a_run_is_named_by_its_folder_before_its_end_and_after(trained: Path, tmp_path: Path) -> None:
    after = named_model(str(trained))
    assert (after.path, after.settings) == (str(trained / "model"), str(trained / "config.yaml"))
    assert named_model(str(trained / "model")) == after
    running = tmp_path / "running"
    shutil.copytree(trained, running, ignore=shutil.ignore_patterns("model", "adapter"))
    before = named_model(str(running))
    assert before.settings == str(running / "config.yaml")
    assert named_model(str(running / "checkpoints" / "step_000001")) == before
    made = Path(with_model_of_checkpoint(before.put_into(Config()), SINGLE_PROCESS).model.path)
    assert made.parent == running / "eval" / "models"
    assert (made / WEIGHTS).read_bytes() == (trained / "model" / WEIGHTS).read_bytes()


def test_of_two_ranks_that_predict_one_writes_the_model(trained: Path, tmp_path: Path) -> None:
    running, rows, notes = tmp_path / "running", tmp_path / "rows.jsonl", tmp_path / "notes"
    shutil.copytree(trained, running, ignore=shutil.ignore_patterns("model", "adapter"))
    [video] = [*(trained.parent / "data" / "videos").glob("*.mp4")][:1]
    asked = [{"id": str(i), "task": "temporal_grounding", "video": str(video), "query": "x"} for i in (0, 1)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    settings = (f"--model.path={running}", "--video.num_workers=0", "--eval.max_new_tokens=4")
    worker = Path(__file__).with_name("predict_ranks.py")
    run_ranks(worker, str(notes), str(rows), "--output", str(tmp_path / "said.jsonl"), *settings)
    assert notes.read_text() == "0"
    [made] = (running / "eval" / "models").iterdir()
    assert (made / WEIGHTS).read_bytes() == (trained / "model" / WEIGHTS).read_bytes()
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["id"] for line in said] == ["0", "1"] and said[0]["answer"] == said[1]["answer"] != ""


def test_what_cannot_be_exported_is_one_line(trained: Path, tmp_path: Path, capsys) -> None:
    damaged, whole = tmp_path / "damaged", tmp_path / "whole"
    shutil.copytree(trained / "checkpoints" / "step_000001", damaged)
    with next(damaged.glob("shard-*")).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    whole.mkdir()
    (whole / "notes.txt").write_text("mine")
    cases = {
        (str(tmp_path / "none"), str(tmp_path / "out")): "none does not exist",
        (str(damaged), str(tmp_path / "out")): "is damaged: shard-",
        (str(trained), str(whole)): "exists, wanted a folder that does not: nothing is written over",
        (str(trained), str(tmp_path / "out"), "--no-merge", "--dtype=float32"): "an adapter is written in float32",
    }
    for tokens, message in cases.items():
        code, out, err = run(capsys, "export", *tokens)
        assert (code, out, err.count("\n")) == (1, "", 1) and message in err, err
    assert not (tmp_path / "out").exists() and (whole / "notes.txt").read_text() == "mine"


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_go_on(trained: Path, tmp_path: Path, capsys, monkeypatch):
    pushed: list[tuple[str, Path]] = []

    class Hub:
        def create_repo(self, repo: str, exist_ok: bool) -> None:
            if repo == "me/offline":
                raise ConnectionError("no\nnetwork")

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            pushed.append((repo_id, folder_path))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    code, out, _ = run(capsys, "export", str(trained), str(tmp_path / "a"), "--push", "me/mine")
    assert code == 0 and json.loads(out.splitlines()[-1])["pushed"] == "https://hub/me/mine"
    assert pushed == [("me/mine", tmp_path / "a")]
    code, _, err = run(capsys, "export", str(trained), str(tmp_path / "b"), "--push", "me/offline")
    assert code == 1 and "could not be pushed to me/offline (ConnectionError: no network): hf auth login" in err
    assert f"hf upload me/offline {tmp_path / 'b'}" in err and (tmp_path / "b" / WEIGHTS).is_file()
