"""`vcr1-fast predict`: rows without labels -> one line with the answer of each. An interrupted one goes on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vcr1_fast.evaluate import answer_all, open_store, with_refusals
from vcr1_fast.evaluation.samples import Answer, write_lines
from vcr1_fast.learner.sharding import on_main_rank
from vcr1_fast.prompts.dataset import AnnotationSource, read_annotation_files
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.run.exit_codes import FAILED
from vcr1_fast.run.named_model import named_model
from vcr1_fast.run.run import Run, open_run
from vcr1_fast.run.telemetry import say
from vcr1_fast.run.terminal import print_problems
from vcr1_fast.settings.config import Config, TaskConfig
from vcr1_fast.settings.io import UsageError, load_settings, read_overrides
from vcr1_fast.tasks.task import Task
from vcr1_fast.tasks.unlabelled import read_answer, unlabelled
from vcr1_fast.types import Example


def predict_command(rows: str, output: str, settings: str | None, overrides: list[str]) -> dict[str, Any]:
    """Write {"id", "answer", "parsed"} for each row to `output`, with "failure" where there is no answer; a row that
    cannot be used is named by file and place, such as "rows:4".

    settings: a config; None: that of the run that made model.path, where it is known. Answers are kept in
    eval.output_dir, by default OUTPUT.answers, until they are all there and after that.
    Raises UsageError, ConfigError, or OSError when something cannot be written.
    """
    file = Path(output).expanduser().absolute()
    if not file.parent.is_dir():
        raise UsageError(f"--output is {output}, but {file.parent} does not exist: make that folder")
    model = named_model(dict(read_overrides(overrides)).get("model.path") or _path_in(settings))
    config = load_settings(Config, settings or model.settings, [*overrides, f"--model.path={model.path}"])
    config = replace(model.put_into(config), video=config.eval_video)
    if config.eval.output_dir is None:
        config = replace(config, eval=replace(config.eval, output_dir=f"{file}.answers"))
    with open_run(config, "eval") as run:
        examples = _examples(rows, run)
        answers = _answers(run, examples)
        lines = [_line(*pair, config.task) for pair in zip(examples, answers, strict=True)]
        on_main_rank("writing the answers", lambda: write_lines(file, lines), run.world)
        num_failed = sum(bool(answer.failure) for answer in answers)
        result: dict[str, Any] = {"output": str(file), "n": len(lines), "num_failed": num_failed}
        result |= {"model": run.config.model.path}
        return result | ({"exit_code": FAILED} if num_failed == len(lines) else {})  # not one answer


def _path_in(settings: str | None) -> str:
    return load_settings(Config, settings, []).model.path


def _examples(rows: str, run: Run) -> list[Example]:
    """Those of the file in its order, unusable rows of a known task included, as an evaluation counts them."""
    tasks: Mapping[str, Task] = {name: unlabelled(task, run.config.task) for name, task in run.tasks.items()}
    source = AnnotationSource(rows, run.config.data.video_root, "rows")
    [content] = read_annotation_files([source], tasks, run.config.task.recipe)
    if run.world.is_main:
        print_problems(content.errors, "bad row: ")
    say(str(content.summary))
    return [replace(row, is_held_out=True) for row in content.rows]


def _answers(run: Run, examples: list[Example]) -> list[Answer]:
    with contextlib.closing(open_store(run)) as store, contextlib.ExitStack() as stack:

        @functools.cache
        def open_engine() -> RolloutEngine:
            return stack.enter_context(contextlib.closing(run.open_engine()))

        if store.num_found:
            say(f"going on from {store.num_found} answers in {store.folder}")
        parts = (run.builder, run.config, run.world, store)
        return with_refusals(examples, lambda usable: answer_all(open_engine, usable, *parts))


def _line(example: Example, answer: Answer, config: TaskConfig) -> dict[str, Any]:
    parsed = None if answer.failure else read_answer(example, answer.text, config)
    line: dict[str, Any] = {"id": example.id, "answer": answer.text, "parsed": parsed}
    return line | ({"failure": answer.failure} if answer.failure else {})
