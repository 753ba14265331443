"""The simulation of rollouts: one engine beside the closed formula, what goes on in the next step, and lags by hand."""

import argparse

import numpy as np
import pytest

from bench import rollouts
from bench.rollouts import SEVEN, Case, Engine, Group, draw, periods, simulate
from vcr1_fast.fake_gpu.predict import H100_RATES, rollout_seconds


def group(*lengths: int, is_carried: bool = False) -> Group:
    return Group(3770, np.array(lengths), np.zeros(len(lengths), int), is_carried)


def test_one_engine_takes_what_the_formula_says():
    lengths = (300, 330, 360, 390, 420, 450, 480, 512)
    engine = Engine()
    done, left = draw([engine], [group(*lengths), group(*lengths)], 2)
    assert len(done) == 2 and left == []
    assert engine.now == pytest.approx(rollout_seconds(SEVEN, H100_RATES, 3770, lengths, groups=2), rel=2e-3)
    slow = Engine(speed=0.5)
    draw([slow], [group(*lengths), group(*lengths)], 2)
    assert slow.now == pytest.approx(2 * engine.now)


def test_a_step_ends_with_enough_groups_and_the_others_keep_what_they_have():
    long, short, carried = group(900, 10), group(20, 20), group(40, 30, is_carried=True)
    engine = Engine()
    done, left = draw([engine], [carried, long, short], 2)
    assert done == [carried, short] and left == [long]
    assert long.drawn.tolist() == [40, 10]  # it was begun together with the carried one, whose end was waited for
    again, rest = draw([Engine()], left, 1)
    assert again == [long] and rest == [] and long.drawn.tolist() == [900, 10]


def test_rows_bound_what_is_begun():
    groups = [group(*[50] * 8) for _ in range(rollouts.ROWS // 8 + 1)]
    few, many = Engine(), Engine()
    draw([few], groups[:-1], len(groups) - 1)
    draw([many], [group(*[50] * 8) for _ in groups], len(groups))
    assert many.now > few.now + 50 * 2 * SEVEN.layers * SEVEN.layer_params / H100_RATES.memory_bytes_s


def test_one_queue_gains_nothing_where_all_groups_fit_and_something_beside_a_slow_engine():
    own, one = (simulate(Case("", 1, "short"), is_shared, 0.0, 2, seed=3)[0] for is_shared in (False, True))
    assert np.array_equal(own, one)
    case = Case("", 3, "long", slowest=0.5)
    slow = [simulate(case, is_shared, 0.0, 2, seed=3)[0].max() for is_shared in (False, True)]
    assert slow[1] < slow[0]


@pytest.mark.parametrize("is_shared", [False, True])
def test_each_step_learns_from_as_many_groups(is_shared):
    _, tokens = simulate(Case("", 2, "long"), is_shared, 0.2, 4, seed=1)
    assert (tokens[:, 1] - tokens[:, 0] == 16 * (rollouts.PROMPT - rollouts.GROUP)).all()


def test_lags_by_hand():
    seconds, update_s = np.array([[4.0, 1.0], [1.0, 4.0], [2.0, 2.0]]), np.array([1.0, 1.0, 1.0])
    assert periods(seconds, update_s, has_lag=False).tolist() == [5.0, 5.0]
    # the second engine has 3 s for its next 4: 1 is left, and the first's 1; then nobody waits
    assert periods(seconds, update_s, has_lag=True).tolist() == [5.0, 2.0]


def test_every_case_has_every_way(monkeypatch, capsys):
    monkeypatch.setattr(rollouts, "CASES", rollouts.CASES[:1])
    parser = argparse.ArgumentParser()
    rollouts.add_arguments(parser)
    result = rollouts.run(parser.parse_args(["--steps", "2"]))
    assert result["rows"][0]["way"] == rollouts.AS_IT_IS and len(result["rows"]) == 8
    assert set(rollouts.GAINS) <= set(result["gains"][0])
    assert "PREDICTED, none was measured" in capsys.readouterr().out
