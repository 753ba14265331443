"""What every run opens before its loop and closes after it: folder, settings, data, prompts, telemetry."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from vcr1_fast import __version__, native
from vcr1_fast.learner.adamw_8bit import require_torchao
from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.learner.kernel_proof import choose_kernels
from vcr1_fast.learner.loading import check_weights
from vcr1_fast.learner.memory_sums import check_memory
from vcr1_fast.learner.model import load_hugging_face, load_tokenizer, resolve_dtype
from vcr1_fast.learner.sharding import World, init_distributed, on_main_rank, shutdown
from vcr1_fast.learner.step import Learner
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.prompts.stream import PromptStream
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.rollout.sglang_engine import SGLangEngine
from vcr1_fast.run import exit_codes
from vcr1_fast.run.checkpoint import RunState
from vcr1_fast.run.checkpoint_files import recorded_model, recorded_state
from vcr1_fast.run.checkpoint_model import with_model_of_checkpoint
from vcr1_fast.run.export import (
    ADAPTER_CONFIG,
    ExportPlan,
    export_adapter,
    export_hugging_face,
    plan_export,
    try_export,
)
from vcr1_fast.run.folder import prepare_output_dir
from vcr1_fast.run.folder_lock import locked_folder
from vcr1_fast.run.hub import with_hub_model
from vcr1_fast.run.model_folder import CONFIG_FILE, TRAINED_WITH, model_digest, model_folder, read_json
from vcr1_fast.run.random_state import seed_generators
from vcr1_fast.run.reader_choice import require_one_reader, with_reader
from vcr1_fast.run.saver import CheckpointSaver
from vcr1_fast.run.sources import (
    annotation_contents,
    describe_eval_video,
    eval_builder,
    open_source,
    prompt_limits,
    tokens_per_second,
)
from vcr1_fast.run.telemetry import Telemetry, say
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.settings.checks import RunCommand, check_settings
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import config_to_yaml
from vcr1_fast.settings.of_model import check_model
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.native_cuda import choose_half
from vcr1_fast.tasks.prompt_file import prompt_digests
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example, SamplingParams
from vcr1_fast.video.patches import PatchSource
from vcr1_fast.video.quarantine import Quarantine


@dataclass(frozen=True)
class Run:
    """The parts of a run that training, supervised cold start and evaluation share."""

    config: Config
    world: World
    folder: Path
    tasks: dict[str, Task]
    source: PatchSource
    builder: PromptBuilder
    eval_builder: PromptBuilder  # the same one, unless eval.video says otherwise
    quarantine: Quarantine
    kernels: KernelChoice
    export: ExportPlan | None  # of a command that exports
    asked_model: str  # model.path before a model of the Hub got its commit, or a checkpoint became a folder

    def train_stream(self, *, needs_target: bool = False) -> PromptStream:
        self.source.loader.start()  # as in open_engine
        parts = (self.builder, self.quarantine, self.config, self.world)
        return PromptStream(self._load("train"), *parts, needs_target=needs_target)

    def eval_examples(self) -> list[Example]:
        """Those of data.eval, refused rows included (RefusedTruth); [] without files."""
        return self._load("eval") if self.config.data.eval else []

    def open_engine(self) -> RolloutEngine:
        """The rollout engine with the starting weights; WeightSync keeps it up to date."""
        self.source.loader.start()  # 2 s of importing torch, while the model is loaded
        dtype = resolve_dtype(self.config.model, self.world.device)
        rollout = self.config.rollout
        if rollout.engine == "sglang":
            check_weights(model_folder(self.config.model.path))  # SGLang passes over names that it does not know
            return SGLangEngine(
                model_folder(self.config.model.path),
                self.builder.tokenizer,
                rollout.sglang.of_rank(self.world.rank, self.world.world_size),
                dtype=dtype,
                device=self.world.device,
                seed=self.config.train.seed * 8192 + self.world.rank,
                can_penalise=self.config.eval.repetition_penalty != 1,
            )
        hf = load_hugging_face(self.config.model.path, dtype, self.world.device)
        return LocalEngine(
            hf,
            self.builder.tokenizer,
            max_batch_rows=rollout.max_batch_rows,
            max_batch_tokens=rollout.max_batch_tokens,
            cuda_graph=rollout.cuda_graph,
        )

    def open_telemetry(self, resume_step: int) -> Telemetry:
        """`resume_step`: of the checkpoint that the run goes on from, 0 of a new run."""
        train = self.config.train
        to = (train.log_to, config_to_yaml(self.config), train.profile_steps)
        return Telemetry(self.folder, self.world.rank, resume_step, train.watchdog_s, *to)

    def describe(self) -> str:
        """One line on what this run uses, chosen now and not changed later."""
        config, world = self.config, self.world
        dtype = str(resolve_dtype(config.model, world.device)).removeprefix("torch.")
        sharding = f"FSDP2 over {world.world_size} ranks" if world.world_size > 1 else "one process"
        return (
            f"vcr1-fast {__version__}: model {config.model.path} in {dtype} on {world.device.type}, {sharding}; "
            f"{self.kernels.describe()}; "
            f"engine: {config.rollout.engine}; video: {self.source.describe()}; "
            f"rewards: {native.in_use()}; recipe: {config.task.recipe}{self._prompt_files()}"
        )

    def _prompt_files(self) -> str:
        digests = prompt_digests(self.tasks)
        named = [f"{task}: {self.config.task.prompts[task]} ({digests[task][:8]})" for task in digests]
        return f"; prompt files: {', '.join(named)}" if named else ""

    def state(self, step: int, prompts: PromptStream, num_tokens: int, policy_version: int, program: str) -> RunState:
        """What a checkpoint made now says about the run."""
        where = (step, prompts.position, num_tokens, policy_version)
        of_run = (self.source.name, config_to_yaml(self.config), self.base_digest, program)
        digests = {"data": prompts.digest, "prompts": prompt_digests(self.tasks)}
        return RunState(*where, *of_run, **digests, asked_model=self.asked_model, has_signal=False)

    @cached_property
    def base_digest(self) -> str:
        """Of the model that the run starts from."""
        return model_digest(model_folder(self.config.model.path))

    def _load(self, name: Literal["train", "eval"]) -> list[Example]:
        """The examples of data.train, or of data.eval with its refused rows, which evaluation counts as wrong."""
        files = self.config.data.sources(name)
        if not files:
            raise ConfigError(
                f"data.{name} is empty, wanted at least one annotation file; for a first try: vcr1-fast synth tiny, "
                "then vcr1-fast train tiny"
            )
        contents = annotation_contents(self.config, self.tasks, name)
        rows = [
            row
            for file, content in zip(files, contents, strict=True)
            for row in content.rows
            if file.task in (None, row.task)
        ]
        errors = [error for content in contents for error in content.errors]
        for content in contents:
            say(f"data.{name}: {content.summary}")
        num_refused = sum(row.is_refused for row in rows)
        if errors and self.world.is_main:
            for error in errors[:10]:
                print(f"bad annotation: {error}", file=sys.stderr)
            counted = f", of which {num_refused} count as wrong answers" if name == "eval" and num_refused else ""
            num_rows = len(rows) - num_refused + len(errors)
            print(f"data.{name}: {len(errors)} of {num_rows} rows left out{counted}", file=sys.stderr)
        if num_refused == len(rows):
            raise ConfigError(f"data.{name} has no usable row in {', '.join(file.path for file in files)}")
        if name == "eval":
            return [replace(row, is_held_out=True) for row in rows]
        return [row for row in rows if not row.is_refused]


@contextlib.contextmanager
def open_run(config: Config, command: RunCommand) -> Iterator[Run]:
    """Join the process group, check, lock and prepare the folder, open the video reader, say what is used.

    `command`: whose settings are checked; eval leaves the run's folder alone, and takes a checkpoint for a model.
    Raises ConfigError or OSError before anything slow when settings, model or folder are unusable.
    """
    world, writes = init_distributed(config.model.device), command != "eval"
    with contextlib.ExitStack() as opened:
        opened.callback(shutdown, world)
        check_settings(config, command, world.world_size)
        if writes and config.optimizer.name == "adamw_8bit":
            require_torchao()
        asked_model = config.model.path
        recorded = recorded_state(config) if writes and world.is_main else {}
        config = with_hub_model(config, world, recorded_model(config, recorded))
        check_model(config)
        if command == "train" and world.device.type == "cuda":
            memory_gb = torch.cuda.get_device_properties(world.device).total_memory / 1e9
            check_memory(config, world.world_size, memory_gb)
        if command == "eval":
            config = with_model_of_checkpoint(config, world)
        limits = prompt_limits(config, command)
        tokenizer = load_tokenizer(config.model.path)
        folder = Path(config.train.output_dir)
        if writes:
            opened.enter_context(locked_folder(folder, world))
            folder = prepare_output_dir(folder, world)
        seed_generators(config.train.seed, world.rank)
        choose_half(world)
        tasks = make_tasks(config.task, judge=config.judge)
        kept = recorded.get("reader") if writes else trained_with(config)
        seeing = with_reader(config, world, tasks, kept, trains=writes)
        proof = choose_kernels(config, world)
        source = opened.enter_context(contextlib.closing(open_source(seeing, world.device, proof.choice)))
        require_one_reader(source.name, world)
        builder = PromptBuilder(
            tokenizer,
            tasks,
            source,
            prefetch=source.prefetch,
            limits=limits,
            video_first=bool(config.task.video_first),
            writes_times=config.task.timestamps == "text",
            tokens_per_second=tokens_per_second(config),
        )
        if writes and world.is_main:
            (folder / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
        quarantine = open_quarantine(config, folder if writes else None)
        has_export = command == "sft" or (command == "train" and config.checkpoint.export)
        export = planned_export(config, folder, source.name, world) if has_export else None
        seen_in_evaluation = opened.enter_context(eval_builder(seeing, builder, source, proof.choice))
        parts = (source, builder, seen_in_evaluation, quarantine)
        run = Run(config, world, folder, tasks, *parts, proof.choice, export, asked_model)
        lines = [run.describe(), *proof.lines(), quarantine.describe(), describe_eval_video(config)]
        say("\n".join(filter(None, lines)))
        yield run


def open_quarantine(config: Config, folder: Path | None) -> Quarantine:
    """The run's own list, and the one that data.quarantine names. `folder` None: kept in memory only."""
    own = folder / "quarantine.jsonl" if folder else None
    further = Path(config.data.quarantine).expanduser() if config.data.quarantine else None
    return Quarantine(own, further=further, retry=config.data.retry_quarantined)


