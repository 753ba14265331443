"""Held-out score: greedy answers of an engine on every example, beside baselines that need no model.

`evaluate` is what a training run calls; `vcr1-fast eval` also keeps the answers (evaluation.answer_store) and writes
one line per example (evaluation.samples).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vcr1_fast.config import Config, ConfigError
from vcr1_fast.evaluation import perception
from vcr1_fast.evaluation.answer_store import AnswerStore, answer_settings, checkpoint_identity, question_key
from vcr1_fast.evaluation.samples import (
    Answer,
    Sample,
    make_samples,
    metric_intervals,
    per_sample_metrics,
    samples_as_rows,
    write_lines,
)
from vcr1_fast.evaluation.score_tables import print_categories, print_scores
from vcr1_fast.evaluation.suites import read_categories
from vcr1_fast.learner.model import model_folder
from vcr1_fast.learner.sharding import World, on_main_rank
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.run import Run, open_run
from vcr1_fast.tasks.task import Task
from vcr1_fast.telemetry import progress, say, to_json
from vcr1_fast.types import Example, Prompt, SampleError, SamplingParams
from vcr1_fast.video.read import open_reader

__all__ = ["Scores", "TaskScore", "evaluate", "evaluate_command", "flat_scores", "print_scores", "scores_as_dict"]


@dataclass(frozen=True)
class TaskScore:
    """Metrics of one task on one set of examples; every value in [0, 1], headline first."""

    metrics: dict[str, float]
    trivial: dict[str, dict[str, float]]  # baseline -> metrics
    num_examples: int
    num_bad: int  # examples that could not be read; they count as wrong
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %, of metrics that are means

    @property
    def headline(self) -> float:
        return next(iter(self.metrics.values()))

    @property
    def headline_name(self) -> str:
        return next(iter(self.metrics))

    @property
    def best_trivial(self) -> float:
        return max(next(iter(metrics.values())) for metrics in self.trivial.values())


Scores = dict[str, TaskScore]


def evaluate(
    engine: RolloutEngine,
    examples: Sequence[Example],
    builder: PromptBuilder,
    tasks: Mapping[str, Task],
    config: Config,
    world: World,
) -> Scores:
    """Score of every task that has examples. Ranks answer disjoint shares; all ranks return the same scores."""
    examples = first_of_each_task(examples, config.eval.max_examples)
    answers = answer_all(lambda: engine, examples, builder, config, world)
    return score_answers(tasks, examples, answers, config.train.seed)[0]


def first_of_each_task(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """At most `limit` examples of each task, in their order."""
    taken: dict[str, int] = {}
    result = []
    for example in examples:
        taken[example.task] = taken.get(example.task, 0) + 1
        if limit is None or taken[example.task] <= limit:
            result.append(example)
    return result


def answer_all(
    open_engine: Callable[[], RolloutEngine],
    examples: Sequence[Example],
    builder: PromptBuilder,
    config: Config,
    world: World,
    store: AnswerStore | None = None,
) -> list[Answer]:
    """One answer per example, on every rank the same. What `store` knows is not asked again.

    The engine is opened when there is something to ask. Above temperature 0 a draw also depends on its place in the
    batch, so an interrupted evaluation then gives other draws than one in a single piece.
    """
    keys = [question_key(_question(builder, example), example) if store else "" for example in examples]
    known = [store.get(key) if store else None for key in keys]
    pending = [i for i, answer in enumerate(known) if answer is None]
    share = pending[world.rank :: world.world_size]

    def keep(place: int, answer: Answer) -> None:
        if store:
            store.put(keys[share[place]], answer)

    engine = open_engine() if pending else None
    answers = _ask(engine, [examples[i] for i in share], builder, config, keep) if engine else []
    by_index = dict(zip(share, answers, strict=True))
    if world.world_size > 1:
        gathered: list[dict[int, Answer]] = [{} for _ in range(world.world_size)]
        dist.all_gather_object(gathered, by_index)
        by_index = {index: answer for part in gathered for index, answer in part.items()}
    return [by_index[i] if answer is None else answer for i, answer in enumerate(known)]


def answer_in_rounds(
    open_engine: Callable[[], RolloutEngine],
    examples: Sequence[Example],
    builder: PromptBuilder,
    config: Config,
    world: World,
    store: AnswerStore | None = None,
) -> list[Answer]:
    """`answer_all` with eval.perceptions rounds for the tasks that have them, see evaluation.perception.

    `builder` must read clips (`perception.read_patches`).
    """
    others = [example for example in examples if example.task not in perception.TASKS]
    answers = answer_all(open_engine, others, builder, config, world, store)
    by_id = {example.id: answer for example, answer in zip(others, answers, strict=True)}
    focuses = perception.first_round([example for example in examples if example.task in perception.TASKS])
    num_rounds = config.eval.perceptions
    for number in range(1, num_rounds + 1):
        asked = perception.round_examples(focuses, number, num_rounds, config.video)
        said = answer_all(open_engine, asked, builder, config, world, store)
        if number < num_rounds:
            focuses = [focus.narrowed(answer) for focus, answer in zip(focuses, said, strict=True)]
        else:
            by_id |= {f.example.id: f.answered(answer) for f, answer in zip(focuses, said, strict=True)}
    return [by_id[example.id] for example in examples]


def _question(builder: PromptBuilder, example: Example) -> str:
    return builder.tasks[example.task].question(example)


def _ask(
    engine: RolloutEngine,
    examples: Sequence[Example],
    builder: PromptBuilder,
    config: Config,
    keep: Callable[[int, Answer], None],
) -> list[Answer]:
    """One answer per example, in chunks of max_batch_rows; `keep` is called with each one's place as it comes."""
    sampling = SamplingParams(
        num_completions=1,
        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
        temperature=config.eval.temperature,
        seed=config.train.seed,
    )
    chunk = config.rollout.max_batch_rows
    starts = range(0, len(examples), chunk)
    answers: list[Answer] = []
    for start in progress(starts, "evaluate", len(starts)):
        prompts = [_build(builder, example) for example in examples[start : start + chunk]]
        readable = [p for p in prompts if isinstance(p, Prompt)]
        completions = iter(engine.generate(readable, sampling) if readable else [])
        for prompt in prompts:
            if isinstance(prompt, Prompt):
                said = next(completions)[0]
                answer = Answer(said.text, "", said.finish_reason, said.num_tokens)
            else:
                answer = Answer("", str(prompt))
            keep(len(answers), answer)
            answers.append(answer)
    return answers


