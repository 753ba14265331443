"""Rounds of looking closer: which part is shown next, in whose seconds answers are, and what is read from the file."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.scripted_engine import ScriptedEngine
from vcr1_fast.evaluate import answer_in_rounds, evaluate_command
from vcr1_fast.evaluation.answer_store import answer_settings, question_key
from vcr1_fast.evaluation.perception import Focus
from vcr1_fast.evaluation.samples import Answer
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.settings.config import Config, ConfigError, EvalConfig, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import ChoiceTruth, Example, GroundedChoiceTruth, IntervalTruth, Patches

CHOICE = Example("c", "multiple_choice", "v.mp4", "what is it?", math.inf, ChoiceTruth("A", ("a cat", "a dog")))
GROUNDED = Example("g", "grounded_qa", "v.mp4", "why?", 60.0, GroundedChoiceTruth("A", ("x", "y"), ((12.0, 14.0),)))


def said(glue: str) -> Answer:
    return Answer(f"<think>t</think><answer>B</answer><glue>{glue}</glue>", "", "stop", 9)


def test_what_is_cut_out_is_the_evidence_with_a_margin_and_seconds_are_those_of_the_whole_video():
    """(10, 20): a tenth of 10 s on either side. Then (3, 5) of the clip from 9 s: 12 to 14 s, widened to 4 s."""
    first = Focus(GROUNDED, is_cut=True).narrowed(said("[(10.0, 20.0)]"))
    assert (first.start_s, first.end_s, first.intervals_s) == (9.0, 21.0, ((10.0, 20.0),))
    asked = first.asked("grounded_qa", 4.0)
    assert (asked.video, asked.duration_s, asked.task) == ("v.mp4#t=9.000,21.000&fps=4", 12.0, "grounded_qa")
    second = first.narrowed(said("[(3.0, 5.0)]"))
    assert (second.start_s, second.end_s, second.intervals_s) == (11.0, 15.0, ((12.0, 14.0),))
    at_the_end = Focus(GROUNDED, is_cut=True).narrowed(said("[(58.0, 70.0)]"))  # the video has 60 s
    assert (at_the_end.start_s, at_the_end.end_s) == (57.0, 60.0)
    several = Focus(CHOICE, is_cut=True).narrowed(said("[(30, 32), (10, 20)]"))
    assert (several.start_s, several.end_s) == pytest.approx((7.8, 34.2))

    part = replace(GROUNDED, video="v.mp4#t=100.000,160.000&fps=2")  # 60 s of a longer file
    asked = Focus(part, is_cut=True).narrowed(said("[(10.0, 20.0)]")).asked("grounded_qa", 4.0)
    assert asked.video == "v.mp4#t=109.000,121.000&fps=4"


def test_focus_shows_the_whole_video_and_keeps_its_seconds():
    first = Focus(GROUNDED).narrowed(said("[(40, 50), (10.0, 20.0)]"))
    asked = first.asked("grounded_qa", 4.0)
    assert (asked.video, asked.duration_s) == ("v.mp4#focus=40.000,50.000;10.000,20.000", 60.0)
    second = first.narrowed(said("[(12, 14), (58, 70), (80, 90)]"))  # seconds of the whole; the video has 60 s
    assert second.intervals_s == ((12.0, 14.0), (58.0, 60.0))
    unknown = Focus(CHOICE).narrowed(said("[(58, 70)]"))  # how long it is stands in no annotation
    assert unknown.asked("multiple_choice", 4.0).video == "v.mp4#focus=58.000,70.000"


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("text", ["", "<glue>[]</glue>", "<glue>nothing</glue>", "<glue>[(90, 95)]</glue>", "no tags"])
def test_an_answer_that_names_no_part_changes_nothing(text: str, is_cut: bool):
    focus = Focus(GROUNDED, is_cut).narrowed(Answer(text))
    assert focus == Focus(GROUNDED, is_cut)
    assert focus.asked("multiple_choice", 2.0) == replace(GROUNDED, task="multiple_choice")


@pytest.mark.parametrize(
    ("perception", "video_first", "is_first"),
    [("focus", None, True), ("focus", False, False), ("crop", None, False), ("crop", True, True)],
)
def test_rounds_ask_where_and_then_what(tiny_tokenizer, perception: Any, video_first: bool | None, is_first: bool):
    tasks = make_tasks(TaskConfig())
    paths: list[str] = []
    are_first: dict[str, bool] = {}

    def read(path: str) -> Patches:
        paths.append(path)
        return Patches(torch.zeros(16, 1176), (1, 4, 4), 1.0, 2, 1.0)

    class RoundEngine(ScriptedEngine):
        def generate(self, prompts, sampling):
            is_last = all(prompt.example.task == "multiple_choice" for prompt in prompts)
            text = "<think>t</think><answer>A</answer>" if is_last else said("[(10.0, 20.0)]").text
            for prompt in prompts:
                text_before = tiny_tokenizer.decode(prompt.token_ids_L.tolist()).partition("<|vision_start|>")[0]
                are_first[prompt.example.task] = text_before.endswith("user\n")
            self._scripts = {prompt.example.id: [text] for prompt in prompts}
            return super().generate(prompts, sampling)

    other = Example("t", "temporal_grounding", "w.mp4", "a dog barks", 8.0, IntervalTruth(((2.0, 4.0),)))
    about_image = replace(CHOICE, id="i", video="", media=("i.png#image",))
    config = Config(eval=EvalConfig(perceptions=2, perception=perception), task=TaskConfig(video_first=video_first))
    engine = RoundEngine(tiny_tokenizer, {})
    answers = answer_in_rounds(
        lambda: engine,
        [CHOICE, other, GROUNDED, about_image],
        PromptBuilder(tiny_tokenizer, tasks, read, video_first=bool(video_first)),
        config,
        SINGLE_PROCESS,
    )
    clip = "v.mp4#t=9.000,21.000&fps=4" if perception == "crop" else "v.mp4#focus=10.000,20.000"
    assert are_first == {
        "temporal_grounding": bool(video_first), "grounded_qa": is_first, "multiple_choice": is_first
    }  # fmt: skip
    assert paths == ["w.mp4", "i.png#image", "v.mp4", "v.mp4", clip, clip]  # another task and an image: asked once
    assert answers[0].text == "<think>t</think><answer>A</answer>"
    assert answers[2].text == "<think>t</think><answer>A</answer><glue>[(10.00, 20.00)]</glue>"
    scored = tasks["grounded_qa"].score([GROUNDED], [answers[2].text])
    assert scored["accuracy"] == [1.0] and scored["iou"] == [pytest.approx(0.2)]  # 2 s of 10
    assert tasks["multiple_choice"].score([CHOICE], [answers[0].text]) == {"format": [1.0], "accuracy": [1.0]}


def test_answers_about_a_clip_are_stored_by_clip_and_file(tmp_path: Path):
    file = tmp_path / "v.mp4"
    file.write_bytes(b"1")
    names = ("", "#t=1.000,5.000&fps=4", "#focus=1.000,5.000", "#focus=1.000,6.000")
    examples = [replace(CHOICE, video=f"{file}{part}") for part in names]
    assert len({question_key("q", example) for example in examples}) == 4
    clip = examples[2]
    before = question_key("q", clip)
    file.write_bytes(b"22")
    assert before != question_key("q", clip)


def test_scores_of_other_rounds_have_a_folder_of_their_own():
    """What the answers depend on names the folder; asked once, there is nothing about rounds in it."""
    rounds = [EvalConfig(), EvalConfig(perception="crop")]
    rounds += [EvalConfig(perceptions=n, perception=how) for n in (2, 3) for how in ("focus", "crop")]
    configs = [Config(eval=one) for one in rounds]
    configs += [Config(eval=EvalConfig(perceptions=2), task=TaskConfig(video_first=first)) for first in (False, True)]
    kept = [answer_settings(config, "w", "pyav", torch.device("cpu")) for config in configs]
    assert kept[0] == kept[1] and not any("perception" in name for name in kept[0])
    assert len({str(settings) for settings in kept}) == 7


def test_the_papers_recipe_has_no_rounds():
    with pytest.raises(ConfigError, match=r"eval\.perceptions is 2, but task.recipe is paper"):
        evaluate_command(Config(eval=EvalConfig(perceptions=2), task=TaskConfig(recipe="paper")))
    with pytest.raises(ConfigError, match=r"eval\.perceptions is 0, wanted >= 1"):
        EvalConfig(perceptions=0)
