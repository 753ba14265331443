"""The state of a run -> disk and back.

    output_dir/checkpoints/step_000010/
        shard-*.safetensors     trained weights and AdamW moments (torch.distributed.checkpoint, resharded on load)
        rng/rank_00000.safetensors
        answers/rank_00000.safetensors    drawn ahead of the learner, or begun
        state.json              written last: step, data position, schedule, versions, size and CRC-32 of every file

Called by the training loop. A checkpoint is written aside as `step_000010.tmp-<pid>`, flushed, and renamed, so a crash
at any point leaves only complete checkpoints under their final names. Nothing is pickled: all files are safetensors or
JSON, so a checkpoint from somebody else cannot run code. Frozen weights are not in it: they are those of `model.path`.
`save_checkpoint` does it all at once; saver.py has the same files written while the run goes on.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vcr1_fast.learner.adamw_8bit import AdamW8bit, as_stored, empty_state, take_stored
from vcr1_fast.learner.sharding import (
    World,
    all_max_int,
    barrier,
    gather_all,
    named_weights,
    on_all_ranks,
    on_main_rank,
)
from vcr1_fast.run.checkpoint_files import (
    CHECKPOINTS_FOLDER,
    DamagedError,
    read_state,
    scan,
)
from vcr1_fast.run.checkpoint_layout import ShardPlan, TensorFile, local_part, tensor_file
from vcr1_fast.run.checkpoint_writer import FileEntry, write_file, write_state
from vcr1_fast.run.folder import replace_folder
from vcr1_fast.run.random_state import rng_state, set_rng_state
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.types import RunError

_LOG = logging.getLogger(__name__)
_SAME_MODEL = "set model.path, model.lora, model.freeze and model.freeze_vision to those the run began with"


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands, beside its tensors."""

    step: int  # steps done
    position: int  # examples taken from the shuffled data so far, unusable ones included
    num_tokens: int  # packed tokens trained on so far, over all ranks
    policy_version: int  # of the weights
    reader: str  # video reader and version, for example "pyav 18.1"; another reader may give other pixels
    config_yaml: str  # the resolved configuration
    base: str = ""  # digest of the starting model, which frozen weights come from
    program: str = "train"  # the command that made it, train or sft
    data: str = ""  # digest of the examples of data.train, PromptStream.digest
    prompts: Mapping[str, str] = field(default_factory=dict)  # task -> digest of its prompt file, prompt_digests
    task_scale: Mapping[str, Sequence[float]] = field(default_factory=dict)  # advantages.TaskScale.moments
    pending: Sequence[Mapping[str, Any]] = field(default_factory=list)  # steps drawn ahead, see RolloutQueue.pending
    before: Mapping[str, Any] = field(default_factory=dict)  # held-out scores before the first step, scores_as_dict
    again: Mapping[str, Sequence[int]] = field(default_factory=dict)  # examples without a score, PromptStream.again
    failed_steps: Mapping[str, int] = field(default_factory=dict)  # Collector.failed_steps
    has_signal: bool = True  # whether any update so far had a gradient that is not 0; True where it was not noted
    asked_model: str = ""  # model.path as it was given; of a model of the Hub config_yaml has the commit
    answers: Mapping[str, Tensor] = field(default_factory=dict)  # this rank's part of them; in a file of its own


@dataclass(frozen=True)
class Unwritten:
    """A checkpoint whose folder is there, and whose files are not."""

    final: Path
    aside: Path  # where it is written
    document: Mapping[str, Any]  # of state.json, without the files
    files: Sequence[TensorFile]  # of this rank


def save_checkpoint(
    output_dir: str | Path,
    policy: nn.Module,
    optimizer: Optimizer,
    schedule: LambdaLR,
    state: RunState,
    world: World,
    keep: int,
) -> Path:
    """Write `step_<state.step>` and delete all but the `keep` checkpoints saved last. A collective: call on all ranks.

    A checkpoint of the same step is replaced. Returns the new folder. Raises OSError when it cannot be written, and
    RunError for weights or moments that are not finite, on every rank; earlier checkpoints are then untouched.
    """
    made = begin_checkpoint(output_dir, policy, optimizer, schedule, state, world)
    mine: dict[str, FileEntry] = {}

    def write() -> None:
        for file in made.files:
            mine[file.name] = write_file(made.aside / file.name, file.parts())

    with removed_on_error(made.aside, world):
        on_all_ranks("writing the checkpoint", write, world)
        entries = {name: entry for part in gather_all(mine, world) for name, entry in part.items()}

        def publish() -> None:
            write_state(made.aside, made.document, entries)
            replace_folder(made.aside, made.final)

        on_main_rank("publishing the checkpoint", publish, world)
    if world.is_main:
        prune(Path(output_dir).absolute(), keep)
    barrier(world)
    return made.final


