"""Mixing tasks by weight: exact shares, exact epochs, a function of the position alone."""

from collections import Counter

import pytest

from vcr1_fast.prompts.mixture import BySize, ByWeight, block_counts, make_order
from vcr1_fast.settings.config import ConfigError, DataConfig
from vcr1_fast.types import Example, IntervalTruth

TASKS = ["a"] * 7 + ["b"] * 30 + ["c"] * 3
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0}  # 25, 25 and 50 of 100


def make_examples() -> list[Example]:
    truth = IntervalTruth(((1.0, 2.0),))
    return [Example(str(i), task, f"{i}.mp4", "q", 8.0, truth) for i, task in enumerate(TASKS)]


def test_block_counts_by_hand():
    assert block_counts({"x": 3.0, "y": 1.0}) == {"x": 75, "y": 25}
    # 33.33 each: one position is left, and of equal fractions the first by name gets it
    assert block_counts({"z": 0.1, "x": 0.1, "y": 0.1}) == {"x": 34, "y": 33, "z": 33}
    # 57.14, 28.57, 14.29: the two largest fractions, .57 and .29, belong to y and z; one position is left
    assert block_counts({"x": 4.0, "y": 2.0, "z": 1.0}) == {"x": 57, "y": 29, "z": 14}
    assert block_counts({"x": 1.0, "y": 0.0}) == {"x": 100}


def test_every_block_of_100_has_the_exact_shares():
    order = ByWeight(TASKS, WEIGHTS, seed=3)
    for block in range(5):
        got = Counter(TASKS[i] for i in order.indices(100 * block, 100))
        assert got == {"a": 25, "b": 25, "c": 50}
    assert order.indices(0, 100) != order.indices(100, 100)


def test_each_example_of_a_task_comes_once_an_epoch():
    order = ByWeight(TASKS, WEIGHTS, seed=0)
    stream = order.indices(0, 1000)
    for task, size in Counter(TASKS).items():
        own = [i for i in stream if TASKS[i] == task]
        members = [i for i, name in enumerate(TASKS) if name == task]
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) >= 8
        assert all(sorted(epoch) == members for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1  # not one permutation again and again


@pytest.mark.parametrize("order", [ByWeight(TASKS, WEIGHTS, seed=5), BySize(TASKS, seed=5)])
def test_the_position_is_the_only_state(order):
    whole = order.indices(0, 450)
    # pieces that begin and end inside blocks and epochs, asked for out of order
    for start, count in ((333, 117), (0, 1), (99, 2), (100, 100), (7, 250), (450, 0)):
        assert order.indices(start, count) == whole[start : start + count]


def test_the_seed_and_the_task_change_the_order():
    assert ByWeight(TASKS, WEIGHTS, seed=1).indices(0, 100) != ByWeight(TASKS, WEIGHTS, seed=2).indices(0, 100)
    order = ByWeight(["a", "b"] * 50, {"a": 1.0, "b": 1.0}, seed=0)
    stream = order.indices(0, 100)
    ranks = {task: [i // 2 for i in stream if i % 2 == offset] for offset, task in enumerate("ab")}
    assert sorted(ranks["a"]) == sorted(ranks["b"])
    assert ranks["a"] != ranks["b"]


def test_epochs_of_each_task_by_hand():
    order = ByWeight(TASKS, WEIGHTS, seed=0)
    assert order.epochs(0) == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert order.epochs(200) == {"a": 50 / 7, "b": 50 / 30, "c": 100 / 3}
    by_size = BySize(TASKS, seed=0)
    assert by_size.epochs(80) == {"a": 2.0, "b": 2.0, "c": 2.0}
    first = Counter(TASKS[i] for i in by_size.indices(40, 10))
    assert by_size.epochs(50) == {"a": 1 + first["a"] / 7, "b": 1 + first["b"] / 30, "c": 1 + first["c"] / 3}


def test_a_task_of_weight_0_is_left_out():
    order = make_order(make_examples(), {"a": 1.0, "b": 0.0, "c": 1.0}, seed=0)
    assert {TASKS[i] for i in order.indices(0, 300)} == {"a", "c"}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0},
         r"names 'd', but data.train has no example of it; there is: a \(7 examples\), b \(30 examples\), c \(3 ex"),
        ({"a": 1.0, "b": 1.0}, "has no weight for c: give it one, 0 leaves it out"),
        ({"a": 1.0, "b": 400.0, "c": 1.0}, r"data.mixture.a is 1.0, less than one in 100 of all weights together, 402"),
    ],
)  # fmt: skip
def test_wrong_weights_are_named(weights, message):
    with pytest.raises(ConfigError, match=message):
        make_order(make_examples(), weights, seed=0)


@pytest.mark.parametrize("mixture", [{"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}, {"a": 0.0}])
def test_settings_refuse_weights_that_are_none(mixture):
    with pytest.raises(ConfigError, match=r"data\.mixture"):
        DataConfig(mixture=mixture)
