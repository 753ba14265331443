"""A prompt in which the time of each pair of frames is written before it."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from tests.conftest import make_example, make_patches
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Prompt


def timed_prompt(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    patches = replace(make_patches((3, 4, 4), 1.0, 4), pair_times_s=(0.5, 1.5, 2.5))
    tasks = make_tasks(TaskConfig(), ["temporal_grounding"])
    builder = PromptBuilder(tokenizer, tasks, lambda _: patches, writes_times=True)
    return builder.build(make_example("timed", task="temporal_grounding"))
