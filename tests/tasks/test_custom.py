"""Tasks and rewards of a user: the docs' example as it stands there, and every way to get one wrong."""

import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from vcr1_fast.prompts.dataset import AnnotationSource, read_annotation_files
from vcr1_fast.settings.config import ConfigError, JudgeConfig, TaskConfig
from vcr1_fast.settings.io import config_to_yaml, load_config
from vcr1_fast.tasks.captioning import Captioning
from vcr1_fast.tasks.custom import CheckedTask, check_tasks, checked_values, load_rewards, load_tasks, make_custom
from vcr1_fast.tasks.task import Task
from vcr1_fast.tasks.temporal_grounding import TemporalGrounding
from vcr1_fast.types import Example, IntervalTruth

DOCS_CODE = """\
# my_task.py
from vcr1_fast.tasks.answer_format import has_strict_format, tag_blocks

class Counting:  # rows: {"task": "counting", "video": "a.mp4", "query": "dogs", "duration_s": 8.0, "count": 3}
    name, part_names = "counting", ("format", "exact")
    def __init__(self, config): self.think = config.think
    def parse_truth(self, row): return int(row["count"])
    def question(self, example): return f"How many {example.query}? Think in <think></think>, then <answer>N</answer>."
    def target(self, example): return f"<think>{example.reasoning}</think><answer>{example.truth}</answer>"
    def score(self, examples, answers):
        last = [(tag_blocks(answer, "answer") or [""])[-1].strip() for answer in answers]
        return {"format": [float(has_strict_format(answer, self.think)) for answer in answers],
                "exact": [float(text == str(example.truth)) for example, text in zip(examples, last)]}
    def metrics(self, examples, answers):
        return {"accuracy": sum(self.score(examples, answers)["exact"]) / len(examples)}
    def trivial_answers(self, examples): return {"always_2": ["<think></think><answer>2</answer>"] * len(examples)}

def brevity(examples, answers): return [max(0.0, 1 - len(answer) / 4000) for answer in answers]
"""

DOCS_SETTINGS = """\
task:
  custom: ["my_task:Counting"]
  rewards: {counting: ["my_task:brevity"], temporal_grounding: ["my_task:brevity"]}
  reward_weights: {brevity: 0.1}
"""


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder to start in; the user's modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def write(folder: Path, name: str, code: str) -> None:
    (folder / name).write_text(textwrap.dedent(code), encoding="utf-8")


def example(name: str = "a", truth: object = IntervalTruth(((2.0, 4.0),)), task: str = "temporal_grounding") -> Example:
    return Example(name, task, f"{name}.mp4", "dogs", 8.0, truth)  # type: ignore[arg-type]


def test_the_readmes_example(in_folder: Path):
    write(in_folder, "my_task.py", DOCS_CODE)
    write(in_folder, "my.yaml", DOCS_SETTINGS)
    config = load_config("my.yaml", []).task
    custom = load_tasks(config.custom, taken=["temporal_grounding"])
    tasks: dict[str, Task] = {"temporal_grounding": TemporalGrounding(config)}
    tasks |= {name: make_custom(name, found, config) for name, found in custom.items()}
    tasks = check_tasks(tasks, load_rewards(config.rewards, tasks), custom)

    write(
        in_folder,
        "rows.jsonl",
        """\
        {"task": "counting", "video": "a.mp4", "query": "dogs", "duration_s": 8.0, "count": 3}
        {"task": "counting", "video": "a.mp4", "query": "cats", "duration_s": 8.0}
        {"task": "counting", "video": "b.mp4", "query": "cats", "duration_s": 8.0, "count": "2"}
        """,
    )
    (content,) = read_annotation_files([AnnotationSource("rows.jsonl")], tasks)
    examples, errors = content.examples, content.errors
    assert [e.truth for e in examples] == [3, 2]
    assert [str(e) for e in errors] == ["rows.jsonl:2: parse_truth of task counting raised KeyError: 'count'"]

    counting = tasks["counting"]
    assert counting.part_names == ("format", "exact", "brevity")
    assert counting.question(examples[0]) == "How many dogs? Think in <think></think>, then <answer>N</answer>."
    answers = ["<think>one two three</think><answer> 3 </answer>", "<answer>2</answer>" + " " * 3982]
    assert counting.score(examples, answers) == {
        "format": [1.0, 0.0],
        "exact": [1.0, 1.0],
        "brevity": [1 - 48 / 4000, 0.0],
    }
    assert counting.target(examples[1]) == "<think></think><answer>2</answer>"
    assert counting.metrics(examples, counting.trivial_answers(examples)["always_2"]) == {"accuracy": 0.5}

    grounding = tasks["temporal_grounding"]
    assert grounding.part_names == ("format", "iou", "brevity")
    scored = grounding.score([example()], ["<think></think><answer>2.00 to 3.00</answer>"])
    assert scored == {"format": [1.0], "iou": [0.5], "brevity": [1 - 44 / 4000]}


