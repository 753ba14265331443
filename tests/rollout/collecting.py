"""A step's groups as the queue of rollouts gets them without a lag."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vcr1_fast.rollout.collect import Answering, Collector
from vcr1_fast.types import Prompt, RolloutGroup, SamplingParams


def collected(
    collector: Collector,
    engine: Answering,
    prompts: list[Prompt],
    sampling: SamplingParams,
    next_prompts: Callable[[int], list[Prompt]],
) -> list[RolloutGroup]:
    draw = partial(collector.draw, engine)
    return collector.complete(draw(prompts, sampling), sampling, next_prompts, draw)
