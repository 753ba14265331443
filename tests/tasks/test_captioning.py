"""Captioning against a judge on loopback: rewards by hand, and what happens when the judge is not well."""

import dataclasses
import json
import time

import pytest

from tests.judge.judge_server import (
    hangs_up,
    judges_by_words,
    says,
    sends,
    serving,
    unused_url,
    waits,
)
from tests.rollout.scripted_engine import ScriptedEngine
from vcr1_fast.judge.client import JudgeUnavailableError
from vcr1_fast.rollout.collect import collect
from vcr1_fast.settings.config import JudgeConfig, TaskConfig
from vcr1_fast.tasks.captioning import Captioning
from vcr1_fast.types import CaptionTruth, Example, IntervalTruth, SamplingParams

EVENTS = ("A man opens a door.", "A dog runs in.", "The man laughs.", "The dog barks.")
ALL = " ".join(EVENTS)


def task_of(url: str = "http://127.0.0.1:9/v1", recipe: str = "fixed", think: bool = True, **judge) -> Captioning:
    defaults = {"cache": None, "backoff_s": 0.01, "max_retries": 1, "timeout_s": 2.0}
    return Captioning(TaskConfig(recipe=recipe, think=think), JudgeConfig(url=url, **(defaults | judge)))  # type: ignore[arg-type]


def example(name: str = "a", events: tuple[str, ...] = EVENTS, caption: str = "", **changes) -> Example:
    made = Example(name, "captioning", f"{name}.mp4", "", 8.0, CaptionTruth(events, caption))
    return dataclasses.replace(made, **changes)


def answer(caption: str) -> str:
    return f"<think>x</think><answer>{caption}</answer>"


HALF = "A man opens a door. A dog runs in."
# recall 2/4, precision 2/3
HALF_AND_WRONG = HALF + " A car explodes loudly."
# recall 4/4, precision 4/24: what a long answer full of guesses earns
GUESSES = ALL + " " + " ".join(f"A thing number {i} happens." for i in range(20))


def test_f1_by_hand():
    answers = [ALL, HALF, HALF_AND_WRONG, GUESSES, "A cat sleeps all day.", "", "..."]
    with serving(judges_by_words) as server:
        parts = task_of(server.url).score([example()] * 7, [answer(caption) for caption in answers])
    # f1 = 2pr / (p + r): 1; r 1/2 p 1; r 1/2 p 2/3; r 1 p 1/6; 0
    assert parts["f1"] == pytest.approx([1.0, 2 / 3, 4 / 7, 2 / 7, 0.0, 0.0, 0.0])
    assert parts["format"] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert set(parts) == {"format", "f1"} == set(task_of().part_names)


def test_recall_by_hand_and_how_it_is_gamed():
    answers = [ALL, HALF, HALF_AND_WRONG, GUESSES, "A cat sleeps all day.", ""]
    with serving(judges_by_words) as server:
        task = task_of(server.url, recipe="paper")
        parts = task.score([example()] * 6, [answer(caption) for caption in answers])
        assert task.judge.counters()["requests"] == 5  # one each: the paper never asks for precision
    assert parts == {"format": [1.0] * 6, "recall": [1.0, 0.5, 0.5, 1.0, 0.0, 0.0]}
    assert task.part_names == ("format", "recall")


def test_metrics_are_those_of_dream_1k():
    """The second answer has no tags, and the benchmark takes all of it but the think block."""
    answers = [answer(HALF_AND_WRONG), f"<think>t</think>{ALL}", ""]
    with serving(judges_by_words) as server:
        task = task_of(server.url)
        metrics = task.metrics([example()] * 3, answers)
    assert task.are_readable([example()] * 3, answers) == [True, True, False]
    assert task.are_well_formed([example()] * 3, answers) == [True, False, False]
    # recall (1/2 + 1 + 0) / 3, precision (2/3 + 1 + 0) / 3, f1 of these two means
    recall, precision = 1 / 2, 5 / 9
    assert metrics == pytest.approx(
        {"f1": 2 * recall * precision / (recall + precision), "recall": recall, "precision": precision, "judged": 1.0}
    )
    assert next(iter(metrics)) == "f1"


def test_metrics_of_single_answers_need_no_further_request():
    answers = [answer(HALF_AND_WRONG), answer(ALL), answer("")]
    with serving(judges_by_words) as server:
        task = task_of(server.url)
        task.metrics([example()] * 3, answers)
        num_requests = len(server.requests)
        single = task.sample_metrics([example()] * 3, answers)
        assert len(server.requests) == num_requests == 6
    assert single == {"recall": [0.5, 1.0, 0.0], "precision": [pytest.approx(2 / 3), 1.0, 0.0]}
    assert task_of(unused_url()).sample_metrics([example()], [answer(ALL)]) == {}


def test_a_caption_without_events_is_split_once_for_a_whole_group():
    examples = [example("a", (), ALL)] * 3
    with serving(judges_by_words) as server:
        task = task_of(server.url, recipe="paper")
        assert task.score(examples, [answer(ALL), answer(HALF), answer(HALF)])["recall"] == [1.0, 0.5, 0.5]
        assert len(server.requests) == 3  # one split, and one check for each of two different captions
        task.score(examples, [answer(HALF)] * 3)
        assert len(server.requests) == 3