def test_settings_are_kept_in_the_saved_file(in_folder: Path):
    write(in_folder, "my.yaml", DOCS_SETTINGS + "judge: {model: small, cache: null, on_failure: zero}\n")
    config = load_config("my.yaml", ["--judge.max_retries=7", "--task.custom=my_task:Counting,my_task:Other"])
    assert config.task.custom == ("my_task:Counting", "my_task:Other")
    assert config.task.rewards == {
        "counting": ("my_task:brevity",),
        "temporal_grounding": ("my_task:brevity",),
    }
    assert config.judge == JudgeConfig(model="small", cache=None, on_failure="zero", max_retries=7)
    (in_folder / "saved.yaml").write_text(config_to_yaml(config))
    assert load_config("saved.yaml", []) == config


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_task", "task.custom: 'my_task' is not module:name, wanted for example"),
        ("my task:X", "is not module:name"),
        ("my_task:X.y", "is not module:name"),
        ("my_nothing:X", "there is no module 'my_nothing': install it, or start in the folder that holds it"),
        ("my_task.deeper:X", "there is no module 'my_task.deeper'"),
        ("my_task:Countin", "has no 'Countin', did you mean 'Counting'?"),
        ("my_task:brevity", "my_task:brevity is <function brevity .*, wanted a class"),
        ("my_half:Half", r"lacks question, target, metrics, trivial_answers, part_names \(a tuple of texts\): see"),
        ("my_broken:X", "my_broken:X: importing it raised ZeroDivisionError: division by zero"),
        ("my_typo:X", "my_typo:X: importing it raised SyntaxError: "),
        ("my_needy:X", "my_needy:X: there is no module 'my_absent_dependency'"),
        ("my_same:Counting", "my_same:Counting has the name 'temporal_grounding', which another task has"),
    ],
)
def test_a_task_that_cannot_be_used(in_folder: Path, path: str, message: str):
    write(in_folder, "my_task.py", DOCS_CODE)
    write(in_folder, "my_same.py", DOCS_CODE.replace('"counting", (', '"temporal_grounding", ('))
    write(
        in_folder,
        "my_half.py",
        """\
        class Half:
            name, part_names, target = "half", ["a"], 3
            def score(self): ...
            def parse_truth(self): ...
        """,
    )
    write(in_folder, "my_broken.py", "1 / 0")
    write(in_folder, "my_typo.py", "def X(:")
    write(in_folder, "my_needy.py", "import my_absent_dependency")
    with pytest.raises(ConfigError, match=message):
        load_tasks([path], taken=["temporal_grounding"])


