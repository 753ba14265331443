"""Which settings must fit each other, for the command that is run: what it does not use cannot stop it.

What a setting may be by itself is checked by its section, when it is made. Called before anything slow, and once more
when the number of ranks is known. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from vcr1_fast.settings.config import Config
from vcr1_fast.settings.error import require
from vcr1_fast.settings.learning import AlgorithmConfig, RolloutConfig, SGLangConfig

SERVICES = {"wandb": "wandb>=0.18,<1", "trackio": "trackio>=0.40,<1"}  # the extras of pyproject.toml
RunCommand = Literal["train", "sft", "eval"]


def check_settings(config: Config, command: RunCommand, world_size: int = 1) -> None:
    """Raises ConfigError for the first contradiction among the settings that `command` uses on so many ranks."""
    replicate = config.train.replicate
    require(
        command == "eval" or world_size % replicate == 0,
        f"train.replicate is {replicate}, but there are {world_size} ranks: set it to the number of nodes, or to "
        "another divisor of the number of ranks",
    )
    if command == "train":
        _check_share_of_prompts(config, world_size)
        _check_objective(config.algorithm)
        _check_groups(config.rollout)
        require(
            config.checkpoint.keep_best is None or (config.eval.every > 0 and bool(config.data.eval)),
            f"checkpoint.keep_best is {config.checkpoint.keep_best}, but nothing is scored while training: set "
            "data.eval and eval.every",
        )
    if command == "sft":
        per_step = config.sft.examples_per_step
        require(
            per_step % world_size == 0,
            f"sft.examples_per_step is {per_step}, but there are {world_size} ranks: make it a multiple of that",
        )
    if command != "eval":
        _check_writers(config.train.log_to)
        require(
            (config.data.reward_range is None) == (config.data.rewards is None),
            "data.reward_range and data.rewards go together: set both, or none",
        )
    require(
        command == "eval" or config.optimizer.vision_learning_rate is None or not config.model.is_tower_frozen,
        f"optimizer.vision_learning_rate is {config.optimizer.vision_learning_rate}, but the vision tower is frozen: "
        "leave it out, or set model.freeze_vision=false and model.lora.rank=0",
    )
    opens_engine = command != "sft" or bool(config.data.eval)  # sft has one for the held-out score alone
    if config.rollout.engine == "sglang" and opens_engine:
        _check_workers(config.rollout.sglang, world_size)
        if command == "train" and config.rollout.sglang.release_memory:
            _check_lent_memory(config.rollout)


def _check_writers(log_to: Sequence[str]) -> None:
    """What the numbers of a run are to go to has to be installed."""
    for name in log_to:
        require(
            find_spec(name) is not None,
            f"train.log_to names {name}, which is not installed: pip install {SERVICES.get(name, name)!r}, or leave it "
            "out",
        )


def _check_share_of_prompts(config: Config, world_size: int) -> None:
    """Every rank takes the same share of each mini-batch."""
    prompts, minibatches = config.train.prompts_per_step, config.algorithm.minibatches_per_rollout
    require(
        prompts % minibatches == 0,
        f"train.prompts_per_step is {prompts}, but algorithm.minibatches_per_rollout is {minibatches}: "
        "make the first a multiple of the second",
    )
    require(
        prompts % (world_size * minibatches) == 0,
        f"train.prompts_per_step is {prompts}, but there are {world_size} ranks and "
        f"algorithm.minibatches_per_rollout is {minibatches}: make it a multiple of {world_size * minibatches}",
    )


def _check_objective(algorithm: AlgorithmConfig) -> None:
    bounds = (algorithm.sampling_floor, algorithm.sampling_cap)
    if algorithm.sampling_correction == "none":
        is_right, wanted = bounds == (None, None), "neither without algorithm.sampling_correction"
    else:
        floor, cap = algorithm.sampling_floor or 0.0, algorithm.sampling_cap or math.inf
        is_right, wanted = bounds != (None, None) and 0 <= floor < cap, "0 <= floor < cap, and at least one of them"
    require(is_right, f"algorithm.sampling_floor, algorithm.sampling_cap are {bounds}, wanted {wanted}")
    has_clip = algorithm.loss not in ("cispo", "sapo")
    require(
        algorithm.dual_clip is None or (algorithm.dual_clip > 1 and has_clip),
        f"algorithm.dual_clip is {algorithm.dual_clip} with loss {algorithm.loss}, wanted > 1 (a ratio of 1 must not "
        "be cut) and a loss that clips: grpo, dr_grpo, dapo or gspo",
    )


def _check_groups(rollout: RolloutConfig) -> None:
    require(
        rollout.engine != "local" or rollout.max_batch_rows >= rollout.group_size,
        f"rollout.max_batch_rows is {rollout.max_batch_rows}, less than rollout.group_size {rollout.group_size}",
    )
    require(
        rollout.group_size >= 2,
        f"rollout.group_size is {rollout.group_size}, wanted >= 2: an answer is compared with the others of its group, "
        "and alone its advantage, and so its gradient, is 0",
    )
    require(
        not rollout.interrupt or rollout.max_policy_lag > 0,
        "rollout.interrupt is true and rollout.max_policy_lag is 0, where nothing is drawn during an update: set "
        "rollout.max_policy_lag to 1 or more, or leave rollout.interrupt out",
    )


def _check_workers(sglang: SGLangConfig, world_size: int) -> None:
    """Where the workers of an engine are, and how weights reach them."""
    is_remote = sglang.placement == "disaggregated"
    require(
        is_remote == bool(sglang.addresses),
        "rollout.sglang.placement is disaggregated and rollout.sglang.addresses is empty: name the workers that "
        "`vcr1-fast serve` printed"
        if is_remote
        else "rollout.sglang.addresses names workers elsewhere, but rollout.sglang.placement is colocated: set the "
        "latter to disaggregated, or leave the addresses out",
    )
    sglang.check_world_size(world_size)
    require(
        not (is_remote and sglang.weights == "cuda_ipc"),
        "rollout.sglang.weights is cuda_ipc and rollout.sglang.placement is disaggregated, wanted broadcast",
    )


def _check_lent_memory(rollout: RolloutConfig) -> None:
    """What the engine needs while it has given its memory to the learner."""
    require(
        rollout.sglang.placement == "colocated",
        "rollout.sglang.release_memory is true and rollout.sglang.placement is disaggregated, where workers share "
        "no GPU with the learner: leave it out",
    )
    require(
        rollout.max_policy_lag == 0,
        f"rollout.sglang.release_memory is true and rollout.max_policy_lag is {rollout.max_policy_lag}: the engine "
        "has no memory left to draw ahead in while the learner works; set one of them to its default",
    )
