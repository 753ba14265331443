"""Shaping of rewards against numbers worked out by hand."""

import itertools
import math

import pytest

from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.shaping import (
    boundary_factor,
    is_correct,
    overlong,
    shaped,
    tempsamp_r1,
    window,
    with_length_part,
)
from vcr1_fast.tasks.temporal_grounding import TemporalGrounding
from vcr1_fast.types import Example, IntervalTruth


def test_tempsamp_by_hand():
    # ln 1.2 = 0.1823216; (e^0.8 - 1) / (e - 1) = 1.2255409 / 1.7182818 = 0.7132362; e^0.3 - 1 = 0.3498588
    assert tempsamp_r1(1.0) == pytest.approx(0.801823216, abs=1e-9)
    assert tempsamp_r1(0.8) == 0.8
    assert tempsamp_r1(0.0) == pytest.approx(0.0867638, abs=1e-7)
    assert tempsamp_r1(0.5) == pytest.approx(0.8 - 0.3498588 / 1.7182818, abs=1e-7)


def test_tempsamp_rises_and_stays_in_range():
    values = [tempsamp_r1(i / 1000) for i in range(1001)]
    assert all(low < high for low, high in itertools.pairwise(values))
    assert values[0] > 0 and values[-1] < 1
    # no jump at tau: one step of 0.001 below it costs 0.001 / (e - 1) = 0.000582
    assert values[800] - values[799] == pytest.approx(math.expm1(0.001) / math.expm1(1.0))


def test_boundary_factor_by_hand():
    assert boundary_factor((4.0, 10.0), ((2.0, 6.0),), 20.0) == pytest.approx(0.9 * 0.8)
    assert boundary_factor((2.0, 6.0), ((2.0, 6.0),), 20.0) == 1.0
    # of several true intervals the outermost ends count: |3 - 2| and |9 - 10| of 20
    assert boundary_factor((3.0, 9.0), ((8.0, 10.0), (2.0, 4.0)), 20.0) == pytest.approx(0.95 * 0.95)
    assert boundary_factor((90.0, 95.0), ((2.0, 6.0),), 20.0) == 0.0  # both factors are below 0, their product is not


def test_boundary_iou_is_the_reward_and_never_the_score():
    task = TemporalGrounding(TaskConfig(iou="boundary"))
    example = Example("e", "temporal_grounding", "/v.mp4", "A door opens.", 20.0, IntervalTruth(((2.0, 6.0),)))
    answers = [f"<think>t</think><answer>{text}</answer>" for text in ("4 to 10", "2 to 6", "6 to 2", "none")]
    # IoU 2 / 8, times 0.9 x 0.8
    assert task.score([example] * 4, answers)["iou"] == [pytest.approx(0.25 * 0.72), 1.0, 0.0, 0.0]
    assert task.metrics([example] * 4, answers)["miou"] == pytest.approx(1.25 / 4)
    assert TemporalGrounding(TaskConfig()).score([example], answers[:1])["iou"] == [0.25]


def test_shaping_touches_only_the_named_part():
    parts = {"format": (1.0, 0.0), "iou": (0.8, 1.0)}
    assert shaped(parts, {"iou": "tempsamp_r1", "accuracy": "tempsamp_r1"}) == {
        "format": (1.0, 0.0),
        "iou": [0.8, 0.8 + 0.01 * math.log(1.2)],
    }
    assert shaped(parts, {}) == parts


def test_window_by_hand():
    correct = [True, True, True, True, False]
    assert window(correct, [319, 320, 512, 513, 400], 320, 512) == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_window_needs_two_correct_answers_in_the_group():
    assert window([True, False, False], [400, 400, 400], 320, 512) == [0.0, 0.0, 0.0]
    assert window([True, False, True], [400, 400, 9], 320, 512) == [1.0, 0.0, 0.0]  # the other one need not be inside


def test_correct_means_every_part_but_the_format():
    parts = {"format": (0.0, 1.0, 1.0), "iou": (0.11, 0.5, 0.1), "accuracy": (1.0, 0.0, 1.0)}
    assert is_correct(parts) == [True, False, False]
    assert is_correct({"format": (0.0, 1.0)}) == [True, True]  # nothing else to be wrong about


@pytest.mark.parametrize(
    ("num_tokens", "part"), [(0, 1.0), (80, 1.0), (81, 0.95), (90, 0.5), (99, 0.05), (100, 0.0), (1000, 0.0)]
)
def test_overlong_by_hand(num_tokens, part):
    # L_max 100, L_cache 20: no punishment up to 80 tokens, then 1/20 for each
    assert overlong(num_tokens, 80, 100) == pytest.approx(part)


def test_the_length_part_is_what_the_settings_say():
    parts = {"format": (1.0, 1.0, 1.0), "iou": (1.0, 0.0, 0.2)}
    assert with_length_part(parts, [5, 5, 7], TaskConfig()) == parts
    in_window = TaskConfig(length_reward="window", length_tokens=(4, 6))
    assert with_length_part(parts, [5, 5, 7], in_window)["length"] == [1.0, 0.0, 0.0]
    short = TaskConfig(length_reward="overlong", length_tokens=(4, 6))
    assert with_length_part(parts, [4, 5, 6], short)["length"] == [1.0, 0.5, 0.0]


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match=r"task.shaping.iuo: no task has this part, did you mean 'iou'"):
        make_tasks(TaskConfig(shaping={"iuo": "tempsamp_r1"}))
    with pytest.raises(ConfigError, match=r"task.reward_weights.length: no task has this part"):
        make_tasks(TaskConfig(reward_weights={"length": 0.2}))
    assert make_tasks(TaskConfig(reward_weights={"length": 0.2}, length_reward="window"))
    with pytest.raises(ConfigError, match=r"task.length_tokens is \(6, 6\), wanted 0 <= first < second"):
        TaskConfig(length_tokens=(6, 6))
