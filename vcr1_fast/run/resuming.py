"""Going on from a checkpoint: which one, and whether this run is still the one that made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from vcr1_fast.learner.step import Learner
from vcr1_fast.prompts.stream import PromptStream
from vcr1_fast.run.checkpoint import RunState, load_checkpoint
from vcr1_fast.run.checkpoint_files import resolve_resume
from vcr1_fast.run.run import Run
from vcr1_fast.run.telemetry import say
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.settings.io import config_to_yaml
from vcr1_fast.tasks.prompt_file import prompt_digests

# Where a run runs, how long, and what it keeps: the same run whatever they are
_FREE = ("train.output_dir", "train.num_steps", "train.resume", "train.watchdog_s", "checkpoint.", "eval.", "data.eval")
_FREE += ("train.log_to", "train.samples_every", "train.print_every")
_FREE += ("video.num_workers", "video.prefetch_steps", "video.clips_per_worker", "video.cache_", "video.timeout_s")
_MAX_SHOWN = 60  # characters of a value


def load_state(run: Run, learner: Learner, prompts: PromptStream, program: str) -> RunState:
    """Load the checkpoint `train.resume` names into learner and prompts, or give the state of a new run.

    Says which settings differ from those it was made with. Raises ConfigError when it is of another program (`train` or
    `sft`), was read by another video reader, belongs to other frozen weights, or when data, prompt files, seed or
    starting model are others and train.resume_changed is false.
    """
    checkpoint = resolve_resume(run.config.train.resume, run.folder, run.world)
    if checkpoint is None:
        return run.state(step=0, prompts=prompts, num_tokens=0, policy_version=0, program=program)
    state = load_checkpoint(checkpoint, learner.policy, learner.optimizer, learner.schedule, run.world)
    if state.program != program:
        raise ConfigError(
            f"{checkpoint} was made by `vcr1-fast {state.program}`, this is `vcr1-fast {program}`: "
            "give each its own train.output_dir"
        )
    if state.reader != run.source.name:
        raise ConfigError(
            f"{checkpoint.name} was made with the video reader {state.reader!r}, this run has {run.source.name!r}, "
            "which may give other pixels: install the same version, or start anew with train.resume=never"
        )
    has_frozen = not all(weight.requires_grad for weight in learner.policy.parameters())
    if has_frozen and state.base not in ("", run.base_digest):
        raise ConfigError(
            f"{checkpoint.name} holds only what was trained, beside frozen weights of another model than "
            f"{run.config.model.path}: set model.path to the one that the run began with"
        )
    _check_unchanged(run, state, prompts)
    say(f"resumed from {checkpoint} (step {state.step})")
    for difference in differing_settings(state.config_yaml, config_to_yaml(run.config)):
        say(f"other than before: {difference}")
    prompts.position = state.position
    return state


def _check_unchanged(run: Run, state: RunState, prompts: PromptStream) -> None:
    """What makes the rest of a run another run."""
    seed, now = (_flat(text).get("train.seed") for text in (state.config_yaml, config_to_yaml(run.config)))
    changed = [f"train.seed (was {seed}, is {now})"] * (seed != now)
    changed += ["the examples of data.train"] * (state.data not in ("", prompts.digest))
    prompts_now = prompt_digests(run.tasks)
    changed += [
        f"the question of {task} (task.prompts)"
        for task in sorted({**state.prompts, **prompts_now})
        if state.prompts.get(task) != prompts_now.get(task)
    ]
    changed += ["the weights or settings in model.path"] * (state.base not in ("", run.base_digest))
    if changed and not run.config.train.resume_changed:
        raise ConfigError(
            f"this run goes on from step {state.step} of another one, which differs in {', '.join(changed)}: set them "
            "back, choose another train.output_dir, or go on all the same with train.resume_changed=true"
        )
    for what in changed:
        say(f"other than before, as train.resume_changed allows: {what}")


def differing_settings(before: str, now: str) -> list[str]:
    """`name: before -> now` for each setting that differs between two configurations in YAML and may change results."""
    old, new = _flat(before), _flat(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and not name.startswith(_FREE)]
    return [f"{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}" for name in sorted(names)]


def _flat(text: str) -> dict[str, Any]:
    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, part in value.items():
                yield from walk(part, f"{name}.{key}" if name else str(key))
        else:
            yield name, value

    return dict(walk(yaml.safe_load(text), ""))


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
