"""`python -m bench weight_sync`: seconds and GB/s from the learner's weights into the rollout engine, by each way.

A random model of a chosen size is pushed by `WeightSync`. Two kinds of rows:

learner  gathering, casting and laying out, with workers that answer at once: what the learner itself costs
engine   the same into a real SGLang worker, to its last answer; where $VCR1_SGLANG_PYTHON has SGLang

The first push of a real worker is given by itself: there every weight's checksum is compared on both sides, which is
the check that the timed pushes arrive. The limit is a copy of the same bytes within the memory of the same device.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bench.columns import cell_heads, cell_table
from bench.harness import measure_copy_gb_s, reason_of, summarize
from vcr1_fast.learner.model import load_tokenizer
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.rollout.sgl.delivery import make_delivery
from vcr1_fast.rollout.sgl.feed import Feed
from vcr1_fast.rollout.sgl.link import WorkerLink
from vcr1_fast.rollout.sgl.messages import Message
from vcr1_fast.rollout.sgl.weights import Weights
from vcr1_fast.rollout.sgl.workers import Seat
from vcr1_fast.rollout.sglang_engine import SGLangEngine
from vcr1_fast.rollout.weight_table import WeightTable
from vcr1_fast.run.model_folder import model_folder
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.settings.learning import SGLangConfig

Way = Literal["shared_memory", "cuda_ipc", "broadcast"]
WAYS: dict[str, tuple[Way, ...]] = {"cpu": ("shared_memory", "broadcast"), "cuda": get_args(Way)}
WIDE_FROM_MB = 2000


@dataclass(frozen=True)
class Setup:
    """What all rows share."""

    policy: nn.Module  # the model at .hf
    dtype: torch.dtype  # that weights are sent in
    device: torch.device
    num_bytes: int
    copy_gb_s: float  # bytes copied per second, each read once and written once
    repeats: int


class Sink:
    """A worker that takes whatever comes."""

    def send(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> None: ...

    def answer(self, timeout_s: float) -> Message:
        return Message("loaded", {"id": 0, "wrong": []})

    def kill(self) -> None: ...


class SinkEngine:
    """The learner's half of `SGLangEngine.load_weights`."""

    policy_version = 0

    def __init__(self, way: Way, setup: Setup, bucket_mb: int, *, keeps_copy: bool) -> None:
        config = SGLangConfig(weights=way, bucket_mb=bucket_mb, keep_host_copy=keeps_copy)
        self._delivery = make_delivery(config, setup.dtype, setup.device)
        self._table, self._seats = WeightTable(), [Seat(cast(WorkerLink, Sink()), is_checked=True)]

    def load_weights(self, weights: Weights, policy_version: int) -> None:
        with Feed(self._seats, lambda: 0, policy_version, 60.0) as feed:
            self._delivery.push(self._table.checked(weights), feed, self._seats)

    def close(self) -> None:
        self._delivery.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=None, help="of weights (default: 256, on a GPU 6000)")
    parser.add_argument("--bucket-mb", type=int, default=512, help="rollout.sglang.bucket_mb")
    parser.add_argument("--repeats", type=int, default=7, help="timed pushes of each way; the median counts")
    parser.add_argument("--quick", action="store_true", help="8 MB, 3 pushes, no real engine")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row for each way and side; `absent` names what could not run, and why."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    megabytes = 8 if arguments.quick else arguments.megabytes or (6000 if device.type == "cuda" else 256)
    hf = sized_model(megabytes, dtype).to(device)
    num_bytes = sum(weight.numel() * dtype.itemsize for weight in hf.parameters())
    copy_gb_s = measure_copy_gb_s(device, max(num_bytes, 2**26)) / 2
    policy = nn.ModuleDict({"hf": hf})
    setup = Setup(policy, dtype, device, num_bytes, copy_gb_s, 3 if arguments.quick else arguments.repeats)
    rows: list[dict[str, Any]] = []
    absent: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        for side, way, keeps_copy in plan(device, has_engine=not arguments.quick and sglang_python() is not None):
            label = way + (", no host copy" if not keeps_copy else "")
            try:
                with opened(side, way, setup, Path(name), arguments.bucket_mb, keeps_copy) as engine:
                    rows.append({"side": side, "way": label, **measure(engine, setup)})
            except (RuntimeError, OSError, ValueError) as error:
                absent.append({"side": side, "way": label, "reason": reason_of(error)})
    if sglang_python() is None and not arguments.quick:
        absent.append({"side": "engine", "way": "all", "reason": "VCR1_SGLANG_PYTHON names no interpreter with SGLang"})
    report(rows, absent, setup)
    return {
        "is_gpu": device.type == "cuda",
        "num_bytes": num_bytes,
        "dtype": str(dtype).removeprefix("torch."),
        "bucket_mb": arguments.bucket_mb,
        "copy_gb_s": copy_gb_s,
        "rows": rows,
        "absent": absent,
    }


