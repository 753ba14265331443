"""The loop: GRPO training of a video language model. Each line of it is one arrow of the README's table."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from vcr1_fast.evaluate import evaluate
from vcr1_fast.evaluation.score_tables import print_scores
from vcr1_fast.evaluation.scores import Scores, flat_scores, scores_as_dict, scores_from_dict
from vcr1_fast.learner.advantages import TaskScale, with_advantages
from vcr1_fast.learner.step import Learner
from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.report import leave_report
from vcr1_fast.rollout.collect import Collector
from vcr1_fast.rollout.parity import check_parity, warn_of_gap
from vcr1_fast.rollout.queue import RolloutQueue
from vcr1_fast.run.answers import log_answers
from vcr1_fast.run.metrics import merged, rollout_metrics, update_metrics
from vcr1_fast.run.no_signal import SignalWatch
from vcr1_fast.run.pace import pace_metrics
from vcr1_fast.run.resuming import load_state
from vcr1_fast.run.run import Run, due, export_model, make_saver, open_run, open_weight_sync, outcome, sampling_of
from vcr1_fast.run.stopping import Stopping
from vcr1_fast.run.telemetry import say
from vcr1_fast.settings.config import Config


def train(config: Config) -> dict[str, Any]:
    """Train `model.path` on `data.train` with GRPO; resume, evaluate, checkpoint and export as the settings say.

    Returns what the command prints last: the run's folder, its steps, held-out scores before and after.
    Raises ConfigError, OSError or TooManyBadSamplesError, on every rank alike.
    """
    with open_run(config, "train") as run:
        done = _train(run)
        if run.world.is_main:
            leave_report(run.folder, done)
        return done


def _train(run: Run) -> dict[str, Any]:
    config, world = run.config, run.world
    prompts, held_out = run.train_stream(), run.eval_examples()
    learner = Learner(config, world, config.num_updates, run.kernels, SpecialIds.of(run.builder.tokenizer).vision)
    state = load_state(run, learner, prompts, "train")  # step 0, or where a checkpoint stands
    engine = run.open_engine()
    collector = Collector(run.tasks, config, world, run.builder.completion_ids)
    queue = RolloutQueue(engine, collector, prompts, partial(sampling_of, config, world), run.builder.decode)
    task_scale = TaskScale(config.algorithm.scale_decay, state.task_scale)
    sync = open_weight_sync(run, learner, engine, state.policy_version)
    telemetry, saver = run.open_telemetry(state.step), make_saver(run, learner)

    def score(step: int) -> Scores:
        with telemetry.span("eval"), queue.paused():
            scores = evaluate(engine, held_out, run.eval_builder, run.tasks, config, world, must_read=step == 0)
        telemetry.log_eval(step, saver.noted(step, flat_scores(scores)))
        return scores

    sync.push()  # before the first step: a broken path fails now; after a resume it restores the version, too
    parity = check_parity(engine, learner.policy, prompts.sample(), config.rollout, learner.dtype, world)
    say(f"{engine.version}: {parity or 'not compared with the learner, no usable example comes next'}")
    queue.restore(state.pending, state.answers, state.again, state.failed_steps)
    before = score(0) if held_out and state.step == 0 else scores_from_dict(state.before)
    num_tokens, signal = state.num_tokens, SignalWatch(run, state.has_signal)
    with Stopping(config.checkpoint, config.train.num_steps, world, config.eval.every) as stopping, saver:
        for step in range(state.step + 1, config.train.num_steps + 1):
            with telemetry.span("prompts"):
                queue.fill(step)
            with telemetry.span("rollout"):
                groups = queue.take(step)
                task_scale.update(groups, run.tasks, world)
            engine.release_memory()
            with telemetry.span("update"):
                groups = with_advantages(groups, config.algorithm.scale_advantages, task_scale)
                reports = learner.update_grpo(groups)
            run.quarantine.add_all(error for report in reports for error in report.too_large)
            with telemetry.span("weight_sync"), queue.paused():
                sync.push()
            metrics = rollout_metrics(groups, run.tasks, world) | update_metrics(reports)
            metrics |= pace_metrics(reports, telemetry.seconds_of("update"), world)
            metrics |= merged(part.metrics() for part in (prompts, collector, queue, task_scale, run.source, saver))
            num_tokens += int(metrics["step_tokens/executed"])
            warn_of_gap(step, metrics, config, learner.dtype)
            log_answers(run, telemetry, step, groups)
            telemetry.log_step(step, metrics | {"num_tokens": num_tokens}, config.train.num_steps)
            signal.note(groups, reports)
            with telemetry.span("checkpoint"):
                saver.poll()
                if stopping.wants_checkpoint(step):
                    now = run.state(step, prompts, num_tokens, sync.policy_version, "train")
                    more = {"task_scale": task_scale.moments, "has_signal": signal.has_signal, **queue.pending()}
                    saver.save(replace(now, before=scores_as_dict(before), **more))
            stopping.end_if_asked(step)
            if due(config.eval.every, step) and step < config.train.num_steps and held_out:
                score(step)
    after = score(config.train.num_steps) if held_out else {}
    for part in (telemetry, queue, engine):
        part.close()
    done = _finish(run, engine.version, learner, before, after)
    return done | outcome(run, signal.has_signal, config.train.num_steps - state.step, signal.finish())


def _finish(run: Run, engine: str, learner: Learner, before: Scores, after: Scores) -> dict[str, Any]:
    """Show both scores, write the model."""
    if after and run.world.is_main:
        print_scores(before, after)
    if run.config.checkpoint.export:
        export_model(run, learner)
    done = {"run": str(run.folder), "steps": run.config.train.num_steps, "engine": engine}
    return done | {"before": scores_as_dict(before), "after": scores_as_dict(after)}
