"""More groups than a step needs are drawn; those that are not finished when it has enough go on in the next step.

The longest answer of a step decides when it is drawn, while most places of the engine are empty already. With
`rollout.over_provision` f the first step begins R + E groups on a rank, R = train.prompts_per_step / ranks and E = f R
rounded up; each later one goes on with the E that are left and begins R. A step ends when R groups are finished, among
them all that it went on with: none is older than by one update more than without, and none is lost. Each token keeps
the log-prob of the weights that drew it. The last step begins E fewer, so that nothing is left.

Called by rollout/queue.py in the order of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vcr1_fast.rollout.collect import Collector, Drawn
from vcr1_fast.rollout.drawing import Call, Decode, Drawing
from vcr1_fast.rollout.engine import Quota
from vcr1_fast.types import Prompt, SamplingParams


@dataclass(frozen=True)
class Tail:
    """What a step left for the next one, on this rank."""

    prompts: Sequence[Prompt] = ()
    call: Call = field(default_factory=lambda: Call([], []))  # their answers so far
    places: Sequence[int] = ()  # of the prompts among those that the step began
    num_begun: int = 0  # so many

    def as_tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: all but the prompts, which the stream gives again."""
        where = {"places": torch.tensor(self.places, dtype=torch.int64), "num_begun": torch.tensor([self.num_begun])}
        return self.call.as_tensors() | where

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], begun: Sequence[Prompt], decode: Decode) -> Tail:
        """The inverse. `begun`: the prompts that the step began. Empty where some of them cannot be read any more: the
        places would be those of others."""
        if int(tensors["num_begun"]) != len(begun):
            return cls()
        places: list[int] = tensors["places"].tolist()
        return cls([begun[i] for i in places], Call.of_tensors(tensors, decode), places, len(begun))


class OverProvision:
    """Draws steps. `num_extra`: E, groups that a step leaves for the next one."""

    def __init__(self, collector: Collector) -> None:
        rollout, train, self._world = collector.config.rollout, collector.config.train, collector.world
        self._collector, self._last_step = collector, train.num_steps
        self.num_extra = math.ceil(rollout.over_provision * train.prompts_per_step / self._world.world_size)
        self.tail = Tail()  # of the step drawn last

    def num_begun(self, step: int, *, has_tail: bool) -> int:
        """Prompts over all ranks that a step begins. `has_tail`: others come from the step before."""
        groups = self._collector.config.train.prompts_per_step
        extra = self.num_extra * self._world.world_size
        return groups + (0 if has_tail else extra) - (extra if step >= self._last_step else 0)

    def draw(self, step: int, prompts: Sequence[Prompt], sampling: SamplingParams, drawing: Drawing) -> Drawn:
        """The groups of a step that begins these prompts, with what the step before left."""
        carried = self.tail
        num_left = 0 if step >= self._last_step else self.num_extra
        asked = [*carried.prompts, *prompts]
        if carried.call.answers and not drawing.calls:
            drawing.calls.append(carried.call.with_fresh(len(prompts)))
        if num_left or carried.prompts:
            drawing.quota = Quota(max(len(asked) - num_left, len(carried.prompts)), len(carried.prompts))
        drawn = self._collector.draw(drawing, asked, sampling)
        self.tail = Tail()
        if drawing.quota is None or not drawing.calls:
            return drawn
        call = drawing.calls[0]
        taken = drawing.quota.taken(call.are_done)
        left = [place for place in range(len(asked)) if place not in taken]
        places = [place - len(carried.prompts) for place in left]
        self.tail = Tail([asked[i] for i in left], call.at(left), places, len(prompts))
        version_of = {id(asked[place]): call.policy_versions[place] for place in taken}
        groups = [replace(group, policy_version=version_of[id(group.prompt)]) for group in drawn.groups]
        return replace(drawn, groups=groups)
