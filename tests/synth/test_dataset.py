"""The files: real H.264, the same from the same seed, rows the tasks accept, and clear refusals."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.synth.config import COLOURS, Kind, SynthConfig
from vcr1_fast.synth.dataset import make_clip, write_dataset
from vcr1_fast.synth.render import Renderer
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Example

TASK_OF: dict[Kind, str] = {
    "grounding": "temporal_grounding",
    "tracking": "object_tracking",
    "grounded_qa": "grounded_qa",
    "choice": "multiple_choice",
    "quality": "video_quality",
    "image": "multiple_choice",
    "text": "multiple_choice",
}


def _small(folder: Path, **changes: Any) -> SynthConfig:
    return SynthConfig(**{"output_dir": str(folder), "num_train": 2, "num_eval": 1, "duration_s": 4.0, **changes})


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _options(row: dict[str, Any]) -> tuple[list[str], str]:
    return row["options"], row["answer"]


def test_files_and_their_contents(tmp_path: Path) -> None:
    config = _small(tmp_path, width_px=96, height_px=64, kinds=("grounding", "tracking"))
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
    config = _small(tmp_path, kinds=("tracking",))
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
    assert len(names) == 25  # 15 clips, 10 annotation files
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    video = Path("videos") / "train-grounding-00000.mp4"
    assert (folders[0] / video).read_bytes() != (folders[2] / video).read_bytes()


@pytest.mark.parametrize(("kind", "task_name"), TASK_OF.items())
@pytest.mark.parametrize("recipe", ["fixed", "paper"])
def test_the_tasks_accept_every_row(kind: Kind, task_name: str, recipe: Any) -> None:
    config = SynthConfig(label_lag_s=2.0, label_slack_frac=0.1, label_careless_frac=0.5, num_distractors=3)
    task = make_tasks(TaskConfig(recipe=recipe))[task_name]
    for index in range(50):
        _, row = make_clip(config, "train", kind, index)
        assert row["task"] == task_name
        task.parse_truth(row)


@pytest.mark.parametrize("kind", TASK_OF)
def test_the_annotation_scores_full_marks(kind: Kind) -> None:
    """The answer in an exact row is right by the task's own reward; boxes lose what two decimals cost."""
    task = make_tasks(TaskConfig())[TASK_OF[kind]]
    for index in range(20):
        _, row = make_clip(SynthConfig(), "eval", kind, index)
        example = Example("", task.name, "", str(row["query"]), 8.0, task.parse_truth(row), str(row["reasoning"]))
        parts = task.score([example], [task.target(example)])
        assert set(parts) == set(task.part_names)
        assert all(value == [pytest.approx(1.0)] for value in parts.values())


def test_grounded_question_is_about_the_colour_of_the_object() -> None:
    letters: set[str] = set()
    for index in range(40):
        scene, row = make_clip(SynthConfig(), "eval", "grounded_qa", index)
        options, letter = _options(row)
        assert options == list(COLOURS) and options["ABCDEF".index(letter)] == scene.target.colour
        assert row["intervals"] == [list(scene.target.visible_s)]
        assert scene.target.colour not in str(row["query"])
        letters.add(letter)
    assert letters == set("ABCDEF")


def test_choice_question_is_about_the_third_with_the_middle_of_the_interval() -> None:
    seen: list[str] = []
    for index in range(60):
        scene, row = make_clip(SynthConfig(), "eval", "choice", index)
        options, letter = _options(row)
        start_s, end_s = scene.target.visible_s
        middle_s = (start_s + end_s) / 2  # of 8 s: a multiple of 0.5, so never at a border of 2.67 or 5.33
        want = "at the beginning" if middle_s < 2.6 else "in the middle" if middle_s < 5.3 else "at the end"
        assert options["ABC".index(letter)] == want
        assert scene.target.name in str(row["query"])
        seen.append(letter)
    assert all(seen.count(letter) >= 6 for letter in "ABC")


def test_half_of_the_quality_clips_are_damaged_and_look_it() -> None:
    rows = [make_clip(SynthConfig(), "eval", "quality", index) for index in range(60)]
    assert 20 < sum(scene.damage > 0 for scene, _ in rows) < 40
    for scene, row in rows[:12]:
        assert row["answer"] == ("low quality" if scene.damage else "high quality")
        first, second = (Renderer(scene, 4.0).frame(t_s).astype(float) for t_s in (1.0, 1.125))
        flicker = np.median(np.abs(second - first))  # mostly noise: 0.95 sigma for the difference of two Gaussians
        assert flicker > 10 if scene.damage else flicker < 6


def test_careless_labels_are_wrong_where_care_is_needed_and_in_training_only() -> None:
    careless, exact = SynthConfig(label_careless_frac=1.0), SynthConfig()
    wrong: dict[str, int] = {}
    for kind in ("grounded_qa", "choice", "quality"):
        for index in range(60):
            assert make_clip(careless, "eval", kind, index) == make_clip(exact, "eval", kind, index)
            (scene, row), (_, true_row) = (make_clip(config, "train", kind, index) for config in (careless, exact))
            assert {**row, "answer": None} == {**true_row, "answer": None}
            if row["answer"] != true_row["answer"]:
                wrong[kind] = wrong.get(kind, 0) + 1
                assert row["answer"] == ("high quality" if kind == "quality" else "A")
                assert kind != "grounded_qa" or scene.target.colour in ("green", "purple", "white")
                assert kind != "choice" or sum(scene.target.visible_s) / 2 > 2.6
                assert kind != "quality" or scene.damage > 0
    assert all(15 <= wrong[kind] <= 55 for kind in ("grounded_qa", "choice", "quality")), wrong


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
        outwards = (boxes - true_boxes)[1:] * [-1, -1, 1, 1]
        inside = ((boxes > 0.0) & (boxes < 0.99))[1:]  # not cut at the frame
        assert outwards.min() >= -0.011 and outwards.max() <= 0.061  # both are rounded to two decimals
        assert np.ptp(outwards[inside]) <= 0.021  # one looseness for the whole track
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
        ({"label_careless_frac": 1.5}, "label_careless_frac is 1.5, wanted 0 to 1"),
        ({"kinds": ()}, r"kinds is \(\), wanted at least one, each once"),
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
