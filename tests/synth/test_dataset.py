"""The files: real H.264, the same from the same seed, rows the tasks accept, and clear refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vcr1_fast.config import ConfigError, TaskConfig
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import make_clip, write_dataset, write_mp4
from vcr1_fast.synth.render import Renderer
from vcr1_fast.tasks.object_tracking import ObjectTracking
from vcr1_fast.tasks.temporal_grounding import TemporalGrounding


def _small(folder: Path, **changes: Any) -> SynthConfig:
    return SynthConfig(**{"output_dir": str(folder), "num_train": 2, "num_eval": 1, "duration_s": 4.0, **changes})


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_and_their_contents(tmp_path: Path) -> None:
    config = _small(tmp_path, width_px=96, height_px=64)
    summary = write_dataset(config, show_progress=False)
    assert [path.name for path in summary.annotation_files] == [
        "train_grounding.jsonl",
        "train_tracking.jsonl",
        "eval_grounding.jsonl",
        "eval_tracking.jsonl",
    ]
    assert [len(_rows(path)) for path in summary.annotation_files] == [2, 2, 1, 1]
    assert summary.num_clips == 6
    videos = sorted((tmp_path / "videos").iterdir())
    assert summary.num_video_bytes == sum(path.stat().st_size for path in videos)
    with av.open(str(videos[0])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = list(container.decode(stream))
    assert (len(frames), frames[0].width, frames[0].height) == (32, 96, 64)  # 4 s x 8 fps
    assert [float(frame.time or 0.0) for frame in frames[:3]] == [0.0, 0.125, 0.25]


def test_decoded_pixels_are_the_rendered_ones_up_to_compression(tmp_path: Path) -> None:
    config = _small(tmp_path)
    write_dataset(config, show_progress=False)
    scene, _ = make_clip(config, "eval", "tracking", 0)
    with av.open(str(tmp_path / "videos" / "eval-tracking-00000.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    rendered = Renderer(scene, config.noise).frame(11 / config.fps).astype(int)
    errors = [np.abs(pixels - rendered).mean() for pixels in decoded]
    assert np.argmin(errors) == 11
    assert errors[11] < 2 * config.noise  # the encoder may drop the noise (mean 0.8 sigma) and halves the chroma


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        write_dataset(_small(folder, seed=seed), show_progress=False)
    names = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.*"))
    assert len(names) == 10  # 6 clips, 4 annotation files
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    video = Path("videos") / "train-grounding-00000.mp4"
    assert (folders[0] / video).read_bytes() != (folders[2] / video).read_bytes()


@pytest.mark.parametrize(("make_task", "kind"), [(TemporalGrounding, "grounding"), (ObjectTracking, "tracking")])
@pytest.mark.parametrize("recipe", ["fixed", "paper"])
def test_the_tasks_accept_every_row(make_task: Callable[[TaskConfig], Any], kind: str, recipe: Any) -> None:
    config = SynthConfig(label_lag_s=2.0, label_slack_frac=0.1, num_distractors=3)
    task = make_task(TaskConfig(recipe=recipe))
    for index in range(50):
        _, row = make_clip(config, "train", kind, index)
        assert row["task"] == task.name
        task.parse_truth(row)


def test_reading_agrees_with_the_interval_second_by_second() -> None:
    for index in range(20):
        scene, row = make_clip(SynthConfig(), "eval", "grounding", index)
        words = str(row["reasoning"]).split()
        assert words[0::2] == [str(k) for k in range(8)]
        start_s, end_s = scene.target.visible_s
        assert row["intervals"] == [[start_s, end_s]]
        assert words[1::2] == [scene.target.colour if start_s <= k < end_s else "no" for k in range(8)]
        assert scene.target.name in str(row["query"])
        assert 1 <= end_s - start_s <= 4


def test_tracked_object_is_always_there_and_travels() -> None:
    for index in range(20):
        scene, row = make_clip(SynthConfig(num_distractors=2), "eval", "tracking", index)
        assert scene.target.visible_s == (0.0, 8.0)
        assert len(scene.others) == 2
        assert scene.target.colour not in {other.colour for other in scene.others}
        boxes = np.array(row["boxes"])
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert np.hypot(*(centres[-1] - centres[0])) > 0.3  # 7/8 of a path of at least 0.4, less the edges' clamping


def test_poor_labels_are_late_and_large_in_training_only() -> None:
    poor, exact = SynthConfig(label_lag_s=0.9, label_slack_frac=0.05), SynthConfig()
    lags: list[float] = []
    for index in range(40):
        for kind in ("grounding", "tracking"):
            assert make_clip(poor, "eval", kind, index) == make_clip(exact, "eval", kind, index)
        scene, grounding = make_clip(poor, "train", "grounding", index)
        _, exact_grounding = make_clip(exact, "train", "grounding", index)
        assert grounding["reasoning"] == exact_grounding["reasoning"]
        (interval,), (true_interval,) = np.array(grounding["intervals"]), np.array(exact_grounding["intervals"])
        assert tuple(true_interval) == scene.target.visible_s
        lags += (interval - true_interval).tolist()
        assert 0 <= interval[0] < interval[1] <= 8
        boxes, true_boxes = (
            np.array(make_clip(config, "train", "tracking", index)[1]["boxes"]) for config in (poor, exact)
        )
        assert (boxes[0] == true_boxes[0]).all()
        outwards = (boxes - true_boxes) * [-1, -1, 1, 1]
        assert outwards.min() >= -0.011 and outwards.max() <= 0.061  # both are rounded to two decimals
    assert min(lags) >= 0 and max(lags) <= 0.9 + 1e-9  # rounded to 0.1 s
    assert 0.3 < np.mean(lags) < 0.55  # uniform on [0, 0.9]: 0.45, less what is cut at the end of the clip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width_px": 113}, "width_px is 113, wanted an even number >= 32"),
        ({"fps": 0.0}, "fps is 0.0, wanted a positive number"),
        ({"num_train": -1}, "num_train is -1, wanted a number >= 0"),
        ({"label_lag_s": -0.5}, "label_lag_s is -0.5, wanted a number >= 0"),
        ({"duration_s": 1.0}, "duration_s is 1.0, wanted at least 2 seconds"),
        ({"num_distractors": 6}, "num_distractors is 6, wanted at most 5"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SynthConfig(**changes)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir is .*file/inside, which cannot be written"):
        write_dataset(_small(tmp_path / "file" / "inside"), show_progress=False)


def test_a_frame_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(32, 32, 3\), wanted \(32, 64, 3\)"):
        write_mp4(tmp_path / "a.mp4", [np.zeros((32, 32, 3), np.uint8)], 64, 32, 8.0)