def due(every: int, step: int) -> bool:
    """Whether something done every so many steps is done after this one; 0 is never."""
    return every > 0 and step % every == 0


def sampling_of(config: Config, world: World, step: int) -> SamplingParams:
    """How the answers of a step are drawn on this rank.

    The seed is another one for each step and rank, a pure function of them: a resumed run samples what it would have.
    """
    seed = (config.train.seed * 1_000_003 + step) * 8192 + world.rank  # 8192: more ranks than any run has
    return config.rollout.sampling(seed)


def outcome(run: Run, has_signal: bool, num_steps_done: int, causes: Sequence[str] = ()) -> dict[str, Any]:
    """For the last line of training: exit_code, and, after a run without one gradient that is not 0, why that is.

    `causes`: the likely ones, see no_signal.py.
    """
    if has_signal or not num_steps_done:  # a run that was done before has said it then
        return {"exit_code": 0}
    reason = (
        "no update of this run had a gradient that is not 0, so the model is as it was at the start: see bad samples, "
        f"reward failures and zero-variance in the lines above and in {run.folder / 'metrics.jsonl'}"
        + "".join(f"; likely: {cause}" for cause in causes)
    )
    if run.world.is_main:
        print(f"vcr1-fast: no signal: {reason}", file=sys.stderr)
    return {"exit_code": exit_codes.NO_SIGNAL, "no_signal": reason}


