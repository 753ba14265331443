"""Starts the process that plays the GPUs, and reads what it measured. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vcr1_fast.fake_gpu.predict import H100_RATES, Rates
from vcr1_fast.fake_gpu.shim import FakeGpuError

# Of the parent's: a launcher's world, and Triton's interpreter, which would run kernels on tensors without values
_NOT_INHERITED = (
    "TRITON_INTERPRET",
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


Grid = tuple[int, int, int]
Group = tuple[Grid | tuple[Grid, ...], tuple[int, ...]]  # see groups.GroupShape: what it shows, tokens of completions


@dataclass(frozen=True)
class Case:
    """One learner and what it does. Of a world of `num_gpus`, rank 0."""

    name: str
    num_gpus: int
    config: str  # settings: a YAML file
    hf_config: dict[str, Any]  # config.json of the model; of a whole run it is the checkpoint's own
    updates: tuple[tuple[Group, ...], ...] = ()  # this rank's groups in each of them
    text_tokens: int = 200  # of each prompt, beside the video
    trains: bool = False  # a whole run of `train` by these settings instead
    engine: str = (
        ""  # of such a run: module:function that gives a RolloutEngine, called with the Run; "": the settings'
    )
    teaches: bool = False  # supervised: each group holds the one completion to learn
    prompts: tuple[Grid, ...] = ()  # clips that the local engine answers together, not a learner
    group_size: int = 8  # answers to each of them
    min_rows: int = 0  # rows that another rank has at least: this one runs placeholders
    overrides: tuple[str, ...] = ()  # `--a.b=c`
    rates: Rates = H100_RATES  # by which its seconds are predicted
    ways: Mapping[str, str] = field(default_factory=dict)  # of kernels by name, see KernelChoice; others by device
    flash: Literal["fa2", "fa3", "fa4"] | None = None  # flash-attn that seems to be installed; None: what there is


def run(cases: Sequence[Case], timeout_s: float = 600.0) -> Iterator[dict[str, Any]]:
    """The reports of these cases, as each one ends: {"name", "load": Measured, "updates": [Measured]}; with `prompts`
    {"name", "load", "answers": {number of new tokens: Measured}}; with `trains` {"name", "result", "run": Measured};
    {"name", "error", "traceback"} for one that raised.

    Raises FakeGpuError where no GPU can be played here, or when the process takes longer than `timeout_s` seconds.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "vcr1_fast.fake_gpu"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    errors: list[str] = []
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None, "all are pipes"
    reader = threading.Thread(target=lambda stream: errors.append(stream.read()), args=(process.stderr,), daemon=True)
    reader.start()
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    try:
        process.stdin.write(json.dumps([asdict(case) for case in cases]))
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("{"):
                report = json.loads(line)
                if "unavailable" in report:
                    raise FakeGpuError(report["unavailable"])
                yield report
        code = process.wait()
        reader.join()
        if code:
            last = " ".join("".join(errors).strip().splitlines()[-1:])
            limit = f" after {timeout_s:g} s" if code < 0 else ""
            raise FakeGpuError(f"the process that plays GPUs ended with {code}{limit}: {last[:300]}")
    finally:
        timer.cancel()
        process.kill()
        process.wait()
