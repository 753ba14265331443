"""`vcr1-fast init my.yaml --data FILE... --model PATH --gpus N`: a commented configuration for data of one's own.

Reads the annotation files as a run does, and the model's config.json; new_config.py chooses the values.
"""

from __future__ import annotations

import importlib.util
import math
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vcr1_fast.commands.doctor import sglang_interpreter
from vcr1_fast.commands.new_config import Choice, Facts, checkpoint_gb, choose, config_of, phases_gb
from vcr1_fast.learner.memory_sums import SMALLEST_GPU_GB
from vcr1_fast.learner.model_size import read_model_size
from vcr1_fast.prompts.dataset import AnnotationSource, read_annotation_files
from vcr1_fast.run.hub import with_hub_config
from vcr1_fast.run.telemetry import say
from vcr1_fast.run.terminal import printable
from vcr1_fast.settings.checks import check_settings
from vcr1_fast.settings.config import Config, ConfigError, ModelConfig, TaskConfig
from vcr1_fast.settings.io import load_config
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Example

GPUS_PER_NODE = 8
MAX_SHOWN_ERRORS = 10
COLUMNS = 100  # of a comment


def init_command(
    out: str,
    train: Sequence[str],
    held_out: Sequence[str],
    model: str,
    num_gpus: int | None = None,
    video_root: str | None = None,
) -> None:
    """Write `out` and print the commands that come next. `num_gpus` None: those of this machine; 0: a CPU.

    Raises ConfigError when `out` exists, for files that cannot be read or have no usable row, and for a model that
    is not known or does not fit; OSError when `out` cannot be written.
    """
    path = Path(out)
    if path.exists():
        raise ConfigError(f"{out} exists and is left as it is: give another name, or delete it first")
    num_gpus = _gpus_here() if num_gpus is None else num_gpus
    pinned = with_hub_config(Config(model=ModelConfig(path=model))).model.path
    size = read_model_size(pinned)
    say(f"model: {size.params:,} parameters ({size.source})")
    rows = _read(train, held_out, video_root)
    facts = Facts(
        model=model,
        size=size,
        train=tuple(train),
        eval=tuple(held_out),
        video_root=video_root,
        num_by_task=Counter(row.task for row in rows),
        durations_s=[row.duration_s for row in rows if row.duration_s < float("inf")],
        num_gpus=num_gpus,
        sglang_python=_sglang(),
        output_dir=f"runs/{path.stem}",
    )
    chosen = choose(facts)
    config, ranks = config_of(chosen), max(num_gpus, 1)
    check_settings(config, "train", ranks)
    commands = next_commands(out, num_gpus)
    with path.open("x", encoding="utf-8") as file:
        file.write(as_yaml(chosen, ["Written by `vcr1-fast init`; change what you know better.", *commands]))
    read = load_config(str(path), [])
    assert config_of(chosen, read) == read, "what is written is what was chosen"
    where = f"{num_gpus} GPU{'s' * (num_gpus > 1)}" if num_gpus else "a CPU"
    say(f"wrote {out}, for {where}; a checkpoint takes {checkpoint_gb(chosen, size):.1f} GB")
    if num_gpus:
        needed = ", ".join(f"{name} {gb:.0f}" for name, gb in phases_gb(config, size, ranks).items())
        say(f"worst case on each GPU of {SMALLEST_GPU_GB:.0f} GB, by sums: {needed} GB")
    if "captioning" in facts.num_by_task:
        say(f"captions are compared by a judge: {config.judge.model} at {config.judge.url}, see judge.url, judge.model")
    say("next:")
    for command in commands:
        say(f"  {command}")


def next_commands(out: str, num_gpus: int) -> list[str]:
    """Look at the data, plan, train: each with what it is for."""
    file = shlex.quote(printable(out).replace("\n", r"\n"))
    nodes, on_each = -(-num_gpus // GPUS_PER_NODE), min(num_gpus, GPUS_PER_NODE)
    start = "vcr1-fast train"
    if num_gpus > 1:
        several = f"--nnodes={nodes} " if nodes > 1 else ""
        start = f"torchrun {several}--nproc-per-node={on_each} -m vcr1_fast train"
    plan = [f"vcr1-fast train {file} --dry-run={num_gpus}    # memory, seconds and disk"] if num_gpus else []
    return [f"vcr1-fast data {file}    # counts rows and videos", *plan, f"{start} {file}"]


def as_yaml(chosen: Mapping[str, Choice], head: Sequence[str]) -> str:
    """The file: `head` as comments, then each value below its reason."""
    tree: dict[str, Any] = {}
    for key, choice in chosen.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = choice
    return "\n".join([*(f"# {line}" for line in head), *_lines(tree, "")]) + "\n"


def _lines(tree: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, node in tree.items():
        if isinstance(node, Choice):
            yield from (f"{indent}# {line}" for line in textwrap.wrap(printable(node.why), COLUMNS - len(indent)))
            yield f"{indent}{name}: {_plain(node.value)}"
        else:
            yield f"{indent}{name}:"
            yield from _lines(node, indent + "  ")


def _plain(value: Any) -> str:
    if isinstance(value, float) and value < 1e-3:
        return f"{value:.1e}"  # YAML wants the dot that Python leaves out
    listed = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(listed, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def _read(train: Sequence[str], held_out: Sequence[str], video_root: str | None) -> list[Example]:
    """The usable rows to train on; what is wrong with the others goes to stderr.

    Raises ConfigError as the reader does, for a file that is both, and where all rows of one kind are unusable.
    """
    sources = [AnnotationSource(file, video_root) for file in (*train, *held_out)]
    contents = read_annotation_files(sources, make_tasks(TaskConfig()))
    for content in contents:
        say(str(content.summary))
    for error in [error for content in contents for error in content.errors][:MAX_SHOWN_ERRORS]:
        print(f"bad annotation: {error}", file=sys.stderr)
    kinds = ((train, contents[: len(train)]), (held_out, contents[len(train) :]))
    for files, part in kinds:
        if files and not any(content.examples for content in part):
            raise ConfigError(f"there is no usable row in {', '.join(files)}: see the reasons above")
    return [row for content in kinds[0][1] for row in content.examples]


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _sglang() -> str | None:
    """The interpreter that has it: of .venv-sglang here, or this one."""
    python = sglang_interpreter()
    return python if python != sys.executable or importlib.util.find_spec("sglang") else None
