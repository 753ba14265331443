"""Run by test_collect on each of two ranks: dynamic sampling where the ranks lack different numbers of groups."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import build_tokenizer, make_example, make_patches
from tests.rollout.collecting import collected
from tests.rollout.scripted_engine import ScriptedEngine
from vcr1_fast.learner.sharding import exit_rank, init_distributed, shutdown
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.collect import Collector, RewardsFailedError
from vcr1_fast.settings.config import Config, RolloutConfig, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Example, Prompt, SamplingParams

RIGHT, WRONG = (f"<think>x</think><answer>{answer}</answer>" for answer in ("1.00 to 2.00", "none"))
START = (["flat-0", "flat-1", "flat-2", "good-0"], ["good-0", "good-1", "good-2", "good-3"])
FURTHER = [  # of each rank: the share of each of the two rounds
    (["round1-0", "round1-flat"], ["round2-0", "round2-1"]),
    (["round1-flat", "round1-flat"], ["round2-0", "round2-1"]),
]


def main() -> None:
    world = init_distributed("cpu")
    tokenizer, tasks = build_tokenizer(), make_tasks(TaskConfig())
    builder = PromptBuilder(tokenizer, tasks, lambda _: make_patches((1, 4, 4)))
    names = [*START[world.rank], *(name for share in FURTHER[world.rank] for name in share)]
    scripts = {name: [RIGHT, RIGHT if "flat" in name else WRONG] for name in names}
    asked: list[int] = []

    def prompts_of(names: list[str]) -> list[Prompt]:
        return [builder.build(make_example(name, task="temporal_grounding")) for name in names]

    def next_prompts(count: int) -> list[Prompt]:
        asked.append(count)
        return prompts_of(FURTHER[world.rank][len(asked) - 1])

    collector = Collector(
        tasks,
        Config(rollout=RolloutConfig(group_size=2, max_resample_rounds=4)),
        world,
        builder.completion_ids,
    )
    engine = ScriptedEngine(tokenizer, scripts)
    groups = collected(collector, engine, prompts_of(START[world.rank]), SamplingParams(2, 200), next_prompts)
    real, broken = tasks["temporal_grounding"].score, {"good-3"}

    def fragile(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        if broken & {example.id for example in examples}:
            raise ConnectionError("the judge is down")
        return real(examples, answers)

    tasks["temporal_grounding"].score = fragile  # type: ignore[method-assign]
    config = Config(rollout=RolloutConfig(group_size=2), task=TaskConfig(max_failed_steps=1))
    failing = Collector(tasks, config, world, builder.completion_ids)
    start = prompts_of(START[world.rank])
    scored = collected(failing, engine, start, SamplingParams(2, 200), next_prompts)
    failed = failing.failed_ids
    broken |= {*START[0], *START[1]}
    error = ""
    try:
        collected(failing, engine, start, SamplingParams(2, 200), next_prompts)
    except RewardsFailedError as caught:
        error = str(caught)
    ids = [group.prompt.example.id for group in scored]
    result = {"failed": failed, "scored": ids, "error": error}
    result |= {"asked": asked, "kept": [g.prompt.example.id for g in groups], "metrics": collector.metrics()}
    Path(f"{sys.argv[1]}.{world.rank}").write_text(json.dumps(result))
    shutdown(world)
    exit_rank(0)


main()