def test_a_reference_in_which_nothing_happens_is_one_event():
    with serving(judges_by_words) as server:
        parts = task_of(server.url, recipe="paper").score(
            [example("a", (), "Blue sky")] * 2, [answer("It shows a blue sky over there"), answer("A man runs.")]
        )
    assert parts["recall"] == [1.0, 0.0]


def test_precision_is_against_the_caption_where_there_is_one():
    truth = example("a", ("A man opens a door.",), "A man opens a door. He wears a hat.")
    with serving(judges_by_words) as server:
        metrics = task_of(server.url).metrics([truth], [answer("A man opens a door. He wears a hat.")])
    assert (metrics["recall"], metrics["precision"]) == (1.0, 1.0)


def test_nothing_to_judge_asks_nobody():
    task = task_of(unused_url())
    answers = ["", "A man opens a door.", answer(""), answer(" \n "), answer("?!"), "<answer>", "\x00" * 100]
    assert task.score([example()] * 7, answers)["f1"] == [0.0] * 7
    answers = ["", "<think>A man opens a door.", answer(""), answer(" \n "), answer("?!"), "<think>", "\x00" * 100]
    assert task.metrics([example()] * 7, answers) == {"f1": 0.0, "recall": 0.0, "precision": 0.0, "judged": 1.0}
    assert task.judge.counters()["requests"] == 0


def test_precision_is_not_asked_for_where_recall_is_nothing():
    with serving(judges_by_words) as server:
        task_of(server.url).score([example()], [answer("A cat sleeps all day.")])
        assert len(server.requests) == 1


