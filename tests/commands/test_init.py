"""`vcr1-fast init`: what it reads, what it chooses, and that what it writes can be run."""

import json
import re
from pathlib import Path

import pytest

from tests.command_line import run
from vcr1_fast.commands import init, new_config
from vcr1_fast.commands.new_config import Facts, choose, config_of
from vcr1_fast.commands.plan import plan_command
from vcr1_fast.learner.model_size import read_model_size
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES
from vcr1_fast.settings.checks import check_settings
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import load_config

FITS = {"80 GB (A100, H100)": [], "141 GB (H200)": []}


@pytest.fixture(autouse=True)
def no_sglang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(init, "_sglang", lambda: None)
    monkeypatch.chdir(tmp_path)


def write_rows(path: str, num_rows: int, duration_s: float, **change: object) -> None:
    row = {"task": "temporal_grounding", "query": "a dog barks", "duration_s": duration_s, "intervals": [[1.0, 2.5]]}
    rows = [row | {"video": f"{i}.mp4"} | change for i in range(num_rows)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def facts(num_gpus: int, rows: int = 2000, longest_s: float = 600.0, sglang: str | None = None) -> Facts:
    size = read_model_size("nowhere/Qwen2.5-VL-7B")
    files = (("a.jsonl",), ("b.jsonl",), None)
    return Facts("models/7b", size, *files, {"temporal_grounding": rows}, [8.0, longest_s], num_gpus, sglang, "runs/x")


@pytest.mark.parametrize(("model", "side", "timestamps"), [("tiny", 84, "positions"), ("tiny3", 96, "text")])
def test_a_tiny_model_on_a_cpu(capsys, model: str, side: int, timestamps: str):
    write_rows("my rows.jsonl", 20, 8.0)
    Path("bad.jsonl").write_text(Path("my rows.jsonl").read_text() + '{"task": "temporal_grounding"}\n')
    tokens = ("my.yaml", "--data", "my rows.jsonl", "bad.jsonl", "--model", model, "--gpus", "0")
    code, out, err = run(capsys, "init", *tokens)
    assert code == 0 and err == "bad annotation: bad.jsonl:21: key 'video' is missing; the row has task\n", err
    assert "bad.jsonl (schema rows): 21 rows, 20 examples; refused: 1" in out
    assert out.splitlines()[-3:] == [
        "next:",
        "  vcr1-fast data my.yaml    # counts rows and videos",
        "  vcr1-fast train my.yaml",
    ]
    config = load_config("my.yaml", [])
    check_settings(config, "train")
    packaged = load_config("tiny", [])
    assert config.data.train == ("my rows.jsonl", "bad.jsonl") and config.train.output_dir == "runs/my"
    assert (config.optimizer, config.rollout.max_new_tokens) == (packaged.optimizer, 96)
    video = config.video
    assert (video.max_frames, video.min_frame_pixels, video.max_frame_pixels) == (16, side**2, side**2)
    assert config.task.timestamps == timestamps
    assert (config.model.device, config.train.num_steps, config.train.prompts_per_step) == ("cpu", 100, 8)
    lines = Path("my.yaml").read_text().splitlines()
    values = [i for i, line in enumerate(lines) if re.match(r" *\w+: .", line)]
    assert len(values) > 15 and all(lines[i - 1].strip().startswith("# ") for i in values)
    assert "  # 40 usable rows: 40 of temporal_grounding" in lines and "  # 20.0 passes over 40 rows" in lines

    assert run(capsys, "init", *tokens) == (
        1,
        "",
        "vcr1-fast: error: my.yaml exists and is left as it is: give another name, or delete it first\n",
    )
    assert Path("my.yaml").read_text().splitlines() == lines


@pytest.mark.parametrize(("model_name", "num_gpus"), [("7B", 1), ("7B", 8), ("3B", 3)])
def test_a_large_model_fits_by_the_sums_of_the_dry_run(capsys, num_gpus: int, model_name: str):
    """A folder with config.json and no weights. One GPU of 80 GB has no room for the moments of 8 billion weights."""
    write_rows("rows.jsonl", 900, 34.0)
    write_rows("held_out.jsonl", 2, 60.0)
    Path("model").mkdir()
    content = {"model_type": "qwen2_5_vl"} | PUBLIC_SIZES[f"Qwen2.5-VL-{model_name}"]
    Path("model", "config.json").write_text(json.dumps(content))
    Path("model", "vcr1_fast_video.json").write_text('{"min_frame_pixels": 25088}')  # which init leaves to it
    tokens = ("my.yaml", "--data", "rows.jsonl", "--eval", "held_out.jsonl", "--model", "model", "--videos", "clips")
    code, out, err = run(capsys, "init", *tokens, f"--gpus={num_gpus}")
    assert (code, err) == (0, "")
    train = f"  torchrun --nproc-per-node={num_gpus} -m vcr1_fast train my.yaml"
    assert out.splitlines()[-1] == (train if num_gpus > 1 else "  vcr1-fast train my.yaml")
    config = load_config("my.yaml", [])
    assert config.data.video_root == "clips" and config.video.max_frames == 68  # 34 s at 2 a second
    assert config.video.min_frame_pixels == 25088
    assert plan_command(config, num_gpus, is_fast=True)["exceeds"] == FITS
    has_adapters = num_gpus == 1
    assert config.model.lora.rank == (32 if has_adapters else 0)
    assert config.optimizer.learning_rate == (1e-5 if has_adapters else 1e-6)
    assert config.train.prompts_per_step == (9 if num_gpus == 3 else 8)
    assert config.train.num_steps == (100 if num_gpus == 3 else 113)  # 900 rows by 9, and by 8


def test_what_does_not_fit_is_lowered_and_says_from_what(monkeypatch):
    """7B with SGLang fits into four GPUs as it is; into ones of a seventh less only with what helps lowered."""
    whole = choose(facts(4, sglang="python"))
    assert not any("lowered" in choice.why for choice in whole.values())
    monkeypatch.setattr(new_config, "LIMIT_GB", 68.4)
    lowered = choose(facts(4, sglang="python"))
    assert {key: lowered[key].value for key in lowered if lowered[key] != whole[key]} == {"video.max_frames": 384}
    assert lowered["video.max_frames"].why.endswith("; lowered from 768 to fit into 80 GB")
    assert max(new_config.phases_gb(config_of(lowered), facts(4).size, 4).values()) <= 68.4
    config = config_of(whole)
    assert config.rollout.sglang.python == "python" and config.algorithm.sampling_correction == "token_truncate"
    assert plan_command(config, 4, is_fast=True)["exceeds"] == FITS


def test_frames_and_prompts_follow_the_rows():
    assert choose(facts(8, longest_s=31.0))["video.max_frames"].value == 62
    assert choose(facts(8, longest_s=0.5))["video.max_frames"].value == Config().video.max_frames // 48  # 8 s
    long = choose(facts(8, longest_s=3600.0))["video.max_frames"]
    assert long.value == 768 and "3,600 s, of which it takes a frame every 4.7 s" in long.why
    few = choose(facts(4, rows=6))
    assert few["train.prompts_per_step"].value == 4 and "66.7 passes" in few["train.num_steps"].why
    check_settings(config_of(few), "train", 4)
    assert init.next_commands("a b.yaml", 16)[-1] == (
        "torchrun --nnodes=2 --nproc-per-node=8 -m vcr1_fast train 'a b.yaml'"
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("--data", "none.jsonl"), "none.jsonl cannot be read: No such file or directory"),
        (("--data", "unusable.jsonl"), "there is no usable row in unusable.jsonl"),
        (("--data", "rows.jsonl", "--eval", "unusable.jsonl"), "there is no usable row in unusable.jsonl"),
        (("--data", "rows.jsonl", "--eval", "rows.jsonl"), "rows.jsonl is named 2 times"),
        (("--data", "rows.jsonl", "--gpus=-1"), "--gpus is -1, wanted 0 or more"),
        (("--data", "rows.jsonl", "--gpus=8"), "does not fit into 8 GPUs of 80 GB, even with adapters"),
    ],
)
def test_nothing_is_written_for_what_cannot_run(capsys, monkeypatch, tokens, message):
    monkeypatch.setattr(new_config, "LIMIT_GB", 1e-4)
    write_rows("rows.jsonl", 2, 8.0)
    write_rows("unusable.jsonl", 2, 8.0, intervals=[[5.0, 2.0]])
    code, _, err = run(capsys, "init", "my.yaml", "--model", "tiny", *tokens)
    assert code in (1, 2) and message in err.splitlines()[-1] and not Path("my.yaml").exists()


def test_values_that_yaml_would_misread_are_read_back(tmp_path: Path):
    chosen = {
        key: new_config.Choice(value, "a reason\nof two lines")
        for key, value in {
            "model.path": "no: #1",
            "data.train": ("2024", "ä, b.jsonl", "{x}"),
            "optimizer.learning_rate": 1e-6,
        }.items()
    }
    (tmp_path / "my.yaml").write_text(init.as_yaml(chosen, ["head"]), encoding="utf-8")
    assert load_config(str(tmp_path / "my.yaml"), []) == config_of(chosen)


def test_a_model_that_cannot_be_read(capsys):
    write_rows("rows.jsonl", 2, 8.0)
    Path("model").mkdir()
    Path("model", "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="is 'llama', wanted qwen2_5_vl"):
        init.init_command("my.yaml", ["rows.jsonl"], [], "model", 1)
