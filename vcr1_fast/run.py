"""What every run opens before its loop and closes after it: folder, settings, data, prompts, telemetry."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vcr1_fast import __version__, native
from vcr1_fast.checkpoint import RunState, load_checkpoint, resolve_resume, save_checkpoint
from vcr1_fast.config import Config, ConfigError
from vcr1_fast.config_io import config_to_yaml
from vcr1_fast.learner.model import describe_kernels, load_hugging_face, load_tokenizer, resolve_dtype
from vcr1_fast.learner.sharding import World, init_distributed, shutdown
from vcr1_fast.learner.step import Learner
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.prompts.dataset import AnnotationSource, read_annotation_files
from vcr1_fast.prompts.stream import PromptStream
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.run_folder import prepare_output_dir
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.task import Task
from vcr1_fast.telemetry import say
from vcr1_fast.types import Example
from vcr1_fast.video.patches import to_patches
from vcr1_fast.video.quarantine import Quarantine
from vcr1_fast.video.read import open_reader, read_frames


@dataclass(frozen=True)
class Run:
    """The parts of a run that training, supervised cold start and evaluation share."""

    config: Config
    world: World
    folder: Path
    tasks: dict[str, Task]
    builder: PromptBuilder
    quarantine: Quarantine
    reader_name: str

    def train_stream(self) -> PromptStream:
        examples = self._load(self.config.data.train, "data.train")
        return PromptStream(examples, self.builder, self.quarantine, self.config, self.world)

    def eval_examples(self) -> list[Example]:
        return self._load(self.config.data.eval, "data.eval") if self.config.data.eval else []

    def open_engine(self) -> RolloutEngine:
        """The rollout engine with the starting weights; WeightSync keeps it up to date."""
        dtype = resolve_dtype(self.config.model, self.world.device)
        hf = load_hugging_face(self.config.model.path, dtype, self.world.device)
        return LocalEngine(hf, self.builder.tokenizer, max_batch_rows=self.config.rollout.max_batch_rows)

    def describe(self) -> str:
        """One line on what this run uses, chosen now and not changed later."""
        config, world = self.config, self.world
        dtype = str(resolve_dtype(config.model, world.device)).removeprefix("torch.")
        sharding = f"FSDP2 over {world.world_size} ranks" if world.world_size > 1 else "one process"
        return (
            f"vcr1-fast {__version__}: model {config.model.path} in {dtype} on {world.device.type}, {sharding}; "
            f"{describe_kernels(config.model, world.device)}; "
            f"engine: {config.rollout.engine}; video: {self.reader_name}; "
            f"overlaps: {'C++' if native.is_available() else native.status()}; recipe: {config.task.recipe}"
        )

    def state(self, step: int, position: int, num_tokens: int, policy_version: int, program: str) -> RunState:
        """What a checkpoint made now says about the run."""
        config_yaml = config_to_yaml(self.config)
        return RunState(step, position, num_tokens, policy_version, self.reader_name, config_yaml, program)

    def _load(self, paths: Sequence[str], name: str) -> list[Example]:
        if not paths:
            raise ConfigError(
                f"{name} is empty, wanted at least one annotation file; for a first try: vcr1-fast synth tiny, then "
                "vcr1-fast train tiny"
            )
        data = self.config.data
        sources = [AnnotationSource(path, data.video_root, data.format) for path in paths]
        files = read_annotation_files(sources, self.tasks, self.config.task.recipe)
        examples = [example for file in files for example in file.examples]
        errors = [error for file in files for error in file.errors]
        for file in files:
            say(f"{name}: {file.summary}")
        if errors and self.world.is_main:
            for error in errors[:10]:
                print(f"bad annotation: {error}", file=sys.stderr)
            print(f"{name}: {len(errors)} of {len(errors) + len(examples)} rows left out", file=sys.stderr)
        if not examples:
            raise ConfigError(f"{name} has no usable row in {', '.join(paths)}")
        return examples


@contextlib.contextmanager
def open_run(config: Config, writes: bool = True) -> Iterator[Run]:
    """Join the process group, check and prepare the folder, open the video reader, say what is used.

    `writes`: False leaves the run's folder alone (evaluation).
    Raises ConfigError or OSError before anything slow when settings, model or folder are unusable.
    """
    world = init_distributed(config.model.device)
    try:
        config.check_world_size(world.world_size)
        folder = prepare_output_dir(config.train.output_dir, world) if writes else Path(config.train.output_dir)
        torch.manual_seed(config.train.seed)
        tasks = make_tasks(config.task, judge=config.judge)
        with contextlib.closing(open_reader(config.video)) as reader:
            builder = PromptBuilder(
                load_tokenizer(config.model.path),
                tasks,
                lambda path: to_patches(read_frames(path, config.video, reader)),
            )
            if writes and world.is_main:
                (folder / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
            quarantine = Quarantine(folder / "quarantine.jsonl" if writes else None)
            run = Run(config, world, folder, tasks, builder, quarantine, reader.name)
            say(run.describe())
            yield run
    finally:
        shutdown(world)


def due(every: int, step: int) -> bool:
    """Whether something done every so many steps is done after this one; 0 is never."""
    return every > 0 and step % every == 0


def sampling_seed(config: Config, step: int, world: World) -> int:
    """A different seed for each step and rank, a pure function of them: a resumed run samples what it would have."""
    return (config.train.seed * 1_000_003 + step) * 8192 + world.rank  # 8192: more ranks than any run has


def load_state(run: Run, learner: Learner, program: str) -> RunState:
    """Load the checkpoint `train.resume` names into the learner, or give the state of a new run.

    Raises ConfigError when it is of another program (`train` or `sft`) or was read by another video reader.
    """
    checkpoint = resolve_resume(run.config.train.resume, run.folder)
    if checkpoint is None:
        return run.state(step=0, position=0, num_tokens=0, policy_version=0, program=program)
    state = load_checkpoint(checkpoint, learner.policy, learner.optimizer, learner.schedule, run.world)
    if state.program != program:
        raise ConfigError(
            f"{checkpoint} was made by `vcr1-fast {state.program}`, this is `vcr1-fast {program}`: "
            "give each its own train.output_dir"
        )
    if state.reader != run.reader_name:
        raise ConfigError(
            f"{checkpoint.name} was made with the video reader {state.reader!r}, this run has {run.reader_name!r}, "
            "which may give other pixels: install the same version, or start anew with train.resume=never"
        )
    say(f"resumed from {checkpoint} (step {state.step})")
    return state


def save_state(run: Run, learner: Learner, state: RunState) -> None:
    """Write a checkpoint of everything the run needs to go on bit for bit."""
    parts = (learner.policy, learner.optimizer, learner.schedule)
    folder = save_checkpoint(run.folder, *parts, state, run.world, run.config.checkpoint.keep)
    say(f"checkpoint: {folder}")
