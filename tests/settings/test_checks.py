"""Each contradiction stops the commands that use those settings, and no other one."""

import dataclasses
from typing import Any, get_args

import pytest

from vcr1_fast.settings.checks import RunCommand, check_settings
from vcr1_fast.settings.config import Config, ConfigError

TRAIN, LEARNS, ALL = {"train"}, {"train", "sft"}, {"train", "sft", "eval"}
HELD_OUT = {"data.eval": ("e.jsonl",)}
SGLANG = HELD_OUT | {"rollout.engine": "sglang"}
FAR = SGLANG | {"rollout.sglang.placement": "disaggregated", "rollout.sglang.addresses": ("a:1",)}
CONTRADICTIONS: list[tuple[dict[str, Any], str, set[str]]] = [
    ({"train.prompts_per_step": 6, "algorithm.minibatches_per_rollout": 4}, "make the first a multiple", TRAIN),
    ({"algorithm.sampling_cap": 2.0}, r"neither without algorithm\.sampling_correction", TRAIN),
    ({"algorithm.sampling_correction": "token_mask"}, "at least one of them", TRAIN),
    (
        {
            "algorithm.sampling_correction": "token_mask",
            "algorithm.sampling_floor": 3.0,
            "algorithm.sampling_cap": 2.0,
        },
        "0 <= floor < cap",
        TRAIN,
    ),
    ({"algorithm.sampling_correction": "token_mask", "algorithm.sampling_floor": -0.5}, "0 <= floor < cap", TRAIN),
    ({"algorithm.loss": "cispo", "algorithm.dual_clip": 3.0}, "a loss that clips", TRAIN),
    ({"algorithm.dual_clip": 1.0}, "wanted > 1", TRAIN),
    ({"rollout.max_batch_rows": 4}, r"max_batch_rows is 4, less than rollout\.group_size 8", TRAIN),
    ({"rollout.group_size": 1}, "alone its advantage, and so its gradient, is 0", TRAIN),
    ({"rollout.interrupt": True}, r"interrupt is true and rollout\.max_policy_lag is 0", TRAIN),
    ({"data.rewards": "r.jsonl"}, r"data\.reward_range and data\.rewards go together", LEARNS),
    ({"data.reward_range": (0.0, 1.0)}, r"data\.reward_range and data\.rewards go together", LEARNS),
    ({"optimizer.vision_learning_rate": 1e-7, "model.freeze_vision": True}, "the vision tower is frozen", LEARNS),
    (SGLANG | {"rollout.sglang.placement": "disaggregated"}, "addresses is empty", ALL),
    (SGLANG | {"rollout.sglang.addresses": ("a:1",)}, "placement is colocated", ALL),
    (FAR | {"rollout.sglang.weights": "cuda_ipc"}, "cuda_ipc and rollout.sglang.placement is disaggregated", ALL),
    (FAR | {"rollout.sglang.release_memory": True}, "share no GPU with the learner", TRAIN),
    (SGLANG | {"rollout.sglang.release_memory": True, "rollout.max_policy_lag": 1}, "no memory left to draw", TRAIN),
]


def changed(settings: Any, changes: dict[str, Any]) -> Any:
    """The settings with dotted keys replaced, section by section."""
    sections: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for key, value in changes.items():
        head, dot, rest = key.partition(".")
        if dot:
            sections.setdefault(head, {})[rest] = value
        else:
            values[head] = value
    values |= {name: changed(getattr(settings, name), inner) for name, inner in sections.items()}
    return dataclasses.replace(settings, **values)


SEVEN = {"train.prompts_per_step": 7, "sft.examples_per_step": 7}
RANKS = [
    # 64 ranks share 64 prompts; the 16 examples of a supervised step are not their concern
    ({"train.prompts_per_step": 64}, r"sft\.examples_per_step is 16, but there are 64 ranks", {"sft"}, 64),
    ({"sft.examples_per_step": 64}, r"train\.prompts_per_step is 8, but there are 64 ranks", {"train"}, 64),
    ({"algorithm.minibatches_per_rollout": 2}, "make it a multiple of 16", {"train"}, 8),
    (SEVEN | {"train.replicate": 2}, r"train\.replicate is 2, but there are 7 ranks", LEARNS, 7),
    (FAR, "names 1 workers, but there are 2 ranks", ALL, 2),
]


@pytest.mark.parametrize(
    ("changes", "message", "refusing", "num_ranks"),
    [*((*contradiction, 1) for contradiction in CONTRADICTIONS), *RANKS],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value)[:60],
)
def test_a_contradiction_stops_the_commands_that_use_its_settings(changes, message, refusing, num_ranks):
    config = changed(Config(), changes)
    for command in get_args(RunCommand):
        if command in refusing:
            with pytest.raises(ConfigError, match=message):
                check_settings(config, command, num_ranks)
        else:
            check_settings(config, command, num_ranks)


def test_settings_of_an_engine_that_is_not_opened_are_free():
    """Those of SGLang beside the local engine, and of any engine where a cold start scores nothing."""
    wrong = {"rollout.sglang.placement": "disaggregated"}
    for command in get_args(RunCommand):
        check_settings(changed(Config(), wrong), command, 8)
    check_settings(changed(Config(), wrong | {"rollout.engine": "sglang"}), "sft", 8)
    # rows decoded together are the local engine's
    check_settings(changed(Config(), {"rollout.engine": "sglang", "rollout.max_batch_rows": 4}), "train")


def test_settings_that_fit_each_other_pass():
    check_settings(changed(Config(), FAR | {"rollout.sglang.weights": "broadcast"}), "eval")
    check_settings(changed(Config(), {"train.replicate": 2}), "train", 8)
    fits = {"algorithm.sampling_correction": "token_mask", "algorithm.sampling_cap": 2.0, "algorithm.dual_clip": 3.0}
    check_settings(changed(Config(), fits | {"rollout.interrupt": True, "rollout.max_policy_lag": 1}), "train")
