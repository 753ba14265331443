"""Questions from a file: placeholders, what a file may hold, and that every task asks with it."""

import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks import TASKS, make_tasks
from vcr1_fast.tasks.prompt_file import COMMON, MAX_FILE_BYTES, Wording, prompt_digests, wording_of
from vcr1_fast.types import (
    CaptionTruth,
    ChoiceTruth,
    Example,
    GroundedChoiceTruth,
    IntervalTruth,
    LabelTruth,
    NumberTruth,
    Patches,
    TrackTruth,
)

ROOT = Path(__file__).parents[2]
TRACK = TrackTruth(((0.093, 0.0, 0.8, 0.797), (0.1, 0.2, 0.3, 0.4)), (0.0, 0.07))
TRUTHS = {
    "temporal_grounding": IntervalTruth(((2.0, 4.5),)),
    "object_tracking": TRACK,
    "grounded_qa": GroundedChoiceTruth("A", ("a cat", "a dog"), ((2.0, 4.5),)),
    "multiple_choice": ChoiceTruth("A", ("a cat", "a dog")),
    "video_quality": LabelTruth("low", ("low", "high")),
    "captioning": CaptionTruth(("a cat sits",)),
    "numeric_answer": NumberTruth(4.0),
}
CHOICE_FILE = "{question}|{question_line}|{options}|{options_dots}|{options_line}|{options_list}"
CHOICE_TEXT = (
    "Who  sits|Who sits?|(A) a cat\n(B) a dog|A. a cat\nB. a dog|(A) a cat (B) a dog|['(A) a cat', '(B) a dog']"
)
# Every placeholder of every task: file, query, question.
FILLED = {
    "temporal_grounding": ("{event}|{event_plain}", "A  cat Sits.", "A  cat Sits.|A cat Sits"),
    "object_tracking": (
        "{object}|{start_box}|{start_box_short}|{start_time_s}|{times_s}|{num_boxes}",
        "a  cat",
        "a  cat|[0.093, 0.0, 0.8, 0.797]|[0.09,0.00,0.80,0.80]|0.00|0.00, 0.07|2",
    ),
    "grounded_qa": (CHOICE_FILE, "Who  sits", CHOICE_TEXT),
    "multiple_choice": (CHOICE_FILE, "Who  sits", CHOICE_TEXT),
    "video_quality": ("{instruction}|{labels}", " Rate  it.", "Rate  it. Choose one of: low, high.|low, high"),
    "captioning": ("{instruction}", "Say  it.", "Say it."),
    "numeric_answer": ("{question}|{question_line}", "How  many?", "How  many?|How many?"),
}


def example(task: str, query: str = "a cat sits", **fields) -> Example:
    return Example("x", task, "a.mp4", query, 33.75, TRUTHS[task], **fields)


def task_with(tmp_path: Path, text: str | bytes, name: str = "temporal_grounding", **settings):
    file = tmp_path / "prompt.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return make_tasks(TaskConfig(prompts={name: str(file)}, **settings))[name]