def _build(builder: PromptBuilder, example: Example) -> Prompt | SampleError:
    try:
        return builder.build(example)
    except SampleError as error:
        print(f"bad held-out sample, counted as wrong: {error}", file=sys.stderr)
        return error


def score_answers(
    tasks: Mapping[str, Task],
    examples: Sequence[Example],
    answers: Sequence[Answer],
    seed: int,
    *,
    categories: Mapping[str, dict[str, str]] | None = None,
) -> tuple[Scores, list[Sample]]:
    """Scores of every task, and with `categories` (of the ids that have any) one sample per example, task after task.

    A failure is scored as the empty answer, which is 0 in every metric, and stays in the denominator.
    """
    scores: Scores = {}
    samples: list[Sample] = []
    for name in dict.fromkeys(example.task for example in examples):
        members = [i for i, example in enumerate(examples) if example.task == name]
        own, said = [examples[i] for i in members], [answers[i] for i in members]
        task, texts = tasks[name], [answer.text for answer in said]
        metrics = task.metrics(own, texts)
        values = per_sample_metrics(task, own, texts, metrics)
        scores[name] = TaskScore(
            metrics=metrics,
            trivial={label: task.metrics(own, given) for label, given in task.trivial_answers(own).items()},
            num_examples=len(own),
            num_bad=sum(bool(answer.failure) for answer in said),
            intervals=metric_intervals(values, [example.video for example in own], seed),
        )
        if categories is not None:
            samples += make_samples(task, own, said, values, categories)
    return scores, samples


def flat_scores(scores: Scores) -> dict[str, float]:
    """`task/metric` -> value, for logs."""
    return {f"{task}/{name}": value for task, score in scores.items() for name, value in score.metrics.items()}


def scores_as_dict(scores: Scores) -> dict[str, Any]:
    """For JSON: task -> metrics, their 95 % intervals, baselines and counts."""
    return {task: asdict(score) for task, score in scores.items()}


def evaluate_command(config: Config) -> dict[str, Any]:
    """`vcr1-fast eval`: score `model.path` on `data.eval`; prints tables, writes samples.jsonl and scores.json.

    Returns what stands in scores.json. Raises ConfigError when there is nothing to evaluate or eval.output_dir holds
    answers of other settings, OSError when it cannot be written.
    """
    if config.eval.perceptions > 1 and config.task.recipe == "paper":
        raise ConfigError(f"eval.perceptions is {config.eval.perceptions}, but task.recipe is paper: set it to fixed")
    with open_run(config, writes=False) as run:
        examples = first_of_each_task(run.eval_examples(), config.eval.max_examples)
        if not examples:
            raise ConfigError("data.eval is empty, wanted at least one annotation file")
        with contextlib.closing(_open_store(run)) as store, contextlib.ExitStack() as stack:

            @functools.cache
            def open_engine() -> RolloutEngine:
                engine = run.open_engine()
                stack.callback(engine.close)
                return engine

            if store.num_found:
                say(f"going on from {store.num_found} answers in {store.folder}")
            if config.eval.perceptions == 1:
                answers = answer_all(open_engine, examples, run.builder, config, run.world, store)
            else:
                reader = stack.enter_context(contextlib.closing(open_reader(config.video)))
                builder = PromptBuilder(
                    run.builder.tokenizer, run.tasks, lambda path: perception.read_patches(path, config.video, reader)
                )
                answers = answer_in_rounds(open_engine, examples, builder, config, run.world, store)
        categories = read_categories(config.data.eval)
        scores, samples = score_answers(run.tasks, examples, answers, config.train.seed, categories=categories)
        result = {"model": config.model.path, "scores": scores_as_dict(scores), "folder": str(store.folder)}

        def write() -> None:
            write_lines(store.folder / "samples.jsonl", samples_as_rows(samples))
            write_lines(store.folder / "scores.json", [result])

        on_main_rank("writing the samples", write, run.world)
        if run.world.is_main:
            print_scores({}, scores)
            print_categories(samples)
            say(f"samples: {store.folder / 'samples.jsonl'}")
        return result


def _open_store(run: Run) -> AnswerStore:
    """The store in eval.output_dir; by default in a folder of its own for each set of settings."""
    config = run.config
    weights = [""]

    def identify() -> None:
        weights[0] = checkpoint_identity(model_folder(config.model.path))

    on_main_rank("reading the checkpoint", identify, run.world)
    if run.world.world_size > 1:
        dist.broadcast_object_list(weights, src=0)
    settings = answer_settings(config, weights[0], run.reader_name, run.world.device)
    if config.eval.output_dir is not None:
        folder = Path(config.eval.output_dir)
    else:
        digest = hashlib.sha256(to_json(settings).encode()).hexdigest()[:8]
        folder = run.folder / "eval" / f"{Path(config.model.path).name}-{digest}"
    return AnswerStore(folder, settings, run.world, restart=config.eval.restart)
