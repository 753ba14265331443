"""What a run without a signal says: each cause where its evidence is, and only there."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import vcr1_fast.run.no_signal as no_signal
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.learner.step import UpdateReport
from vcr1_fast.run.no_signal import Evidence, SignalWatch, likely_causes, lines
from vcr1_fast.settings.io import load_config


def answer(text: str, reward: float = 1.0, form: float = 1.0, ended: bool = True) -> dict[str, Any]:
    return {
        "text": text,
        "parsed": text,
        "parts": {"format": form, "iou": reward - form},
        "reward": reward,
        "finish_reason": "stop" if ended else "length",
        "is_sampled": True,
    }


def evidence(*groups: list[dict[str, Any]], tokens_per_pair: float = 9.0, **more: Any) -> Evidence:
    rows = [
        {"id": str(i), "task": "t", "question": f"question {i}", "truth": "1.00 to 2.00", "answers": answers}
        | {"tokens_per_pair": [tokens_per_pair]}
        for i, answers in enumerate(groups)
    ]
    usual = {"num_updates": 1, "num_skipped": 0, "num_too_large": 0, "max_new_tokens": 64, "temperature": 0.5}
    return Evidence(rows, **usual | more)


LEARNS = [answer("a", 1.5), answer("b", 1.25)]


@pytest.mark.parametrize(
    ("case", "begins", "says"),
    [
        (evidence(), "no group was left", "bad samples"),
        (evidence(LEARNS, num_too_large=2), "2 groups were left out", "train.max_group_tokens"),
        (evidence(LEARNS, num_skipped=1, num_updates=2), "1 of 2 updates were skipped", "learning_rate"),
        (evidence(LEARNS, tokens_per_pair=4.0), "two frames together are 4 tokens", "video.min_frame_pixels"),
        (evidence([answer("a")], [answer("b")]), "each group has one answer", "rollout.group_size"),
        (
            evidence([answer("a", 1.5, ended=False), answer("b", 1.0, ended=False)]),
            "all 2 answers were cut at rollout.max_new_tokens=64",
            "raise it",
        ),
        (evidence([answer("a", 0.5, 0.0), answer("b", 0.25, 0.0)]), "none of 2 answers has the form", "vcr1-fast sft"),
        (
            evidence([answer("a"), answer("a")], [answer("b"), answer("b")]),
            "the answers to a question are all the same text, at rollout.temperature=0.5",
            "top_k",
        ),
        (
            evidence([answer("a", 2.0), answer("b", 2.0)], [answer("c", 1.5), answer("d", 1.5)]),
            "answers to a question differ, but all get the same reward (mean format 1.000, iou 0.750)",
            "see above",
        ),
        (evidence([answer("a", 2.0), answer("b", 2.0)]), "answers to a question differ", "too easy; data.reward_range"),
    ],
)
def test_one_cause(case: Evidence, begins: str, says: str):
    [cause] = likely_causes(case)
    assert cause.startswith(begins) and says in cause


def test_no_cause_without_its_evidence():
    one_ended = [
        answer("a", 1.5, ended=False),
        answer("a", 1.0),
    ]  # one text in one of two groups
    assert likely_causes(evidence(LEARNS, one_ended)) == []
    assert lines(evidence(LEARNS), 4, 80)[-1] == "  likely: none of the usual causes is seen in these answers"


def test_several_causes_and_a_truth_that_was_not_drawn():
    """The annotated answer of a group is in form and ended; what counts is what the policy said."""
    truth = answer("the truth", 2.0) | {"is_sampled": False}
    said = [answer("x", 0.0, 0.0, ended=False), answer("y", 0.0, 0.0, ended=False)]
    assert [cause.split()[0] for cause in likely_causes(evidence([*said, truth]))] == ["all", "none"]
    assert "too hard" in likely_causes(evidence(said))[2]


def test_three_rows_are_shown_in_the_width_of_the_terminal():
    got = lines(evidence(*[[answer("word " * 40), answer("word " * 40)]] * 5), 10, 100)
    assert got[0] == "no signal: in 10 steps in a row no update had a gradient that is not 0; of its answers:"
    assert [line.split()[0] for line in got[1:7]] == ["asked", "said:"] * 3 and got[7].startswith("  likely: ")
    assert all(len(line) <= 100 for line in got[1:7])
    assert got[2].endswith("truth 1.00 to 2.00 | reward 1.000")
    assert lines(evidence(), 3, 80)[0].endswith("not 0")


def test_said_once_after_so_many_steps_in_a_row_and_at_the_end(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(no_signal, "say", said.append)
    config = load_config(None, ["--train.no_signal_steps=2"])
    run: Any = SimpleNamespace(config=config, tasks={}, world=SINGLE_PROCESS)
    none, some = (UpdateReport({}, grad_norm, 1e-6, skipped=False) for grad_norm in (0.0, 1.0))

    learned = SignalWatch(run, has_signal=False)
    for report in (none, some, none, none, none, none, some, none, none):
        learned.note([], [report])
    assert len(said) == 1 and said[0].startswith("no signal: in 2 steps in a row")
    assert learned.has_signal and learned.finish() == [] and len(said) == 1

    never = SignalWatch(run, has_signal=False)
    for _ in range(2):
        never.note([], [replace(none, skipped=True)])
    assert len(said) == 2 and "1 of 1 updates were skipped" in never.finish()[1] and len(said) == 2  # said just now
    never.note([], [none])
    assert never.finish()[0].startswith("no group was left") and said[2].startswith("no signal: in 3 steps in a row")

    assert SignalWatch(run, has_signal=False).finish() == []  # a run that was done before it began
