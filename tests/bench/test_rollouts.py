"""The simulation of rollouts: rates and shares by hand, what goes on in the next step, and which settings fill it."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from bench import rollouts
from bench.engines import READ, SEVEN, Engine, Group, decode_seconds, draw, fill_seconds
from bench.rollouts import LENGTHS, ROWS, WARM, Case, Way, deal, periods, recorded, shares, simulate
from vcr1_fast.fake_gpu.predict import H100_RATES, rollout_seconds
from vcr1_fast.settings.config import Config
from vcr1_fast.settings.io import load_settings

CONFIGS = Path(__file__).parents[2] / "configs"


def group(*lengths: int, is_carried: bool = False) -> Group:
    return Group(3770, list(lengths), list(lengths), is_carried)


def alone(engine: Engine, *groups: Group, wanted: int) -> list[Group]:
    return draw([engine], [list(groups)], wanted, ROWS)


def test_the_roofline_of_decoding_by_hand():
    # a token reads 28 layers of 233,057,792 weights and the head; one in the cache has 28 x 2 x 512 values of 2 bytes
    assert READ == 28 * 233_057_792 + 152_064 * 3_584 == 7_070_615_552
    assert SEVEN.kv_bytes_per_token == 57_344
    for rows, tokens_per_s in ((8, 1348), (64, 5920), (256, 9299)):
        read_s = (2 * 7_070_615_552 + rows * 4100 * 57_344) / 2.7e12
        assert (
            rows / decode_seconds(rows, rows * 4100)
            == pytest.approx(rows / read_s)
            == pytest.approx(tokens_per_s, abs=1)
        )


def test_one_engine_takes_what_the_formula_says():
    lengths = (300, 330, 360, 390, 420, 450, 480, 512)
    engine = Engine()
    groups = [group(*lengths), group(*lengths)]
    assert alone(engine, *groups, wanted=2) == groups
    assert engine.now == pytest.approx(rollout_seconds(SEVEN, H100_RATES, 3770, lengths, groups=2), rel=1e-3)
    slow = Engine(speed=0.5)
    alone(slow, group(*lengths), group(*lengths), wanted=2)
    assert slow.now == pytest.approx(2 * engine.now)


def test_shares_by_hand():
    # 2 steps of 2 rows, 1 of one row: 5 of 6 slots draw a token; the other engine ends with its prompt and one token
    engines = [Engine(), Engine()]
    done = [draw([engines[0]], [[group(3, 2)]], 1, 2)[0], draw([engines[1]], [[group(1)]], 1, 2)[0]]
    case = Case("reasoning", 1, 2, max_rows=2)
    found = shares(case, 0.0, [(engines[:1], done[:1])])
    first_s, last_s = (decode_seconds(rows, rows * context) for rows, context in ((2, 3771.5), (1, 3773)))
    context = (2 * 3771 + 2 * 3772 + 3773) / 5
    full = 2 / decode_seconds(2, 2 * context)
    assert (found["slots"], found["full"]) == (round(5 / 6, 4), round(full, 1))
    assert found["of_full"] == pytest.approx(5 / (2 * first_s + last_s) / full, abs=1e-4)
    both = shares(case, 0.0, [(engines, done)])
    longest_s = engines[0].now
    assert both["waiting"] == pytest.approx((longest_s - engines[1].now) / (2 * longest_s), abs=1e-4)
    assert both["prompts"] == pytest.approx(engines[0].fill_s / longest_s, abs=1e-4)
    assert both["drawn_per_s"] == pytest.approx(6 / longest_s / 2, abs=0.1)


def test_a_step_ends_with_enough_groups_and_the_others_keep_what_they_have():
    long, short, carried = group(900, 10), group(20, 20), group(40, 30, is_carried=True)
    assert alone(Engine(), carried, long, short, wanted=2) == [carried, short]
    assert long.left == [860, 0]  # it was begun together with the carried one, whose end was waited for
    assert alone(Engine(), long, wanted=1) == [long] and long.is_done


def test_rows_bound_what_is_begun():
    few, many = Engine(), Engine()
    alone(few, *(group(*[50] * 8) for _ in range(ROWS // 8)), wanted=ROWS // 8)
    alone(many, *(group(*[50] * 8) for _ in range(ROWS // 8 + 1)), wanted=ROWS // 8 + 1)
    assert (few.num_steps, many.num_steps) == (50, 100)


def test_one_queue_gains_nothing_where_all_groups_fit_and_something_beside_a_slow_engine():
    def longest(case: Case, dealt: str) -> float:
        [(engines, _)] = simulate(case, Way(dealt), 1, seed=3)
        return max(engine.now for engine in engines)

    assert longest(Case("reasoning", 1), "own") == longest(Case("reasoning", 1), "queue")
    slow = Case("long", 3, slowest=0.5)
    assert longest(slow, "queue") < longest(slow, "own")


def test_one_end_does_not_wait_for_the_engine_that_is_behind():
    held = [[group(10), group(10), group(900)], [group(10), group(600), group(800)]]
    own = [Engine(), Engine()]
    for engine, groups in zip(own, [[group(*g.lengths) for g in groups] for groups in held], strict=True):
        alone(engine, *groups, wanted=2)
    together = [Engine(), Engine()]
    done = draw(together, held, 3, ROWS)
    assert [g.lengths for g in done] == [[10], [10], [10]]
    assert max(engine.num_steps for engine in own) == 600 and max(engine.num_steps for engine in together) == 10
    fresh = [group(5), group(6), group(7), group(8)]
    left = [[g for g in groups if not g.is_done] for groups in held]
    deal(left, fresh, is_even=True)  # 1 and 2 answers are left, and each group counts as 8
    assert [len(groups) for groups in left] == [3, 4]
    assert left[0][1:] == [fresh[0], fresh[2]]


@pytest.mark.parametrize("dealt", ["own", "queue", "one end", "evened"])
def test_each_step_learns_from_as_many_groups(dealt):
    steps = simulate(Case("long", 2, gpus=4), Way(dealt, 0.25), 4, seed=1)
    assert [len(done) for _, done in steps] == [8, 8, 8, 8]
    assert all(not any(g.left) for _, done in steps for g in done)
    taken = [id(g) for _, done in steps for g in done]
    assert len(set(taken)) == len(taken)


def test_lags_by_hand():
    seconds, update_s = np.array([[4.0, 1.0], [1.0, 4.0], [2.0, 2.0]]), np.array([1.0, 1.0, 1.0])
    assert periods(seconds, update_s, has_lag=False).tolist() == [5.0, 5.0]
    # the second engine has 3 s for its next 4: 1 is left, and the first's 1; then nobody waits
    assert periods(seconds, update_s, has_lag=True).tolist() == [5.0, 2.0]


def test_a_prompt_is_read_once_whatever_of_its_answers_goes_on():
    """7B: 28 layers of 233,057,792 weights, 28 x 28 heads of 128, 2 FLOP for a product; 100 tokens of each of 8."""
    fresh, begun = fill_seconds(3770, [0] * 8), fill_seconds(3770, [100] * 8)
    pairs = 8 * 100 * (3770 + 50.5)
    attention_s = H100_RATES.attention_seconds(round(4 * 28 * 3584 * pairs), is_backward=False, version="fa3")
    assert fresh == fill_seconds(3770, [])
    assert begun - fresh == pytest.approx(2 * 800 * 28 * 233_057_792 / H100_RATES.gemm_flop_s + attention_s, rel=1e-3)


@pytest.mark.parametrize("gpus", [8, 64])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_64_groups_on_a_gpu_and_a_quarter_more_fill_its_slots(lengths, gpus):
    """On 8 GPUs train.prompts_per_step 512 and rollout.over_provision 0.25."""
    case, steps = Case(lengths, 64, gpus), WARM + 24 // gpus + 1
    found = {extra: shares(case, extra, simulate(case, Way("own", extra), steps, 0)[WARM:]) for extra in (0.0, 0.25)}
    assert found[0.25]["slots"] >= 0.85 and found[0.25]["of_full"] >= 0.8
    assert found[0.0]["slots"] < 0.85 and found[0.0]["of_full"] >= 0.8  # without, only the speed is reached


@pytest.mark.parametrize("name", ["grounding_throughput_8xh100", "grounding_throughput_2x8xh100"])
def test_the_table_has_the_groups_of_the_throughput_configs(name):
    config = load_settings(Config, str(CONFIGS / f"qwen2_5_vl_7b_{name}.yaml"), [])
    num_gpus = 16 if "2x8" in name else 8
    assert config.rollout.group_size == rollouts.GROUP
    used = Case("reasoning", config.train.prompts_per_step // num_gpus)
    assert used in rollouts.cases()


def test_lengths_say_where_they_are_from():
    means = {name: float(np.mean(recorded(name))) for name in LENGTHS}
    assert means == pytest.approx({"form": 149, "service": 219, "reasoning": 149, "long": 1000}, abs=1)
    assert all(len(answers) == rollouts.GROUP for name in LENGTHS for answers in recorded(name))


def test_every_case_has_every_way(monkeypatch, capsys):
    monkeypatch.setattr(rollouts, "cases", lambda: [Case("reasoning", 1, gpus=2)])
    parser = argparse.ArgumentParser()
    rollouts.add_arguments(parser)
    result = rollouts.run(parser.parse_args(["--steps", "2"]))
    assert [row["way"] for row in result["rows"]] == list(rollouts.WAYS)
    assert result["cases"][0].keys() == rollouts.COLUMNS.keys() and None not in result["cases"][0].values()
    assert "PREDICTED, none was measured" in capsys.readouterr().out