@pytest.mark.parametrize("name", FILLED)
def test_every_placeholder_of_every_task(tmp_path, name):
    text, query, question = FILLED[name]
    task = task_with(tmp_path, text + "|{query}|{query_line}|{duration_s}|{reason}", name)
    common = f"|{query}|{' '.join(query.split())}|33.75|Think inside <think></think>, then write"
    assert task.question(example(name, query)) == question + common
    fields = task.question_fields(example(name, query))
    assert set(fields) == set(re.findall(r"{(\w+)}", text))
    documented = (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8")
    assert [field for field in (*COMMON, *fields) if f"`{{{field}}}`" not in documented] == []


def test_what_stands_in_a_value_is_not_read_again_and_all_else_is_kept(tmp_path):
    text = '\n  {{"a": {{{event}}}}}\t{event}\r\n\n'
    task = task_with(tmp_path, text)
    assert task.question(example(task.name, "{object} {{ \\1 %s")) == (
        '\n  {"a": {{object} {{ \\1 %s}}\t{object} {{ \\1 %s\r\n'
    )
    assert task_with(tmp_path, "é {event}").question(example(task.name)) == "é a cat sits"
    assert task_with(tmp_path, b"\xef\xbb\xbf{event}?\r\n").question(example(task.name)) == "a cat sits?"


def test_the_recipes_of_an_event(tmp_path):
    """recipe paper: grpo_tg.py of VideoChat-R1 changes the query, its evaluate_grounding.py does not."""
    asked = example("temporal_grounding", " A cat  Sits.. ")
    told = replace(asked, is_held_out=True)
    fixed, paper = task_with(tmp_path, "{event}"), task_with(tmp_path, "{event}", recipe="paper")
    assert (fixed.question(asked), fixed.question(told)) == (" A cat  Sits.. ", " A cat  Sits.. ")
    assert (paper.question(asked), paper.question(told)) == ("a cat  sits.", " A cat  Sits.. ")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("When\n{evnt}?", r"line 2, holds \{evnt\}, which is no placeholder of this task, did you mean \{event\}\?"),
        ("{event.x}", r"line 1, holds \{event\.x\}, which is no placeholder"),
        ("{event[0]}", r"holds \{event\[0\]\}, which is no placeholder"),
        ("{event!r}", r"holds \{event!r\}, which is no placeholder"),
        ("{event:>9}", r"holds \{event:>9\}, which is no placeholder"),
        ("{event:}", r"holds \{event:\}, which is no placeholder"),
        ("{event}{}", r"holds \{\}, which is no placeholder"),
        ("{event}\n\n{", r"line 3, holds a lone \{ of this task; the placeholders are \{query\}, .*\{event\}"),
        ("{event}}", r"line 1, holds a lone \}.*\{\{ and \}\} stand for braces"),
        ("When?", r"lacks what is asked about, wanted \{event\} or \{event_plain\} or \{query\} or \{query_line\}"),
        ("{{event}}", "lacks what is asked about"),
        ("", "is empty"),
        (" \n\n", "is empty"),
        (b"{event}\n\xff", r"is not UTF-8 text: line 2 holds the byte 0xff"),
        ("{event}" + "x" * MAX_FILE_BYTES, "has more than 65,536 bytes"),
    ],
)
def test_files_that_are_refused(tmp_path, text, what):
    where = re.escape(f"task.prompts.temporal_grounding: {tmp_path}/prompt.txt")
    with pytest.raises(ConfigError, match=rf"{where}.*{what}"):
        task_with(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("object_tracking", "{object}", r"\{start_box\} or \{start_box_short\}"),
        ("object_tracking", "{start_box}", r"\{object\}"),
        ("multiple_choice", "{question}", r"\{options\} or \{options_dots\}"),
        ("grounded_qa", "{options}", r"\{question\}"),
        ("video_quality", "{labels}", r"\{instruction\}"),
    ],
)
def test_a_file_must_hold_what_is_asked_about(tmp_path, name, text, wanted):
    with pytest.raises(ConfigError, match=wanted):
        task_with(tmp_path, text, name)


