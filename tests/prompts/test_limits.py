"""Prompts that a model cannot take, periods that no frame shows, and lengths that are not the file's."""

from dataclasses import replace

import pytest
import torch

from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.prompts.limits import Off, PromptLimits
from vcr1_fast.prompts.stream import PromptStream
from vcr1_fast.settings.config import Config, TaskConfig, TrainConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Box, Example, IntervalTruth, Patches, Prompt, SampleError, TrackTruth
from vcr1_fast.video.quarantine import PASSING, Quarantine, reason_class

BOX: Box = (0.1, 0.1, 0.2, 0.2)
PATCHES = Patches(torch.zeros(16, 1176), (1, 4, 4), 1.0, 2, 4.0)


def limits(max_positions: int = 1000, answer: int = 100, prompt: int | None = None, fixed: bool = True) -> PromptLimits:
    return PromptLimits(max_positions, answer, prompt, refuses_periods=fixed)


def example(*starts_s: float, duration_s: float = 4.0, name: str = "e", video: str = "/v.mp4") -> Example:
    truth = IntervalTruth(tuple((start_s, start_s + 1) for start_s in starts_s))
    return Example(name, "temporal_grounding", video, "a dog barks", duration_s, truth)


def prompt(num_tokens: int, last_position: int = 0) -> Prompt:
    positions_3L = torch.full((3, num_tokens), last_position)
    return Prompt(example(), torch.zeros(num_tokens, dtype=torch.int64), positions_3L, (PATCHES,))


@pytest.mark.parametrize(
    ("is_refused", "num_tokens", "last_position", "num_answer_tokens", "max_prompt_tokens"),
    [
        ("", 900, 899, None, None),
        ("901 tokens and up to 100 of an answer, more than the 1,000 positions of the model", 901, 0, None, None),
        ("901 positions and up to 100 of", 50, 900, None, None),  # two images an hour
        ("", 901, 0, 99, None),
        ("900 tokens and up to 101 of an answer", 900, 0, 101, None),
        ("", 500, 0, None, 500),
        ("501 tokens, more than data.max_prompt_tokens = 500; shorten its text, or lower video", 501, 0, None, 500),
    ],
)
def test_length(is_refused, num_tokens, last_position, num_answer_tokens, max_prompt_tokens):
    check = limits(prompt=max_prompt_tokens)
    if not is_refused:
        check.check_length(prompt(num_tokens, last_position), num_answer_tokens)
        return
    with pytest.raises(SampleError, match=f"e: its prompt is too long: {is_refused}") as caught:
        check.check_length(prompt(num_tokens, last_position), num_answer_tokens)
    assert reason_class(caught.value.reason) == "annotation" and "annotation" in PASSING


@pytest.mark.parametrize(
    ("row", "file_s", "reason"),
    [
        (example(3.9), 4.0, ""),
        (example(0.0, 4.0), 4.0, r"e: its period begins at 4 s, but /v.mp4 has only 4.00 s"),
        (example(30.0, duration_s=100.0), 4.0, "begins at 30 s"),
        (example(30.0), 0.0, ""),  # of one frame, without a length
        (example(30.0, video="/v.mp4#t=9.000,19.000&fps=2"), 4.0, ""),  # seconds of which of the two is not said
        (example(30.0, video="/v.mp4#t=9.000,19.000"), 4.0, ""),
        (example(30.0, video="/v#images=7&fps=2"), 4.0, ""),
        (example(30.0, video="/v#images=all&fps=3"), 4.0, "begins at 30 s"),
        (replace(example(), truth=TrackTruth((BOX,) * 2, (0.0, 5.0))), 4.0, ""),
        (replace(example(), truth=TrackTruth((BOX,) * 2, (0.0, 5.1))), 4.0, "its period ends at 5.1 s, but /v.mp4"),
    ],
)
def test_a_period_past_the_end_of_the_file(row: Example, file_s: float, reason: str):
    limits(fixed=False).check_duration(row, file_s)  # recipe paper takes it
    if not reason:
        limits().check_duration(row, file_s)
        return
    with pytest.raises(SampleError, match=reason) as caught:
        limits().check_duration(row, file_s)
    assert reason_class(caught.value.reason) == "annotation"


def test_lengths_that_differ_are_counted_and_reported_when_they_have_doubled():
    """The tolerance is the larger of 1 s and a 20th of the file."""
    check = limits()
    for index, (annotated_s, file_s) in enumerate([(5.0, 4.0), (104.9, 100.0), (float("inf"), 4.0), (5.01, 4.0)] * 2):
        check.check_duration(example(duration_s=annotated_s, name=f"e{index % 4}"), file_s)
    assert check.num_off == 1
    check.check_duration(example(duration_s=100.0, name="cut", video="/cut.mkv"), 2.125)
    other: dict[str, Off] = {"other": (98.0, "/o.mp4", 108.0, 10.0), "e3": (1.01, "/v.mp4", 5.01, 4.0)}
    assert check.report(4, lambda off: [other, off]).startswith("3 examples so far")  # one of them on both ranks
    line = check.report(8, lambda off: [off])
    assert line.startswith(
        "2 examples so far have another length than their video by more than 1 s and 5%; most of all cut: 100 s "
        "annotated, 2.12 s in /cut.mkv. "
    )
    assert check.report(15, lambda off: []) == ""
    assert "other: 108 s annotated, 10.00 s in /o.mp4" in check.report(16, lambda off: [off, other])
    assert limits().report(0, lambda off: []) == ""


def test_a_stream_counts_both(tiny_tokenizer, capsys):
    rows = [example(1.0, name="a"), example(9.0, name="b"), example(1.0, duration_s=9.0, name="c"), example(name="d")]
    rows[3] = replace(rows[3], query="a dog " * 200)
    builder = PromptBuilder(tiny_tokenizer, make_tasks(TaskConfig()), lambda path: PATCHES, limits=limits())
    config = Config(train=TrainConfig(prompts_per_step=4))
    stream = PromptStream(rows, builder, Quarantine(None), config, SINGLE_PROCESS)
    for _ in range(2):
        assert sorted(prompt.example.id for prompt in stream.next(4)) == ["a", "c"]
    found = stream.metrics()
    assert (found["bad_samples/annotation"], found["durations_off"]) == (4.0, 1.0)
    err = capsys.readouterr().err
    assert err.count("warning: 1 examples so far have another length") == err.count("bad sample: d: its prompt is") == 1
    stream = PromptStream(rows[:1], builder, Quarantine(None), config, SINGLE_PROCESS, needs_target=True)
    builder.limits = limits(max_positions=len(stream.next(1)[0].token_ids_L), answer=0)
    assert stream.next(1) == []  # no room for what it shall learn