def make_saver(run: Run, learner: Learner) -> CheckpointSaver:
    parts = (learner.policy, learner.optimizer, learner.schedule)
    return CheckpointSaver(run.folder, parts, run.config.checkpoint, run.world)


def trained_with(config: Config) -> str | None:
    """The name of the video reader that made of clips what the model was trained on; None where it does not say."""
    path = model_folder(config.model.path) / TRAINED_WITH
    return read_json(path).get("reader") if path.is_file() else None


def warn_of_other_reader(run: Run) -> None:
    """A line on stderr when this run's model was trained on what another video reader made of its clips."""
    before = trained_with(run.config)
    if before not in (None, run.source.name) and run.world.is_main:
        print(
            f"{run.config.model.path} was trained with the video reader {before!r}, this run reads with "
            f"{run.source.name!r}, which may give other pixels: set video.reader, or install that version",
            file=sys.stderr,
        )


def open_weight_sync(run: Run, learner: Learner, engine: RolloutEngine, policy_version: int) -> WeightSync:
    """`policy_version`: of the weights that the engine will have after the first push; 0: of a new run."""
    rollout = run.config.rollout
    return WeightSync(
        learner.policy,
        engine,
        dtype=learner.dtype,  # which open_engine resolves, too
        policy_version=max(policy_version - 1, 0),
        skips_frozen=not rollout.sglang.release_memory,
        world=learner.world,
        host_copy=engine.host_copy if isinstance(engine, SGLangEngine) else None,
    )


def planned_export(config: Config, folder: Path, reader: str, world: World) -> ExportPlan:
    """Everything but the weights, tried now: after days of training is too late to hear that it cannot be written."""
    wanted, source = config.checkpoint.export_dtype, model_folder(config.model.path)
    record = json.dumps({"vcr1_fast": __version__, "reader": reader}) + "\n"
    dtype = None if wanted == "auto" else getattr(torch, wanted)
    plan = plan_export(source, folder / "model", dtype, {TRAINED_WITH: record.encode()})

    def try_all() -> None:
        try_export(plan.folder, CONFIG_FILE, plan.files, plan.num_bytes)
        if config.model.lora.rank:
            try_export(folder / "adapter", ADAPTER_CONFIG, {})

    on_main_rank("trying the export", try_all, world)
    return plan


def export_model(run: Run, learner: Learner) -> Path:
    """Write the policy as a Hugging Face folder below the run's own, and its adapter beside it. A collective."""
    assert run.export is not None, "of a command that exports"
    folder = export_hugging_face(learner.policy, run.export, run.world)
    say(f"Hugging Face model: {folder}")
    settings = shlex.quote(str(run.folder / "config.yaml"))
    say(f"score it: vcr1-fast eval {settings} --model.path={shlex.quote(str(folder))}")
    say(f"ask it: vcr1-fast ask {shlex.quote(str(folder))} VIDEO QUESTION --task TASK")
    lora = run.config.model.lora
    if lora.rank:
        adapter = export_adapter(learner.policy, run.folder / "adapter", lora, run.config.model.path, run.world)
        say(f"adapter for PEFT: {adapter}")
    return folder
