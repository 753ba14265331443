"""Lists of periods as answers, as VideoChat-R1.5 is trained: by hand."""

from dataclasses import replace

import pytest

from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.grounding_list import GroundingByList
from vcr1_fast.types import Example, GroundedChoiceTruth, IntervalTruth

EXAMPLE = Example("a", "temporal_grounding", "a.mp4", "A dog barks.", 30.0, IntervalTruth(((2.0, 4.0), (10.0, 14.0))))
R15 = TaskConfig(recipe="paper", think=False, grounding_answer="list", max_intervals=3)
FOUR = "[(2, 3), (3, 4), (10, 12), (12, 14)]"


def task_of(config: TaskConfig) -> GroundingByList:
    task = make_tasks(config)["temporal_grounding"]
    assert isinstance(task, GroundingByList)
    return task


@pytest.mark.parametrize("recipe", ["fixed", "paper"])
@pytest.mark.parametrize(
    ("listed", "iou"),
    [
        ("[(2, 4), (10, 14)]", 1.0),
        ("[(10, 14)]", 4 / 6),
        ("[(3, 5), (10.0, 12.5)]", 3.5 / 7),  # 1 + 2.5 s of 6 + 1 are shared
        ("[(2, 14)]", 6 / 12),
        ("[(2, 4), (3, 4), (10, 14)]", 1.0),  # instants, not periods
        (FOUR, 0.0),  # one more than may be
        ("2 to 4", 0.0),
        ("[(4, 2)]", 0.0),
    ],
)
def test_the_reward_is_the_overlap_of_two_sets(recipe, listed: str, iou: float):
    task = task_of(replace(R15, recipe=recipe))
    parts = task.score([EXAMPLE], [f"<answer>{listed}</answer>"])
    assert parts["iou"] == [pytest.approx(iou)]
    assert parts["format"] == [1.0 if recipe == "paper" else float(iou > 0)]  # the paper's asks for the tags alone


def test_format_has_no_think_block_and_an_end_just_after_the_video_is_cut_in_recipe_fixed():
    answer = "<think>t</think><answer>[(2, 4), (10, 14)]</answer>"
    assert task_of(R15).score([EXAMPLE], [answer])["format"] == [0.0]
    to_the_end = replace(EXAMPLE, truth=IntervalTruth(((20.0, 30.0),)))
    beyond = ["<answer>[(20, 40)]</answer>"]
    assert task_of(R15).score([to_the_end], beyond)["iou"] == [0.5]
    fixed = task_of(replace(R15, recipe="fixed"))
    assert fixed.score([to_the_end], beyond)["iou"] == [0.5]
    assert fixed.score([to_the_end], ["<answer>[(20, 31)]</answer>"])["iou"] == [1.0]
    assert fixed.metrics([to_the_end], ["<answer>[(20, 31)]</answer>"])["miou"] == pytest.approx(10 / 11)
    assert fixed.are_readable([EXAMPLE] * 3, ["[(20, 31)]", "20 to 31", ""]) == [True, False, False]
    assert fixed.metrics([to_the_end], beyond)["miou"] == 0.5  # scores are the benchmark's


def test_scores_read_what_the_evaluation_there_reads():
    answers = ["[(2, 4), (10, 14)]", f"<answer>{FOUR}</answer>", "<answer>[(10, 14)]</answer>", "no idea"]
    scores = task_of(R15).metrics([EXAMPLE] * 4, answers)
    assert scores == {"miou": pytest.approx((1 + 1 + 2 / 3) / 4), "r@0.3": 0.75, "r@0.5": 0.75, "r@0.7": 0.5}


@pytest.mark.parametrize("recipe", ["fixed", "paper"])
def test_the_target_earns_everything(recipe):
    many = replace(EXAMPLE, truth=IntervalTruth(((20.0, 21.0), (2.0, 4.0), (5.0, 5.5), (10.0, 14.0))))
    task = task_of(replace(R15, recipe=recipe))
    assert task.score([EXAMPLE], [task.target(EXAMPLE)]) == {"format": [1.0], "iou": [1.0]}
    assert task.target(many) == "<answer>[(2.00, 4.00), (10.00, 14.00), (20.00, 21.00)]</answer>"
    assert "[(" in task.question(EXAMPLE) and "think" not in task.question(EXAMPLE)
    trivial = task.trivial_answers([EXAMPLE])
    assert trivial["whole_video"] == ["<answer>[(0.00, 30.00)]</answer>"]
    assert task.score([EXAMPLE], trivial["best_constant"])["iou"][0] >= 0.5


@pytest.mark.parametrize("recipe", ["fixed", "paper"])
@pytest.mark.parametrize(("most", "earned"), [(None, 1.0), (3, 0.0), (4, 1.0)])
def test_evidence_of_a_grounded_question_is_limited_alike(recipe, most: int | None, earned: float):
    truth = GroundedChoiceTruth("A", ("x", "y"), ((2.0, 4.0), (10.0, 14.0)))
    example = Example("g", "grounded_qa", "a.mp4", "why?", 30.0, truth)
    task = make_tasks(TaskConfig(recipe=recipe, think=False, max_intervals=most))["grounded_qa"]
    many = replace(example, truth=replace(truth, intervals_s=((2.0, 3.0), (5.0, 9.0), (12.0, 13.0), (20.0, 22.0))))
    assert task.score([many], [task.target(many)])["format"] == [1.0]  # of no more than it may list
    parts = task.score([example], [f"<answer>A</answer><glue>{FOUR}</glue>"])
    assert parts == {"format": [earned], "iou": [earned], "accuracy": [1.0]}


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match=r"task\.iou is boundary and task\.grounding_answer is list"):
        TaskConfig(iou="boundary", grounding_answer="list")
    with pytest.raises(ConfigError, match=r"task\.max_intervals is 0"):
        TaskConfig(max_intervals=0)