def plan(device: torch.device, *, has_engine: bool) -> Iterator[tuple[str, Way, bool]]:
    """(side, way, whether weights are kept in host memory, too). A broadcast needs somebody who takes part."""
    for way in WAYS[device.type]:
        if way != "broadcast":
            yield "learner", way, True
        if way == "cuda_ipc":
            yield "learner", way, False
        if has_engine and not (way == "broadcast" and device.type == "cuda"):  # NCCL wants a GPU for each rank
            yield "engine", way, True
            if way in ("broadcast", "cuda_ipc"):
                yield "engine", way, False


@contextlib.contextmanager
def opened(
    side: str, way: Way, setup: Setup, folder: Path, bucket_mb: int, keeps_copy: bool
) -> Iterator[RolloutEngine]:
    """An engine that takes weights by `way`. Raises what makes that impossible here."""
    if side == "learner":
        engine: Any = SinkEngine(way, setup, bucket_mb, keeps_copy=keeps_copy)
    else:
        hf = cast(Qwen2_5_VLForConditionalGeneration, setup.policy.get_submodule("hf"))
        config = SGLangConfig(python=sglang_python(), weights=way, bucket_mb=bucket_mb, keep_host_copy=keeps_copy)
        checkpoint = folder / "checkpoint"
        if not checkpoint.exists():
            save_configuration(hf, checkpoint)
        engine = SGLangEngine(
            checkpoint,
            load_tokenizer("tiny"),
            config,
            dtype=setup.dtype,
            device=setup.device,
        )
    with contextlib.closing(engine):
        yield engine


def measure(engine: RolloutEngine, setup: Setup) -> dict[str, Any]:
    """Seconds of the first push, and of the ones after it, which change every weight in a way that shows."""
    sync = WeightSync(setup.policy, engine, dtype=setup.dtype)
    report = sync.push()
    first_s = report.duration_s
    samples_ms: list[float] = []
    for _ in range(setup.repeats):
        if setup.device.type == "cuda":
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        report = sync.push()
        samples_ms.append((time.perf_counter() - began_s) * 1e3)
    timing = summarize(samples_ms)
    gb_s = report.num_bytes / timing.median_ms / 1e6
    return {
        "num_bytes": report.num_bytes,
        "first_s": first_s,
        "median_s": timing.median_ms / 1e3,
        "low_s": timing.low_ms / 1e3,
        "high_s": timing.high_ms / 1e3,
        "gb_s": gb_s,
        "percent_of_copy": 100 * gb_s / setup.copy_gb_s,
    }


def sized_model(megabytes: int, dtype: torch.dtype) -> nn.Module:
    """A random Qwen2.5-VL with the packaged tiny model's tokenizer: layers of 512, or 2048 as in 3B, up to the size."""
    config: Any = Qwen2_5_VLConfig.from_pretrained(model_folder("tiny"))
    width, inner = (2048, 11008) if megabytes >= WIDE_FROM_MB else (512, 2048)
    head = width // 8
    layer_bytes = dtype.itemsize * (2 * width * width + 2 * width * 2 * head + 3 * width * inner)
    text = config.text_config
    text.hidden_size, text.intermediate_size = width, inner
    text.num_attention_heads, text.num_key_value_heads = 8, 2
    text.num_hidden_layers = max(1, round(megabytes * 1e6 / layer_bytes))
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [head // 8, head // 16 * 3, head // 16 * 3]}
    config.vision_config.out_hidden_size = width
    return cast(nn.Module, Qwen2_5_VLForConditionalGeneration(config)).to(dtype)


CELLS = {
    "side": ("learner: workers that answer at once; engine: a real worker of SGLang", "{side}"),
    "way": ("rollout.sglang.weights", "{way}"),
    "MB": ("1e6 bytes handed over", lambda row: f"{row['num_bytes'] / 1e6:,.0f}"),
    "first push s": ("seconds of the first; a real worker compares every weight's checksum in it", "{first_s:.2f}"),
    "s": ("median of those after it", "{median_s:.3f}"),
    "quartiles": ("of that", "{low_s:.3f}-{high_s:.3f}"),
    "GB/s": ("1e9 bytes a second", "{gb_s:.2f}"),
    "% of copy": ("of the speed of a copy in memory", "{percent_of_copy:.0f}"),
}
COLUMN_HEADS = cell_heads(CELLS)


def save_configuration(hf: nn.Module, folder: Path) -> None:
    """All that SGLang reads of a checkpoint but the weights."""
    folder.mkdir()
    cast(PreTrainedModel, hf).config.save_pretrained(folder)
    for path in model_folder("tiny").iterdir():
        if path.is_file() and path.suffix == ".json" and path.name != "config.json":
            shutil.copy(path, folder)
    load_tokenizer("tiny").save_pretrained(folder)


def sglang_python() -> str | None:
    named = os.environ.get("VCR1_SGLANG_PYTHON")
    return named if named and Path(named).is_file() else None


def report(rows: list[dict[str, Any]], absent: list[dict[str, str]], setup: Setup) -> None:
    console = Console(width=118)
    copy_s = setup.num_bytes / setup.copy_gb_s / 1e9
    title = f"{setup.num_bytes / 1e6:,.0f} MB of weights; copying them takes {copy_s:.3f} s"
    console.print(cell_table(title, CELLS, rows, ("side", "way")))
    for row in absent:
        console.print(f"left out: {row['side']}, {row['way']}: {row['reason']}")
