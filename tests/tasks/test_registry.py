"""Tasks by name, and what every one of them does alike."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tasks.test_prompt_file import TRACK, TRUTHS, example
from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks import TASKS, make_tasks, task_class
from vcr1_fast.tasks.object_tracking import ObjectTracking


def test_every_task_is_made_under_its_own_name():
    tasks = make_tasks(TaskConfig())
    assert list(tasks) == list(TASKS)
    assert {
        "temporal_grounding": ("format", "iou"),
        "object_tracking": ("format", "iou"),
        "grounded_qa": ("format", "iou", "accuracy"),
        "multiple_choice": ("format", "accuracy"),
        "video_quality": ("format", "accuracy"),
        "numeric_answer": ("format", "accuracy"),
    }.items() <= {name: task.part_names for name, task in tasks.items()}.items()
    assert all(task.name == name for name, task in tasks.items())
    assert list(make_tasks(TaskConfig(), ["object_tracking"])) == ["object_tracking"]
    assert task_class("object_tracking") is ObjectTracking


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="no task 'temporal_ground', did you mean 'temporal_grounding'"):
        make_tasks(TaskConfig(), ["temporal_ground"])
    with pytest.raises(
        ValueError, match="no task 'zzz'; the tasks are temporal_grounding, object_tracking, grounded_qa"
    ):
        task_class("zzz")


def test_a_weight_for_a_part_that_no_task_has_is_refused():
    with pytest.raises(ConfigError, match=r"task.reward_weights.fromat: .* did you mean 'format'"):
        make_tasks(TaskConfig(reward_weights={"fromat": 1.0}))


ALL = [make_tasks(TaskConfig(recipe=recipe, think=think)) for recipe in ("fixed", "paper") for think in (True, False)]
UNJUDGED = [name for name in TASKS if name != "captioning"]


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_that_cannot_be_scored_is_refused(name):
    other = replace(example(name), truth=TRACK if name == "temporal_grounding" else TRUTHS["temporal_grounding"])
    for tasks in ALL:
        task = tasks[name]
        assert task.score([], []) == {part: [] for part in task.part_names}
        with pytest.raises(ValueError, match="got 1 examples and 2 answers, wanted one answer per example"):
            task.score([example(name)], ["", ""])
        with pytest.raises(TypeError, match=f"example x of task {name} holds {type(other.truth).__name__}, not "):
            task.score([other], ["<answer>1</answer>"])
        with pytest.raises(ValueError, match="no examples to score"):
            task.metrics([], [])


TAGS = [f"<{end}{tag}>" for tag in ("think", "answer", "glue") for end in ("", "/")]
PIECES = [*TAGS, "C", "(", "[(", "1", ", ", ")]", "[]", "-", "9", ".", " to ", "s", "e", "inf", "low", "\n"]
BOXES = ["[0,0,1,1]", "['a','b','c','d']", "[0,0,1e999,1e999]", "[-1e308,-1e308,1e308,1e308]", "[[]]", "["]
ANY_BOX = st.sampled_from(BOXES) | st.lists(st.floats(-2, 2), min_size=4, max_size=4).map(str)


@settings(max_examples=1000)
@given(
    st.sampled_from(UNJUDGED),
    st.lists(st.sampled_from(PIECES)).map("".join)
    | st.text(max_size=60)
    | st.text("[](),. 0159\n", max_size=25)
    | st.lists(ANY_BOX, min_size=2, max_size=3).map(lambda boxes: f"[{','.join(boxes)}]"),
    st.tuples(st.floats(-50, 50), st.floats(-50, 50)),
)
def test_rewards_and_metrics_stay_in_range_on_any_text(name, text, interval):
    asked = example(name)
    if hasattr(asked.truth, "intervals_s"):
        asked = replace(asked, truth=replace(asked.truth, intervals_s=(interval,)))
    wrapped = [f"<think>t</think><answer>{inner}</answer>" for inner in ("C", text)]
    for task in (tasks[name] for tasks in ALL):
        for answer in (text, wrapped[1], f"{wrapped[0]}<glue>{text}</glue>", f"{wrapped[1]}<glue>[({text})]</glue>"):
            parts, metrics = task.score([asked], [answer]), task.metrics([asked], [answer])
            assert all(0.0 <= value <= 1.0 for value in [*metrics.values(), *(values[0] for values in parts.values())])
            fractions = {part for part, (value,) in parts.items() if 0.0 < value < 1.0}
            assert fractions <= ({"accuracy"} if name == "numeric_answer" else {"iou"})


@pytest.mark.parametrize("name", UNJUDGED)
@pytest.mark.parametrize("piece", [*TAGS, "<answer></answer>", "<glue></glue>", "</answer> ", "(1, 2),", "(A", "9"])
def test_hostile_text_takes_linear_time(name, piece):
    text = piece * (200_000 // len(piece))
    wrapped = f"<think>t</think><answer>{text}</answer>"
    start = time.process_time()
    for tasks in ALL:
        tasks[name].score([example(name)] * 3, [text, wrapped, f"{wrapped}<glue>[{text[:65_000]}]</glue>"])
    assert time.process_time() - start < 1.0