def begin_checkpoint(
    output_dir: str | Path,
    policy: nn.Module,
    optimizer: Optimizer,
    schedule: LambdaLR,
    state: RunState,
    world: World,
    plan: ShardPlan | None = None,
) -> Unwritten:
    """What is to be written, and a folder for it. A collective.

    `plan`: that of the save before, whose names and shapes are mostly the same. Raises as `save_checkpoint` does.
    """
    tensors = _tensors(policy, optimizer)
    _require_finite(tensors, state.step, world)
    parent = Path(output_dir).absolute() / CHECKPOINTS_FOLDER
    final = parent / f"step_{state.step:06d}"
    pid = all_max_int(os.getpid() if world.is_main else 0, world)
    aside = parent / f"{final.name}.tmp-{pid}"
    document = asdict(replace(state, answers={})) | {
        "num_updates": schedule.last_epoch,
        "world_size": world.world_size,
        "versions": installed_versions(),
    }

    def make_folders() -> None:
        document["save_index"] = 1 + max((read_state(path)["save_index"] for path in scan(parent.parent)[0]), default=0)
        for name in ("rng", "answers"):
            (aside / name).mkdir(parents=True)

    with removed_on_error(aside, world):
        on_main_rank("making the checkpoint folder", make_folders, world)
    own: list[TensorFile] = []  # of this rank alone

    def take_own() -> None:
        own.append(tensor_file(_rng_name(world), rng_state()))
        if state.pending:
            own.append(tensor_file(_answers_name(world), state.answers))

    with removed_on_error(aside, world), _dcp_errors("plan", aside):
        on_all_ranks("saving the random state and answers", take_own, world)
        files = (plan or ShardPlan()).files(tensors, aside, world)
    return Unwritten(final, aside, document, [*files, *own])


