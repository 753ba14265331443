"""Rounds of looking closer: which part is shown next, in whose seconds answers are, and what is read from the file."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vcr1_fast.evaluate import answer_in_rounds, evaluate_command
from vcr1_fast.evaluation.answer_store import question_key
from vcr1_fast.evaluation.perception import Focus
from vcr1_fast.evaluation.samples import Answer
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.scripted_engine import ScriptedEngine
from vcr1_fast.settings.config import Config, ConfigError, EvalConfig, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import ChoiceTruth, Example, GroundedChoiceTruth, IntervalTruth, Patches

CHOICE = Example("c", "multiple_choice", "v.mp4", "what is it?", math.inf, ChoiceTruth("A", ("a cat", "a dog")))
GROUNDED = Example("g", "grounded_qa", "v.mp4", "why?", 60.0, GroundedChoiceTruth("A", ("x", "y"), ((12.0, 14.0),)))


def said(glue: str) -> Answer:
    return Answer(f"<think>t</think><answer>B</answer><glue>{glue}</glue>", "", "stop", 9)


def test_the_clip_is_the_evidence_with_a_margin_and_seconds_are_those_of_the_whole_video():
    """(10, 20): a tenth of 10 s on either side. Then (3, 5) of the clip from 9 s: 12 to 14 s, widened to 4 s."""
    first = Focus(GROUNDED).narrowed(said("[(10.0, 20.0)]"))
    assert (first.start_s, first.end_s, first.intervals_s) == (9.0, 21.0, ((10.0, 20.0),))
    asked = first.asked("grounded_qa", 4.0)
    assert (asked.video, asked.duration_s, asked.task) == ("v.mp4#t=9.000,21.000&fps=4", 12.0, "grounded_qa")
    second = first.narrowed(said("[(3.0, 5.0)]"))
    assert (second.start_s, second.end_s, second.intervals_s) == (11.0, 15.0, ((12.0, 14.0),))
    at_the_end = Focus(GROUNDED).narrowed(said("[(58.0, 70.0)]"))  # the video has 60 s
    assert (at_the_end.start_s, at_the_end.end_s) == (57.0, 60.0)
    several = Focus(CHOICE).narrowed(said("[(30, 32), (10, 20)]"))
    assert (several.start_s, several.end_s) == pytest.approx((7.8, 34.2))


@pytest.mark.parametrize("text", ["", "<glue>[]</glue>", "<glue>nothing</glue>", "<glue>[(90, 95)]</glue>", "no tags"])
def test_an_answer_that_names_no_part_changes_nothing(text: str):
    focus = Focus(GROUNDED).narrowed(Answer(text))
    assert focus == Focus(GROUNDED)
    assert focus.asked("multiple_choice", 2.0) == replace(GROUNDED, task="multiple_choice")


def test_rounds_ask_where_and_then_what(tiny_tokenizer):
    tasks = make_tasks(TaskConfig())
    paths: list[str] = []

    def read(path: str) -> Patches:
        paths.append(path)
        return Patches(torch.zeros(16, 1176), (1, 4, 4), 1.0, 2, 1.0)

    class RoundEngine(ScriptedEngine):
        def generate(self, prompts, sampling):
            is_last = all(prompt.example.task == "multiple_choice" for prompt in prompts)
            text = "<think>t</think><answer>A</answer>" if is_last else said("[(10.0, 20.0)]").text
            self._scripts = {prompt.example.id: [text] for prompt in prompts}
            return super().generate(prompts, sampling)

    other = Example("t", "temporal_grounding", "w.mp4", "a dog barks", 8.0, IntervalTruth(((2.0, 4.0),)))
    config = Config(eval=EvalConfig(perceptions=2))
    engine = RoundEngine(tiny_tokenizer, {})
    answers = answer_in_rounds(
        lambda: engine,
        [CHOICE, other, GROUNDED],
        PromptBuilder(tiny_tokenizer, tasks, read),
        config,
        SINGLE_PROCESS,
    )
    clip = "v.mp4#t=9.000,21.000&fps=4"
    assert paths == ["w.mp4", "v.mp4", "v.mp4", clip, clip]  # the other task is asked once
    assert answers[0].text == "<think>t</think><answer>A</answer>"
    assert answers[2].text == "<think>t</think><answer>A</answer><glue>[(10.00, 20.00)]</glue>"
    scored = tasks["grounded_qa"].score([GROUNDED], [answers[2].text])
    assert scored["accuracy"] == [1.0] and scored["iou"] == [pytest.approx(0.2)]  # 2 s of 10
    assert tasks["multiple_choice"].score([CHOICE], [answers[0].text]) == {"format": [1.0], "accuracy": [1.0]}


def test_answers_about_a_clip_are_stored_by_clip_and_file(tmp_path: Path):
    file = tmp_path / "v.mp4"
    file.write_bytes(b"1")
    whole, clip = (replace(CHOICE, video=f"{file}{part}") for part in ("", "#t=1.000,5.000&fps=4"))
    before = question_key("q", clip)
    assert before != question_key("q", whole)
    file.write_bytes(b"22")
    assert before != question_key("q", clip)


def test_the_papers_recipe_has_no_rounds():
    with pytest.raises(ConfigError, match=r"eval\.perceptions is 2, but task.recipe is paper"):
        evaluate_command(Config(eval=EvalConfig(perceptions=2), task=TaskConfig(recipe="paper")))
    with pytest.raises(ConfigError, match=r"eval\.perceptions is 0, wanted >= 1"):
        EvalConfig(perceptions=0)
