"""Held-out score: greedy answers of an engine on every example, beside baselines that need no model.

`evaluate` is what a training run calls; `vcr1-fast eval` also keeps the answers (evaluation.answer_store) and writes
one line per example (evaluation.samples).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vcr1_fast.evaluation import perception
from vcr1_fast.evaluation.answer_store import AnswerStore, answer_settings, question_key
from vcr1_fast.evaluation.samples import Answer, Sample, write_lines
from vcr1_fast.evaluation.score_tables import print_categories, print_scores
from vcr1_fast.evaluation.scores import Scores, score_answers, scores_as_dict
from vcr1_fast.learner.sharding import World, all_reduce_sum, gather_all, on_main_rank
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.batches import in_batches
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.run.model_folder import model_digest, model_folder
from vcr1_fast.run.run import Run, open_run, warn_of_other_reader
from vcr1_fast.run.telemetry import progress, say, to_json
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.tasks.prompt_file import prompt_digests
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example, Prompt, RefusedTruth, SampleError, SamplingParams

REFUSED = "the annotation was refused"
READ_AHEAD = 64  # examples


def evaluate(
    engine: RolloutEngine,
    examples: Sequence[Example],
    builder: PromptBuilder,
    tasks: Mapping[str, Task],
    config: Config,
    world: World,
    *,
    must_read: bool = False,
) -> Scores:
    """Score of every task that has usable examples. Ranks answer disjoint shares; all return the same scores.

    Refused examples are not asked and count as wrong. `must_read`: raises SampleError when no example could be asked.
    """
    examples = first_of_each_task(examples, config.eval.max_examples)
    answers = with_refusals(examples, lambda usable: answer_all(lambda: engine, usable, builder, config, world))
    if must_read:
        _require_one_read(examples, answers)
    return score_on_main_rank(tasks, examples, answers, config.train.seed, world)[0]


def first_of_each_task(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """At most `limit` examples of each task, in their order."""
    taken: dict[str, int] = {}
    result = []
    for example in examples:
        taken[example.task] = taken.get(example.task, 0) + 1
        if limit is None or taken[example.task] <= limit:
            result.append(example)
    return result


def with_refusals(examples: Sequence[Example], ask: Callable[[list[Example]], list[Answer]]) -> list[Answer]:
    """One answer per example: what `ask` gives for the usable ones, the reason for the refused ones."""
    said = iter(ask([example for example in examples if not example.is_refused]))
    return [
        Answer("", f"{REFUSED}: {example.truth.reason}") if isinstance(example.truth, RefusedTruth) else next(said)
        for example in examples
    ]


def _require_one_read(examples: Sequence[Example], answers: Sequence[Answer]) -> None:
    """A score of nothing but failures is 0, which says nothing about the model."""
    failures = [answer.failure for example, answer in zip(examples, answers, strict=True) if not example.is_refused]
    if failures and all(failures):
        raise SampleError(
            "data.eval", f"none of the {len(failures)} held-out samples can be used; the first: {failures[0]}"
        )


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
    keys = [_key(builder, example) if store else None for example in examples]
    known = [store.get(key) if store and key else None for key in keys]
    pending = [i for i, answer in enumerate(known) if answer is None]
    share = pending[world.rank :: world.world_size]

    def keep(place: int, answer: Answer) -> None:
        key = keys[share[place]]
        if store and key:
            store.put(key, answer)

    engine = open_engine() if pending else None
    answers = _ask(engine, [examples[i] for i in share], builder, config, keep) if engine else []
    if builder.limits is not None and pending:
        num_off = all_reduce_sum({"num_off": float(builder.limits.num_off)}, world)["num_off"]
        line = builder.limits.report(int(num_off), lambda off: gather_all(off, world))
        if line and world.is_main:
            print(f"warning: {line}", file=sys.stderr)
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
    """`answer_all` with eval.perceptions rounds for the tasks that have them, see evaluation.perception."""
    others = [example for example in examples if not perception.has_rounds(example)]
    answers = answer_all(open_engine, others, builder, config, world, store)
    by_id = {example.id: answer for example, answer in zip(others, answers, strict=True)}
    is_cut, num_rounds = config.eval.perception == "crop", config.eval.perceptions
    asked_often = [example for example in examples if perception.has_rounds(example)]
    focuses = [perception.Focus(example, is_cut) for example in asked_often]
    if not is_cut and config.task.video_first is None:
        builder = builder.placing(video_first=True)
    for number in range(1, num_rounds + 1):
        asked = perception.round_examples(focuses, number, num_rounds, config.video)
        said = answer_all(open_engine, asked, builder, config, world, store)
        if number < num_rounds:
            focuses = [focus.narrowed(answer) for focus, answer in zip(focuses, said, strict=True)]
        else:
            by_id |= {f.example.id: f.answered(answer) for f, answer in zip(focuses, said, strict=True)}
    return [by_id[example.id] for example in examples]


def _key(builder: PromptBuilder, example: Example) -> str | None:
    """Under which its answer is kept; None where a custom task cannot ask, which the builder will say."""
    try:
        return question_key(builder.tasks[example.task].question(example), example)
    except (Exception, SystemExit):
        return None


def _ask(
    engine: RolloutEngine,
    examples: Sequence[Example],
    builder: PromptBuilder,
    config: Config,
    keep: Callable[[int, Answer], None],
) -> list[Answer]:
    """One answer per example, batch by batch; `keep` is called with each one's place as it comes."""
    sampling, rollout = eval_sampling(config), config.rollout
    built = _built(builder, examples)
    answers: list[Answer] = []
    for prompts in in_batches(built, sampling, rollout.max_batch_rows, rollout.max_batch_tokens):
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


