"""What a run shows of its answers: rows of samples/, the printed lines, and what a resume drops."""

import json
from dataclasses import replace

import pytest
import torch
from rich.cells import cell_len

from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run.answers import MAX_GROUPS, answer_lines, clip_pictures, gather_rows, group_row, write_samples
from vcr1_fast.run.telemetry import drop_later_files
from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.shown import shown_answer, shown_truth
from vcr1_fast.types import (
    ChoiceTruth,
    Completion,
    Example,
    Frames,
    GroundedChoiceTruth,
    IntervalTruth,
    RefusedTruth,
    RolloutGroup,
    TrackTruth,
)
from vcr1_fast.video.draw import GIVEN, SPAN
from vcr1_fast.video.formats import QWEN2_5_VL, QWEN3_VL, VideoFormat
from vcr1_fast.video.patches import to_patches

TASKS = make_tasks(TaskConfig())


def said(text: str, is_drawn: bool = True) -> Completion:
    logprobs = torch.zeros(3) if is_drawn else torch.full((3,), torch.nan)
    return Completion(torch.zeros(3, dtype=torch.long), logprobs, "stop", text)


@pytest.fixture
def group(make_prompt) -> RolloutGroup:
    example = Example("a", "temporal_grounding", "a.mp4", "a dog barks", 8.0, IntervalTruth(((1.0, 2.5),)))
    return RolloutGroup(
        replace(make_prompt((1, 4, 4), "text"), example=example),
        (said("<answer>1.00 to 2.50</answer>", is_drawn=False), said("<think>so</think>\n<answer> 2 to 3 </answer>")),
        1,
        {"format": (1.0, 1.0), "iou": (1.0, 0.25)},
        (2.0, 1.25),
        (0.5, -0.5),
    )


def test_a_row_says_what_was_read_and_what_it_earned(group: RolloutGroup):
    row = group_row(7, group, TASKS["temporal_grounding"])
    assert (row["step"], row["id"], row["truth"], row["times_s"]) == (7, "a", "1.00 to 2.50", [])
    assert "a dog barks" in row["question"]
    assert row["answers"][1] == {
        "text": "<think>so</think>\n<answer> 2 to 3 </answer>",
        "parsed": "2 to 3",
        "parts": {"format": 1.0, "iou": 0.25},
        "reward": 1.25,
        "advantage": -0.5,
        "finish_reason": "stop",
        "num_tokens": 3,
        "is_sampled": True,
    }
    assert not row["answers"][0]["is_sampled"]


def test_a_file_is_bounded_and_a_resume_drops_later_ones(group: RolloutGroup, tmp_path):
    rows = gather_rows(7, [group] * (MAX_GROUPS + 3), TASKS, SINGLE_PROCESS)
    for step in (5, 10, 20):
        write_samples(tmp_path / "samples" / f"step_{step}.jsonl", rows)
    assert len((tmp_path / "samples" / "step_5.jsonl").read_text().splitlines()) == MAX_GROUPS == 32
    drop_later_files(tmp_path / "samples", 10)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step_5.jsonl", "step_10.jsonl"}
    assert json.loads((tmp_path / "samples" / "step_5.jsonl").read_text().splitlines()[0]) == rows[0]
    drop_later_files(tmp_path / "samples", 0)
    assert list((tmp_path / "samples").iterdir()) == []


def test_two_short_lines_that_steer_no_terminal(group: RolloutGroup):
    row = group_row(7, group, TASKS["temporal_grounding"])
    row["answers"][1]["text"] = "\x1b]0;title\x07 犬\n" * 20
    lines = answer_lines(row, 80)
    assert len(lines) == 2 and all(cell_len(line) <= 80 and line.isprintable() for line in lines)
    assert lines[0].startswith("  asked (temporal_grounding): When")
    assert r"\x1b]0;title" in lines[1]
    assert lines[1].endswith(" | read 2 to 3 | truth 1.00 to 2.50 | reward 1.250")
    row["answers"][1]["parsed"] = ""
    assert "read nothing |" in answer_lines(row, 80)[1]


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("<think><answer>A</answer></think><answer>B</answer>", "B"),
        ("<answer>B</answer> <glue>[(1, 2)]</glue>", "B\n[(1, 2)]"),
        ("<answer>B", ""),
        ("1 to 2", ""),
    ],
)
def test_what_counts_of_an_answer(answer: str, parsed: str):
    assert shown_answer(answer) == parsed


def test_truths_as_text():
    def text(task: str, truth) -> str:
        return shown_truth(TASKS[task], Example("a", task, "a.mp4", "q", 8.0, truth, "because"))

    assert text("temporal_grounding", IntervalTruth(((1.0, 2.0), (4.0, 7.0)))) == "1.00 to 2.00, 4.00 to 7.00"
    assert text("multiple_choice", ChoiceTruth("B", ("a cat", "a dog"))) == "B"
    grounded = text("grounded_qa", GroundedChoiceTruth("A", ("a cat", "a dog"), ((2.0, 4.5),)))
    assert grounded.splitlines()[0] == "A" and "4.5" in grounded.splitlines()[1]
    boxes = TrackTruth(((0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.75, 0.5)), (0.0, 1.0))
    assert text("object_tracking", boxes) == "[[0.00,0.00,0.50,0.50],[0.25,0.00,0.75,0.50]]"
    assert text("object_tracking", RefusedTruth("no box")) == "refused: no box"
    assert text("multiple_choice", IntervalTruth(((1.0, 2.0),)))  # named without the task
    assert text("numeric_answer", ChoiceTruth("B", ("a", "b"))) == ""  # the task raises


@pytest.mark.parametrize("video", [QWEN2_5_VL, QWEN3_VL], ids=["qwen2_5_vl", "qwen3_vl"])
def test_a_picture_has_frames_and_both_periods_below_them(group: RolloutGroup, video: VideoFormat) -> None:
    side = video.factor_px
    bytes_FHW3 = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, side, 2 * side, 3) * 30
    frames = Frames(bytes_FHW3.contiguous(), torch.arange(8.0, dtype=torch.float64), 1.0, 8.0, "made")
    clip = replace(group, prompt=replace(group.prompt, media=(to_patches(frames, video_format=video),)))
    [(name, picture)] = clip_pictures([clip], TaskConfig(), video).items()
    assert name == "samples/0" and picture.shape == (side + 2 * 24, 8 * side, 3)
    assert [picture[0, 2 * side * i + 5].tolist() for i in range(4)] == [[60 * i] * 3 for i in range(4)]  # of each pair
    blue = (picture[side + 5] == GIVEN).all(axis=1).nonzero()[0]
    orange = (picture[-5] == SPAN).all(axis=1).nonzero()[0]
    assert (blue.min(), blue.max() + 1) == (side, 2.5 * side)  # 1 to 2.5 of 8 s on 8 sides
    # 2 to 3: what the policy drew, not the true answer before it
    assert (orange.min(), orange.max() + 1) == (2 * side, 3 * side)
    frozen = replace(clip.prompt.media[0], embeddings_MD=torch.zeros(1, 1))
    assert clip_pictures([replace(clip, prompt=replace(clip.prompt, media=(frozen,)))], TaskConfig(), video) == {}