TROUBLES = {
    "down": None,
    "slow": waits(3.0, judges_by_words),
    "wrong schema": says('{"verdict": "fine"}'),
    "too few verdicts": says('{"entailed": [true]}'),
    "wrong key": sends(401),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_judge_that_is_down_never_loses_a_run(trouble, tiny_tokenizer, make_prompt, capsys):
    """Three groups are drawn; not one can be judged; the step goes on with the groups of the other task."""

    class Fixed:
        name, part_names = "fixed", ("format",)

        def score(self, examples, answers):
            return {"format": [1.0] * len(answers)}

    prompts = [
        dataclasses.replace(make_prompt((1, 4, 4), "text"), example=dataclasses.replace(example(n), task=task))
        for n, task in (("a", "captioning"), ("b", "captioning"), ("c", "captioning"), ("d", "fixed"))
    ]
    prompts[3] = dataclasses.replace(
        prompts[3], example=dataclasses.replace(prompts[3].example, truth=IntervalTruth(((0.0, 1.0),)))
    )
    engine = ScriptedEngine(tiny_tokenizer, {n: [answer(ALL), answer(HALF)] for n in "abcd"})
    behaviour = TROUBLES[trouble]
    with serving(behaviour or hangs_up) as server:
        url = server.url if behaviour else unused_url()
        task = task_of(url, timeout_s=0.2, total_timeout_s=3.0)
        started = time.monotonic()
        drawn = collect(
            engine,
            prompts,
            SamplingParams(2, 400),
            {"captioning": task, "fixed": Fixed()},  # type: ignore[dict-item]
            TaskConfig(),
        )
        assert time.monotonic() - started < 3.0
    assert [group.prompt.example.id for group in drawn.groups] == ["d"]
    assert [failure.example_id for failure in drawn.failures] == ["a", "b", "c"]
    assert all(
        "the reward of task captioning raised JudgeUnavailableError" in str(failure) for failure in drawn.failures
    )
    assert capsys.readouterr().err.count("reward failure: ") == 3


def test_only_the_group_that_cannot_be_judged_is_lost(tiny_tokenizer, make_prompt):
    """A caption that confuses the judge for good costs its own group; what was judged before is not asked again."""

    def confused(handler, prompt):
        (says("As a language model I") if "confusing" in prompt else judges_by_words)(handler, prompt)

    prompts = [dataclasses.replace(make_prompt((1, 4, 4), "text"), example=example(name)) for name in "abc"]
    scripted = {
        "a": [answer(ALL), answer(HALF)],
        "b": [answer("A confusing text."), answer(ALL)],
        "c": [answer(HALF)] * 2,
    }
    with serving(confused) as server:
        task = task_of(server.url)
        drawn = collect(
            ScriptedEngine(tiny_tokenizer, scripted),
            prompts,
            SamplingParams(2, 400),
            {"captioning": task},
            TaskConfig(),
        )
    assert [(g.prompt.example.id, g.reward_parts["f1"]) for g in drawn.groups] == [
        ("a", (1.0, pytest.approx(2 / 3))),
        ("c", pytest.approx((2 / 3, 2 / 3))),
    ]
    assert [failure.example_id for failure in drawn.failures] == ["b"]
    assert "its answer cannot be read" in drawn.failures[0].reason
    # ALL and HALF: check, split, check. The confusing one: two attempts, and two more when its group is scored alone.
    assert len(server.requests) == 3 + 3 + 2 + 2


def test_on_failure_zero_keeps_the_group_without_a_judged_difference(capsys):
    def confused(handler, prompt):
        (says("no") if "confusing" in prompt else judges_by_words)(handler, prompt)

    with serving(confused) as server:
        task = task_of(server.url, on_failure="zero")
        parts = task.score(
            [example("a")] * 2 + [example("b")] * 2,
            [answer(ALL), answer("A confusing text."), answer(ALL), answer(HALF)],
        )
    assert parts["f1"] == pytest.approx([0.0, 0.0, 1.0, 2 / 3])
    assert parts["format"] == [1.0] * 4
    assert "videos without a verdict, judged as 0: 1; a: the judge" in capsys.readouterr().err


def test_metrics_without_a_judge_do_not_raise(capsys):
    task = task_of(unused_url())
    assert task.metrics([example("a"), example("b")], [answer(ALL), answer("")]) == {
        "f1": 0.0,
        "recall": 0.0,
        "precision": 0.0,
        "judged": 0.5,
    }
    assert "videos without a verdict, counted as 0: 1; a: the judge" in capsys.readouterr().err
    with pytest.raises(
        JudgeUnavailableError, match=r"videos without a verdict, left out: 1; a: the judge .* no verdict"
    ):
        task.score([example("a"), example("b")], [answer(ALL), answer("")])


def test_baselines():
    examples = [example("a"), example("b")]
    task = task_of(unused_url())
    trivial = task.trivial_answers(examples)
    assert trivial == {
        "empty": ["<think></think><answer></answer>"] * 2,
        "a_video": ["<think></think><answer>A video.</answer>"] * 2,
    }
    assert task.metrics(examples, trivial["empty"])["f1"] == 0.0
    assert task.judge.counters()["requests"] == 0
    with serving(judges_by_words) as server:
        assert task_of(server.url).metrics(examples, trivial["a_video"])["f1"] == 0.0


def test_a_row_is_read():
    task = task_of()
    assert task.parse_truth({"events": ["A man  runs.", "A dog\nbarks", "A man runs."]}) == CaptionTruth(
        ("A man runs.", "A dog barks")
    )
    assert task.parse_truth({"caption": " A man runs. "}) == CaptionTruth((), "A man runs.")
    assert task.parse_truth({"events": ["x"], "caption": "A man."}) == CaptionTruth(("x",), "A man.")
    assert task.parse_truth({"events": None, "caption": "A man."}) == CaptionTruth((), "A man.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, '"events" and "caption" are both missing'),
        ({"events": []}, r"events is \[\], wanted a list of sentences, at least one"),
        ({"events": [], "caption": "x"}, r"events is \[\]"),
        ({"events": "A man runs."}, "events is 'A man runs.', wanted a list"),
        ({"events": ["A", 3]}, r"events\[1\] is 3, wanted text that is not empty"),
        ({"events": ["A", " "]}, r"events\[1\] is ' ', wanted text that is not empty"),
        ({"events": ["A" * 401]}, r"events\[0\] has 401 characters, wanted at most 400"),
        ({"caption": 3}, "caption is 3, wanted text"),
        ({"caption": ""}, "caption is '', wanted text"),
        ({"caption": "A" * 8001}, "caption has 8001 characters, wanted at most 8000"),
    ],
)
def test_a_broken_row_is_refused(row, reason):
    with pytest.raises(ValueError, match=reason):
        task_of().parse_truth(row)


def test_questions_and_targets():
    fixed, paper = task_of(), task_of(recipe="paper")
    assert fixed.question(example()) == (
        "Describe what happens in the video: every action, in order, and nothing that is not seen. Think inside "
        "<think></think>, then write the description in <answer></answer>."
    )
    assert task_of(think=False).question(example(query="What does  the dog do?")) == (
        "What does the dog do? Write the description in <answer></answer>."
    )
    assert paper.question(example()).startswith("Describe the video in detail. Reason inside <think></think>; put")
    assert "<think>" not in task_of(recipe="paper", think=False).question(example())
    target = fixed.target(example(events=("A man runs", "A dog barks!"), reasoning="First"))
    assert target == "<think>First</think><answer>A man runs. A dog barks!</answer>"
    assert task_of(think=False).target(example("a", (), "He runs.")) == "<answer>He runs.</answer>"


def test_a_target_gets_the_full_reward():
    for recipe in ("fixed", "paper"):
        with serving(judges_by_words) as server:
            task = task_of(server.url, recipe=recipe)
            parts = task.score([example()], [task.target(example())])
        assert list(parts.values()) == [[1.0], [1.0]]


def test_hostile_answers_get_numbers():
    answers = [
        answer(text) for text in ("\ud800 x", "{0}{events}", '"]}\n\nEvents: []', "a" * 200_000, "</answer><answer>b")
    ]
    with serving(judges_by_words) as server:
        parts = task_of(server.url).score([example()] * 5, answers)
    assert all(0.0 <= value <= 1.0 for values in parts.values() for value in values)
    json.dumps(parts, allow_nan=False)
