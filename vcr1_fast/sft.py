"""Supervised cold start: the policy learns the form of an answer, and to read a clip, before GRPO takes over.

The same packing, model and optimizer as in GRPO; a group holds the one completion to teach, and the prompt has no
scored rows, so it is masked by construction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vcr1_fast.evaluate import evaluate
from vcr1_fast.evaluation.scores import flat_scores, scores_as_dict
from vcr1_fast.learner.step import Learner
from vcr1_fast.run.metrics import update_metrics
from vcr1_fast.run.pace import pace_metrics
from vcr1_fast.run.resuming import load_state
from vcr1_fast.run.run import Run, export_model, make_saver, open_run, open_weight_sync, outcome
from vcr1_fast.run.stopping import Stopping
from vcr1_fast.run.telemetry import Telemetry
from vcr1_fast.settings.config import Config
from vcr1_fast.types import Completion, Prompt, RolloutGroup


def sft(config: Config) -> dict[str, Any]:
    """Teach `model.path` the targets of `data.train` for `sft.num_steps` updates, then export and score it.

    Returns what the command prints last. Raises ConfigError, OSError or TooManyBadSamplesError, on every rank alike.
    """
    with open_run(config, "sft") as run:
        return _sft(run)


def _sft(run: Run) -> dict[str, Any]:
    config = run.config
    prompts = run.train_stream(needs_target=True)
    learner = Learner(config, run.world, config.sft.num_steps, run.kernels)
    state = load_state(run, learner, prompts, "sft")
    num_tokens, has_signal = state.num_tokens, state.has_signal
    telemetry, saver = run.open_telemetry(state.step), make_saver(run, learner)
    with Stopping(config.checkpoint, config.sft.num_steps, run.world) as stopping, saver:
        for step in range(state.step + 1, config.sft.num_steps + 1):
            with telemetry.span("prompts"):
                groups = [taught_group(prompt, run) for prompt in prompts.next(config.sft.examples_per_step)]
            with telemetry.span("update"):
                report = learner.update_sft(groups)
            has_signal |= report.has_signal
            metrics = update_metrics([report]) | pace_metrics([report], telemetry.seconds_of("update"), run.world)
            num_tokens += int(metrics["step_tokens/executed"])
            metrics |= {**prompts.metrics(), **saver.metrics(), "num_tokens": num_tokens}
            telemetry.log_step(step, metrics, config.sft.num_steps)
            with telemetry.span("checkpoint"):
                saver.poll()
                if stopping.wants_checkpoint(step):
                    now = run.state(step, prompts, num_tokens, 0, "sft")
                    saver.save(replace(now, has_signal=has_signal))
            stopping.end_if_asked(step)
    export_model(run, learner)
    scores = _score(run, learner, telemetry)
    telemetry.close()
    said = outcome(run, has_signal, config.sft.num_steps - state.step)
    return {"run": str(run.folder), "steps": config.sft.num_steps, "scores": scores, **said}


def _score(run: Run, learner: Learner, telemetry: Telemetry) -> dict[str, Any]:
    examples = run.eval_examples()
    if not examples:
        return {}
    engine = run.open_engine()
    open_weight_sync(run, learner, engine, policy_version=0).push()
    scores = evaluate(engine, examples, run.eval_builder, run.tasks, run.config, run.world)
    telemetry.log_eval(run.config.sft.num_steps, flat_scores(scores))
    engine.close()
    return scores_as_dict(scores)


def taught_group(prompt: Prompt, run: Run) -> RolloutGroup:
    """The annotated completion as a group of one."""
    ids_R = run.builder.completion_ids(prompt.example)
    completion = Completion(ids_R, torch.zeros(ids_R.numel()), "stop")
    return RolloutGroup(prompt, (completion,), policy_version=0)
