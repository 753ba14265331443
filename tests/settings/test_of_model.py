"""What the model says of its frames: below the file and the command line, above the defaults."""

import json
from pathlib import Path

import pytest

from vcr1_fast.run.model_folder import PACKAGED, VIDEO_FILE
from vcr1_fast.settings.config import Config, ConfigError, VideoConfig
from vcr1_fast.settings.io import config_to_yaml, load_config
from vcr1_fast.settings.of_model import check_model
from vcr1_fast.tiny.build import VIDEO
from vcr1_fast.tiny.cold_start import TYPES


def sizes(path: str | None, *overrides: str) -> tuple[int, int, int]:
    video = load_config(path, list(overrides)).video
    return video.max_frames, video.min_frame_pixels, video.max_frame_pixels


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_tiny_model_brings_its_frames_and_what_is_set_wins():
    for model, model_type in TYPES.items():
        assert json.loads((PACKAGED[model] / VIDEO_FILE).read_text()) == VIDEO[model_type]
    assert sizes(None) == sizes("tiny") == sizes(None, "--video.fps=4") == (16, 7056, 7056)
    Path("my.yaml").write_text("model: {path: tiny}\nvideo: {max_frames: 8}\n")
    assert sizes("my.yaml") == (8, 7056, 7056)
    assert sizes("my.yaml", "--video.max_frames=4") == (4, 7056, 7056)
    wide = VideoConfig().max_frame_pixels
    assert sizes("my.yaml", "--video.min_frame_pixels=12544") == (8, 12544, wide)  # the other bound is no longer its
    assert load_config("my.yaml", ["--eval.video.max_frames=32"]).eval_video.max_frame_pixels == 7056


def test_other_models_have_the_defaults():
    Path("other").mkdir()
    for path in ("other", "nowhere"):
        assert load_config(None, [f"--model.path={path}"]).video == VideoConfig()
    assert load_config("tiny", ["--model.path=other"]).video == VideoConfig(num_workers=2)
    assert load_config(None, ["--model.path=Qwen/Qwen3-VL-4B-Instruct"]).task.timestamps == "text"  # not here yet


def write_config(folder: str, model_type: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps({"model_type": model_type}))


def test_qwen3_vl_has_the_same_tokens_in_its_own_pixels_and_times_in_words():
    write_config("three", "qwen3_vl")
    config = load_config(None, ["--model.path=three"])
    video, block = config.video, 32 * 32
    assert (video.total_pixels, video.min_frame_pixels, video.max_frame_pixels) == (
        3584 * block,
        16 * block,
        768 * block,
    )
    assert config.task.timestamps == "text"
    assert sizes(None, "--model.path=three", "--video.min_frame_pixels=2048") == (768, 2048, 768 * 28 * 28)
    Path("my.yaml").write_text("model: {path: three}\nvideo: {fps: 1.0}\ntask: {think: false}\n")
    assert load_config("my.yaml", []).task.timestamps == "text"
    Path("three", VIDEO_FILE).write_text('{"max_frame_pixels": 20480}')
    assert sizes(None, "--model.path=three") == (768, 16 * block, 20480)


def test_what_contradicts_the_family_is_said_before_the_start():
    write_config("three", "qwen3_vl")
    check_model(load_config(None, ["--model.path=three"]))
    positions = load_config(None, ["--model.path=three", "--task.timestamps=positions"])
    with pytest.raises(ConfigError, match=r"task\.timestamps is positions, but three is a qwen3_vl, .*: set"):
        check_model(positions)
    for name, path in (("two", "qwen2_5_vl"), ("unknown", "qwen3_5")):
        write_config(name, path)
        check_model(load_config(None, [f"--model.path={name}", "--rollout.engine=sglang"]))


def test_a_checkpoint_has_those_of_the_model_that_its_run_began_with():
    for name, path in (("of_tiny", "tiny"), ("of_other", "other")):
        Path(name).mkdir()
        settings = config_to_yaml(load_config(None, [f"--model.path={path}"]))
        (Path(name) / "state.json").write_text(json.dumps({"config_yaml": settings}))
    Path("damaged").mkdir()
    Path("damaged", "state.json").write_text('{"config_yaml": "- 1"}')
    assert sizes(None, "--model.path=of_tiny") == (16, 7056, 7056)
    for name in ("of_other", "damaged"):
        assert load_config(None, [f"--model.path={name}"]).video == Config().video


@pytest.mark.parametrize("content", ['{"max_frame": 3}', '{"max_frames": "16"}', '{"num_workers": 0}', "[1]"])
def test_a_damaged_file_is_named(content: str):
    Path("model").mkdir()
    Path("model", VIDEO_FILE).write_text(content)
    with pytest.raises(ConfigError, match=f"model/{VIDEO_FILE} "):
        load_config(None, ["--model.path=model"])