@contextmanager
def removed_on_error(aside: Path, world: World) -> Iterator[None]:
    """A full disk must not stay full."""
    try:
        yield
    except Exception:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def load_checkpoint(
    checkpoint: str | Path,
    policy: nn.Module,
    optimizer: Optimizer | None,
    schedule: LambdaLR | None,
    world: World,
) -> RunState:
    """Load weights, AdamW moments, schedule and this rank's random state, in place. A collective: call on all ranks.

    The number of ranks may differ from that at saving; ranks beyond the saved ones keep the random state they have.
    The learning rate follows from the number of updates done and the schedule given here. Without an optimizer only
    the weights are loaded, and the random state is left alone.
    Contents are not compared with their CRC-32 again: `resolve_resume` does. Raises ConfigError when the checkpoint is
    not complete or is of a model with other weights.
    """
    checkpoint = Path(checkpoint)
    try:
        document = read_state(checkpoint)
    except DamagedError as error:
        raise ConfigError(
            f"{checkpoint} is not a complete checkpoint ({error}): give another, or train.resume=auto"
        ) from None
    reader = HuggingFaceStorageReader(str(checkpoint))
    entries = reader.read_metadata().state_dict_metadata
    saved = {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    if optimizer is not None:
        _make_optimizer_state(policy, optimizer, set(saved))
    wanted = _tensors(policy, optimizer)
    for name, tensor in wanted.items():
        if saved.get(name) != tuple(tensor.shape):
            raise ConfigError(
                f"{checkpoint} is of another model: {name} is {saved.get(name, 'absent')}, wanted "
                f"{tuple(tensor.shape)}: {_SAME_MODEL}"
            )
    trained = next((name for name in saved if name.startswith("model.") and name not in wanted), None)
    if trained is not None:  # it would go back to what it was in model.path, without a word
        raise ConfigError(f"{checkpoint} has {trained}, which is not trained here: {_SAME_MODEL}")
    with _dcp_errors("read", checkpoint):
        dcp_load(wanted, storage_reader=reader, no_dist=world.world_size == 1)
    if isinstance(optimizer, AdamW8bit):
        for name, weight in named_weights(policy).items():
            for moment, value in optimizer.state.get(weight, {}).items():
                take_stored(value, wanted[f"optimizer.{moment}.{name}"])
    if schedule is not None:
        _set_num_updates(schedule, document["num_updates"])
    rng_path = checkpoint / _rng_name(world)
    if optimizer is not None and rng_path.exists():
        set_rng_state(load_file(rng_path))
    known = {f.name for f in fields(RunState)} & set(document)  # an older checkpoint may lack a field
    state = RunState(**{name: document[name] for name in known})
    if state.pending and document["world_size"] == world.world_size:  # else each rank has other prompts
        state = replace(state, answers=load_file(checkpoint / _answers_name(world)))
    return state


def _require_finite(tensors: Mapping[str, Tensor], step: int, world: World) -> None:
    """One pass over this rank's shards: 3.4 GB/s on a CPU core."""
    local = {name: local_part(tensor) for name, tensor in tensors.items()}
    floats = {name: tensor for name, tensor in local.items() if tensor.is_floating_point() and tensor.numel()}
    extremes = [torch.stack(torch.aminmax(tensor)).float().cpu() for tensor in floats.values()]  # NaN where one is
    bad = [name for name, pair in zip(floats, extremes, strict=True) if not pair.isfinite().all()]
    found = [name for names in gather_all(bad[:1], world) for name in names]
    if found:
        raise RunError(
            f"after step {step} {found[0]} is not finite, so no checkpoint is written; go on from the last one with a "
            "lower optimizer.learning_rate"
        )


def installed_versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    packages = ("vcr1-fast", "torch", "transformers")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def _rng_name(world: World) -> str:
    return f"rng/rank_{world.rank:05d}.safetensors"


def _answers_name(world: World) -> str:
    return f"answers/rank_{world.rank:05d}.safetensors"


def _tensors(policy: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Live tensors by checkpoint name: `model.<weight>` and `optimizer.<moment>.<weight>`; loading writes into them.
    Moments of 8 bits are copies instead, in float32 on the host."""
    named = named_weights(policy)
    weights = {name: w for name, w in named.items() if w.requires_grad or not isinstance(w, nn.Parameter)}
    tensors = {f"model.{name}": weight.detach() for name, weight in weights.items()}
    moments = optimizer.state if optimizer is not None else {}
    for name, weight in weights.items():
        for moment, value in moments.get(weight, {}).items():
            # The step count has no dimension, and slices of safetensors need one; the view shares its memory.
            stored = as_stored(weight, value) if isinstance(optimizer, AdamW8bit) else value
            tensors[f"optimizer.{moment}.{name}"] = stored.view(1) if stored.ndim == 0 else stored
    return tensors


def _make_optimizer_state(policy: nn.Module, optimizer: Optimizer, saved: set[str]) -> None:
    """Give the optimizer empty moments for exactly the parameters that have saved ones, to be loaded into."""
    names = {id(weight): name for name, weight in named_weights(policy).items()}
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if f"optimizer.step.{names[id(parameter)]}" not in saved:
                continue
            if isinstance(optimizer, AdamW8bit):
                optimizer.state[parameter] = empty_state(parameter)
                continue
            step_device = parameter.device if group["fused"] or group["capturable"] else "cpu"  # as AdamW makes it
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=step_device),
                "exp_avg": torch.zeros_like(parameter.detach()),
                "exp_avg_sq": torch.zeros_like(parameter.detach()),
            }


def _set_num_updates(schedule: LambdaLR, num_updates: int) -> None:
    learning_rates = [
        base * factor(num_updates) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    schedule.load_state_dict(
        {
            "last_epoch": num_updates,
            "_step_count": num_updates + 1,
            "_last_lr": learning_rates,
            "lr_lambdas": [None] * len(learning_rates),
        }
    )
    for group, learning_rate in zip(schedule.optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate


@contextmanager
def _dcp_errors(action: str, folder: Path) -> Iterator[None]:
    """Make torch's CheckpointException, which is no Exception and is raised on all ranks, an OSError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
            yield
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())
        raise OSError(f"cannot {action} checkpoint {folder}: {reasons}") from error


def prune(output_dir: Path, keep: int, spared: str = "") -> None:
    """Delete all but the `keep` >= 1 checkpoints saved last and the one named `spared`. A folder that cannot be deleted
    is only warned about."""
    for path in scan(output_dir)[0][: -max(1, keep)]:
        if path.name == spared:
            continue
        try:
            # Renamed first: a deletion that is cut short must not leave a folder that looks like a checkpoint.
            doomed = path.with_name(f"{path.name}.tmp-old-{os.getpid()}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            _LOG.warning("cannot delete old checkpoint %s: %s", path, error)