def eval_sampling(config: Config) -> SamplingParams:
    """One answer to each question, drawn as the section eval says."""
    return SamplingParams(
        num_completions=1,
        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
        temperature=config.eval.temperature,
        seed=config.train.seed,
        repetition_penalty=config.eval.repetition_penalty,
    )


def _built(builder: PromptBuilder, examples: Sequence[Example]) -> Iterator[Prompt | SampleError]:
    """One after the other, the clips of the next READ_AHEAD to 2 x READ_AHEAD read meanwhile."""
    builder.read_ahead(examples[:READ_AHEAD])
    for index, example in enumerate(progress(examples, "evaluate", len(examples))):
        if index % READ_AHEAD == 0:
            builder.read_ahead(examples[index + READ_AHEAD : index + 2 * READ_AHEAD])
        try:
            yield builder.build(example)
        except SampleError as error:
            print(f"bad sample, not asked, wrong where it is scored: {error}", file=sys.stderr)
            yield error


def score_on_main_rank(
    tasks: Mapping[str, Task],
    examples: Sequence[Example],
    answers: Sequence[Answer],
    seed: int,
    world: World,
    *,
    with_samples: bool = False,
) -> tuple[Scores, list[Sample]]:
    """`score_answers` by rank 0, as a judge that every rank asks is asked that many times; the samples stay there.

    All ranks return the same scores.
    """
    found: list[Scores] = [{}]
    samples: list[Sample] = []

    def score() -> None:
        found[0], scored = score_answers(tasks, examples, answers, seed, with_samples=with_samples)
        samples.extend(scored)

    on_main_rank("scoring the answers", score, world)
    if world.world_size > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0], samples


def evaluate_command(config: Config) -> dict[str, Any]:
    """`vcr1-fast eval`: score `model.path` on `data.eval`; prints tables, writes samples.jsonl and scores.json.

    Returns what stands in scores.json. Raises ConfigError when there is nothing to evaluate or eval.output_dir holds
    answers of other settings, OSError when it cannot be written.
    """
    if config.eval.perceptions > 1 and config.task.recipe == "paper":
        raise ConfigError(f"eval.perceptions is {config.eval.perceptions}, but task.recipe is paper: set it to fixed")
    asked = config.model.path
    config = replace(config, video=config.eval_video)
    with open_run(config, "eval") as run:
        config = run.config  # whose model is a folder where a checkpoint of a run was named
        examples = first_of_each_task(run.eval_examples(), config.eval.max_examples)
        if not examples:
            raise ConfigError("data.eval is empty, wanted at least one annotation file")
        warn_of_other_reader(run)
        with contextlib.closing(open_store(run)) as store, contextlib.ExitStack() as stack:

            @functools.cache
            def open_engine() -> RolloutEngine:
                engine = run.open_engine()
                stack.callback(engine.close)
                return engine

            if store.num_found:
                say(f"going on from {store.num_found} answers in {store.folder}")
            ask = answer_all if config.eval.perceptions == 1 else answer_in_rounds
            answers = with_refusals(
                examples, lambda usable: ask(open_engine, usable, run.builder, config, run.world, store)
            )
        _require_one_read(examples, answers)
        scores, samples = score_on_main_rank(
            run.tasks, examples, answers, config.train.seed, run.world, with_samples=True
        )
        result = {
            "model": asked,
            "reader": run.source.name,
            "prompts": prompt_digests(run.tasks),
            "scores": scores_as_dict(scores),
            "folder": str(store.folder),
        }

        def write() -> None:
            write_lines(store.folder / "samples.jsonl", samples)
            write_lines(store.folder / "scores.json", [result])

        on_main_rank("writing the samples", write, run.world)
        if run.world.is_main:
            print_scores({}, scores)
            print_categories(samples)
            say(f"samples: {store.folder / 'samples.jsonl'}")
        missing = {example.task for example in examples if not example.is_refused} - scores.keys()
        if missing:
            raise SampleError(
                "data.eval", f"no score of task {', '.join(sorted(missing))}, see above; answers are kept"
            )
        return result


def open_store(run: Run) -> AnswerStore:
    """The store in eval.output_dir; by default in a folder of its own for each set of settings."""
    config = run.config
    weights = [""]

    def identify() -> None:
        weights[0] = model_digest(model_folder(config.model.path))

    on_main_rank("reading the checkpoint", identify, run.world)
    if run.world.world_size > 1:
        dist.broadcast_object_list(weights, src=0)
    prompts = prompt_digests(run.tasks)
    settings = answer_settings(config, weights[0], run.source.name, run.world.device, prompts)
    if config.eval.output_dir is not None:
        folder = Path(config.eval.output_dir)
    else:
        digest = hashlib.sha256(to_json(settings).encode()).hexdigest()[:8]
        folder = run.folder / "eval" / f"{Path(config.model.path).name}-{digest}"
    return AnswerStore(folder, settings, run.world, restart=config.eval.restart)