def test_a_constructor_that_raises(in_folder: Path):
    write(in_folder, "my_task.py", DOCS_CODE.replace("self.think = config.think", "self.think = config.thinks"))
    (found,) = load_tasks(["my_task:Counting"], ()).values()
    with pytest.raises(ConfigError, match=r"counting: its constructor raised AttributeError: .* 'thinks'.*; it gets"):
        make_custom("counting", found, TaskConfig())


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"countin": ["my_task:brevity"]}, "task.rewards.countin: there is no such task, did you mean 'counting'?"),
        ({"counting": ["my_task:brevit"]}, "my_task.py has no 'brevit', did you mean 'brevity'?"),
        ({"counting": ["my_task:Counting"]}, "is <class .*, wanted a function of"),
        ({"counting": ["my_task:NUMBER"]}, "my_task:NUMBER is 3, wanted a function of"),
        ({"counting": ["my_task:one"]}, "my_task:one is <function one .*, wanted a function of"),
        ({"counting": ["my_task:brevity", "my_task:brevity"]}, "task.rewards.counting names two functions 'brevity'"),
    ],
)
def test_a_reward_that_cannot_be_used(in_folder: Path, rewards, message: str):
    write(in_folder, "my_task.py", DOCS_CODE + "\nNUMBER = 3\ndef one(answers): return answers\n")
    with pytest.raises(ConfigError, match=message):
        load_rewards(rewards, ["counting", "temporal_grounding"])


def test_a_reward_with_the_name_of_a_part_is_refused():
    task = TemporalGrounding(TaskConfig())
    with pytest.raises(ConfigError, match=r"task.rewards.temporal_grounding: the task has a part 'iou' already"):
        check_tasks({task.name: task}, {task.name: {"iou": lambda examples, answers: []}}, ())


@pytest.mark.parametrize("values", [[0, 1], (0.0, 1.0), np.array([0.0, 1.0], np.float32), [False, True], iter([0, 1])])
def test_values_of_any_kind_become_floats(values):
    checked = checked_values(values, [example()] * 2, "reward x")
    assert checked == [0.0, 1.0]
    assert all(type(value) is float for value in checked)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], "reward x gave 1 values for 2 answers, wanted one per answer"),
        ([0.5, math.nan], r"reward x gave nan for answer 1 \(example b\), wanted a number in \[0, 1\]"),
        ([math.inf, 0.5], r"reward x gave inf for answer 0 \(example a\)"),
        ([0.0, 1.0001], "gave 1.0001 for answer 1"),
        ([-0.1, 1.0], "gave -0.1 for answer 0"),
        ([None, 1.0], "gave None for answer 0"),
        (["1", 1.0], "gave '1' for answer 0"),
        ([10**400, 1.0], "gave 1000.* for answer 0"),
        (None, "reward x gave None, wanted a list of 2 numbers"),
        (0.5, "reward x gave 0.5, wanted a list of 2 numbers"),
    ],
)
def test_values_that_are_no_rewards_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        checked_values(values, [example("a"), example("b")], "reward x")


def test_what_a_custom_score_returns_is_checked_on_every_call(in_folder: Path):
    write(in_folder, "my_task.py", DOCS_CODE)
    (found,) = load_tasks(["my_task:Counting"], ()).values()
    counting = found(TaskConfig())
    checked = CheckedTask(counting, {}, is_custom=True)
    one = [example("a", 3, "counting")]
    assert checked.score(one, ["<answer>3</answer>"]) == {"format": [0.0], "exact": [1.0]}
    for result, message in [
        ({"format": [1.0]}, "score of task counting gave format, wanted a dict of its part_names format, exact"),
        ([1.0], "score of task counting gave list, wanted a dict"),
        ({"format": [1.0], "exact": [2.0]}, r"part exact of task counting gave 2.0 for answer 0 \(example a\)"),
    ]:
        counting.score = lambda examples, answers, result=result: result
        with pytest.raises(ValueError, match=message):
            checked.score(one, ["x"])


def test_a_built_in_task_keeps_its_own_errors_and_members():
    captioning = Captioning(TaskConfig(), JudgeConfig(cache=None))
    checked = CheckedTask(captioning, {"bonus": lambda examples, answers: [0.5] * len(answers)}, is_custom=False)
    assert checked.judge is captioning.judge
    with pytest.raises(TypeError, match="holds IntervalTruth, not a caption"):
        checked.score([example()], ["x"])
    with pytest.raises(AttributeError):
        checked.nothing  # noqa: B018
    untouched: dict[str, Task] = {"captioning": captioning}
    assert check_tasks(untouched, {}, ())["captioning"] is captioning


def test_the_readme_shows_this_example():
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert f"```python\n{DOCS_CODE}```" in page and f"```yaml\n{DOCS_SETTINGS}```" in page