def test_a_missing_file_and_an_unknown_task_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"task.prompts.captioning: .*none.txt cannot be read: No such file"):
        make_tasks(TaskConfig(prompts={"captioning": str(tmp_path / "none.txt")}))
    with pytest.raises(ConfigError, match=r"task.prompts.captioning: .* cannot be read: Is a directory"):
        make_tasks(TaskConfig(prompts={"captioning": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"task.prompts.grounding: there is no such task.*the tasks are temporal_gr"):
        make_tasks(TaskConfig(prompts={"grounding": "x"}))


def test_a_value_that_a_row_lacks_is_named(tmp_path):
    task = task_with(tmp_path, "{query} in {duration_s} s", "captioning")
    assert task.question(example("captioning")) == "a cat sits in 33.75 s"
    with pytest.raises(ValueError, match=r"\{duration_s\}, which this row of captioning does not give"):
        task.question(replace(example("captioning"), duration_s=math.inf))
    with pytest.raises(ValueError, match=r"\{query\}, which this row"):
        task.question(replace(example("captioning"), query=""))


def test_digests_are_of_the_file_and_of_nothing_built_in(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("{event}\n")
    tasks = make_tasks(TaskConfig(prompts={"temporal_grounding": str(file)}))
    assert prompt_digests(tasks) == {"temporal_grounding": hashlib.sha256(b"{event}\n").hexdigest()}
    assert prompt_digests(make_tasks(TaskConfig())) == {}


def test_the_built_in_words_are_such_texts_too():
    for recipe in ("fixed", "paper"):
        for think in (True, False):
            for name, task in make_tasks(TaskConfig(recipe=recipe, think=think)).items():
                question = task.question(example(name))
                assert wording_of(task) is not None and "{" not in question
                assert ("think" in question) is think and "answer>" in question
                assert ("<timestep>" in question) is (think and recipe == "paper")
    assert make_tasks(TaskConfig(recipe="paper"))["object_tracking"].question(example("object_tracking")) == (
        'Follow the object "a cat sits" through the video. It starts at [0.093, 0.0, 0.8, 0.797]: a box [x0, y0, x1, '
        "y1], corners as fractions of width and height between 0 and 1. Reason inside <think></think>; put each time "
        "or time range you rely on inside <timestep></timestep>. Give its boxes at regular times as a list of 2 such "
        "lists, the first box included, inside <answer></answer>."
    )


def test_the_prompt_holds_the_words_of_the_file(tmp_path, tiny_tokenizer):
    """The same builder makes the prompts of train, sft and eval."""
    task = task_with(tmp_path, "Find a cat:\n\n{event} in the video.\n\n")
    patches = Patches(torch.zeros(16, 1176), (1, 4, 4), 1.0, 2, 8.0)
    prompt = PromptBuilder(tiny_tokenizer, {task.name: task}, lambda video: patches).build(example(task.name))
    text = tiny_tokenizer.decode(prompt.token_ids_L)
    assert "user\nFind a cat:\n\na cat sits in the video.\n<|vision_start|>" in text


class Counting:
    """A user's task that takes a file."""

    name, part_names = "counting", ("exact",)

    def __init__(self, config: TaskConfig) -> None:
        self.wording = Wording(config, self.name, {"fixed": "How many {query}?"})

    def question(self, example: Example) -> str:
        return self.wording.ask(example, {})

    def parse_truth(self, row):
        return int(row["count"])

    def target(self, example):
        return str(example.truth)

    def score(self, examples, answers):
        return {"exact": [0.0] * len(answers)}

    def metrics(self, examples, answers):
        return {"acc": 0.0}

    def trivial_answers(self, examples):
        return {}


class Plain(Counting):
    """One with words of its own."""

    def __init__(self, config: TaskConfig) -> None:
        pass

    def question(self, example: Example) -> str:
        return "?"


def test_tasks_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_counting.py").write_text("from tests.tasks.test_prompt_file import Counting, Plain\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = Example("x", "counting", "a.mp4", "dogs", math.inf, 3)  # type: ignore[arg-type]
    built_in = make_tasks(TaskConfig(custom=("my_counting:Counting",)))["counting"]
    assert built_in.question(asked) == "How many dogs?"
    file = tmp_path / "c.txt"
    file.write_text("{query}: count them.\n")
    config = TaskConfig(custom=("my_counting:Counting",), prompts={"counting": str(file)})
    tasks = make_tasks(config)
    assert tasks["counting"].question(asked) == "dogs: count them."
    assert list(prompt_digests(tasks)) == ["counting"]
    paper = make_tasks(replace(config, prompts={}, recipe="paper"))["counting"]
    assert paper.question(asked) == "How many dogs?"  # the class has one text for both recipes
    with pytest.raises(ConfigError, match=r"task.prompts.counting: this task has words of its own"):
        make_tasks(replace(config, custom=("my_counting:Plain",)))


def test_the_example_in_the_configs():
    file = ROOT / "configs" / "prompts" / "temporal_grounding.txt"
    task = make_tasks(TaskConfig(prompts={"temporal_grounding": str(file)}))["temporal_grounding"]
    question = task.question(example("temporal_grounding"))
    assert question.startswith(
        'The video lasts 33.75 seconds. At which moment does this happen: "a cat sits"\n\nReason'
    )
    assert "<think>" in question and question.endswith("as <answer>START to END</answer>.")
    assert set(TASKS) == set(FILLED)
