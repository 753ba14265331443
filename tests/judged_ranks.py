"""Run by test_evaluate on each of two ranks: scores of captions by the judge at argv[1], and a task that raises."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from tests.conftest import build_tokenizer, make_patches
from tests.rollout.scripted_engine import ScriptedEngine
from vcr1_fast.evaluate import evaluate
from vcr1_fast.learner.sharding import exit_rank, init_distributed, shutdown
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.settings.config import Config, JudgeConfig, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import CaptionTruth, Example

DOG, CAT, BIRD = "A dog runs away.", "A cat sits down.", "A bird flies off."


def main() -> None:
    world = init_distributed("cpu")
    tokenizer = build_tokenizer()
    tasks = make_tasks(TaskConfig(), ["captioning"], judge=JudgeConfig(url=sys.argv[1], cache=None))
    builder = PromptBuilder(tokenizer, tasks, lambda _: make_patches((1, 4, 4)))
    examples = [
        Example(name, "captioning", f"{name}.mp4", "", 8.0, CaptionTruth(events))
        for name, events in (("a", (DOG, CAT)), ("b", (DOG, BIRD)))
    ]
    said = {"a": f"{DOG} {CAT}", "b": f"{CAT} {DOG}"}  # recall 1 and 0.5, precision 1 and 0.5
    engine = ScriptedEngine(tokenizer, {name: [f"<think></think><answer>{said[name]}</answer>"] for name in said})
    scores = evaluate(engine, examples, builder, tasks, Config(), world)

    def raises(*_: object) -> dict[str, float]:
        raise KeyError("no such thing")

    tasks["captioning"].metrics = raises  # type: ignore[method-assign]
    without = evaluate(engine, examples, builder, tasks, Config(), world)
    result = {"scores": {task: asdict(score) for task, score in scores.items()}, "without": [*without]}
    Path(f"{sys.argv[2]}.{world.rank}").write_text(json.dumps(result))
    shutdown(world)
    exit_rank(0)


main()
