import pytest

from vcr1_fast.run.step_line import StepLines, clock

USUAL = {"completions/clipped_ratio": 0.1, "frac_reward_zero_std": 0.5, "bad_samples": 0.0, "skipped_updates": 0.0}
WELL = {"reward": 0.624, "rewards/t/iou/mean": 0.3, "kl": 0.0, "loss": -0.01, "step_time": 0.55, **USUAL}


def test_a_step_that_is_well_fits_half_a_line():
    line = StepLines().line(12, 150, WELL)
    assert line == "step  12/150 | reward 0.624 | 0.55 s, 1:16 left"


def test_what_is_unusual_stands_beside():
    lines = StepLines()
    odd = {"completions/clipped_ratio": 0.34, "frac_reward_zero_std": 1.0, "bad_samples": 2.0, "skipped_updates": 1.0}
    odd |= {"reward_failures": 3.0, "groups_too_large": 1.0, "engine/restarts": 1.0}
    assert lines.line(1, 9, {**WELL, **odd}).split(" | ")[-1] == (
        "skipped updates 1, reward failures 3, groups too large 1, bad samples 2, engine restarts 1, truncated 34%, "
        "zero-variance 100%"
    )
    again = lines.line(2, 9, {**WELL, "bad_samples": 2.0, "engine/restarts": 1.0})
    assert again == "step 2/9 | reward 0.624 (+0.000) | 0.55 s, 0:04 left"  # counts since the start that did not grow
    assert lines.line(3, 9, {**WELL, "bad_samples": 3.0}).endswith("| bad samples 3")


def test_the_trend_is_of_the_last_ten_steps_and_those_before():
    lines = StepLines()
    values = [*[0.1] * 5, *[0.2] * 10, *[0.5] * 10]  # the first five are forgotten
    said = [lines.line(step, 100, {"reward": value}) for step, value in enumerate(values, start=1)]
    assert said[0] == "step   1/100 | reward 0.100"
    assert said[5] == "step   6/100 | reward 0.200 (+0.033)"  # (0.1 + 0.1 + 0.2) / 3 - 0.1
    assert said[-1] == "step  25/100 | reward 0.500 (+0.300)"


def test_time_left_is_by_the_last_ten_steps():
    lines = StepLines()
    seconds = [100.0, *[2.0] * 9, 4.0]
    said = [lines.line(step, 60, {"step_time": value}) for step, value in enumerate(seconds, start=1)]
    assert said[0] == "step  1/60 | 100.00 s, 1:38:20 left"
    assert said[-1] == "step 11/60 | 4.00 s, 1:48 left"  # 49 steps of 2.2 s
    assert lines.line(60, 60, {"step_time": 1.0}) == "step 60/60 | 1.00 s"


@pytest.mark.parametrize(
    ("record", "wanted"), [({"nll": 2.0, "loss": 1.0}, "nll 2.000"), ({"loss": 1.0}, "loss 1.000"), ({}, "")]
)
def test_the_headline_is_what_is_trained(record: dict[str, float], wanted: str):
    assert StepLines().line(1, 2, record) == " | ".join(filter(None, ["step 1/2", wanted]))


def test_clock():
    assert [clock(seconds) for seconds in (0.4, 59.6, 3599, 3600, 360_000)] == [
        *("0:00", "1:00", "59:59", "1:00:00", "100:00:00")
    ]
