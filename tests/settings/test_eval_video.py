"""eval.video: every setting of the section video, for evaluation alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vcr1_fast.evaluation.answer_store import answer_settings
from vcr1_fast.run.resuming import differing_settings
from vcr1_fast.settings.config import Config, ConfigError, EvalVideoConfig, VideoConfig
from vcr1_fast.settings.io import config_to_yaml, load_config, setting_types

OTHER = "--model.path=none"  # which says nothing of its frames


def test_it_has_the_keys_of_video_each_left_to_it_by_default():
    video, over = setting_types(VideoConfig), setting_types(EvalVideoConfig)
    assert list(over) == list(video)
    assert all(over[name] == video[name] | None for name in video)
    assert Config().eval_video == Config().video


def test_what_is_given_holds_in_evaluation_and_the_rest_is_videos(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("video: {fps: 1, max_frames: 64}\neval: {video: {fps: 4, total_pixels: 10838016}}")
    config = load_config(str(tmp_path / "c.yaml"), ["--eval.video.max_frames=512", "--video.reader=pyav", OTHER])
    assert config.video == VideoConfig(fps=1.0, max_frames=64, reader="pyav")
    assert config.eval_video == replace(config.video, fps=4.0, max_frames=512, total_pixels=128 * 108 * 28 * 28)
    (tmp_path / "saved.yaml").write_text(config_to_yaml(config))
    assert load_config(str(tmp_path / "saved.yaml"), []) == config
    assert replace(config, video=config.eval_video).eval_video == config.eval_video


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--eval.video.fbs=4"], r"unknown setting eval\.video\.fbs .* did you mean eval\.video\.fps\?"),
        (["--eval.video.fps=often"], r"eval\.video\.fps is 'often' on the command line, wanted a number or null"),
        (["--eval.video.fps=0"], r"^eval\.video\.fps is 0\.0, wanted a positive number"),
        (["--eval.video.max_frames=5"], r"^eval\.video\.max_frames is 5, wanted an even number"),
        (["--eval.video.max_frames=2"], r"^video\.min_frames is 4, more than eval\.video\.max_frames 2$"),
        (["--eval.video.reader=vlc"], r"eval\.video\.reader is 'vlc' .* wanted one of auto, pyav, .* or null"),
        (["--video.fps=0", "--eval.video.fps=4"], r"^video\.fps is 0\.0"),
    ],
)
def test_what_is_wrong_is_named_as_in_video(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_answers_are_kept_by_what_evaluation_sees_and_a_run_goes_on_whatever_that_is():
    plain, denser = load_config(None, [OTHER]), load_config(None, [OTHER, "--eval.video.fps=4"])
    as_seen = [replace(config, video=config.eval_video) for config in (plain, denser)]
    kept = [answer_settings(config, "w", "pyav", torch.device("cpu")) for config in as_seen]
    assert {name for name in kept[0] if kept[0][name] != kept[1][name]} == {"video.fps"}
    assert differing_settings(config_to_yaml(plain), config_to_yaml(denser)) == []
