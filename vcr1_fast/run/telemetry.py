"""What a run tells: one line a step for people, metrics.jsonl and the writers of writers.py, progress bars.

In: a dict of floats per step, and the wall time of named phases. Metric names are those of TRL where TRL has one.
Only rank 0 writes or prints. Importing this loads neither torch nor TensorBoard.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vcr1_fast.run.profiler import StepProfiler
from vcr1_fast.run.step_line import StepLines
from vcr1_fast.run.terminal import console as console
from vcr1_fast.run.watchdog import Watchdog
from vcr1_fast.run.writers import WRITERS, RunToLog, Writer

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

SECONDS_BETWEEN_PROGRESS_LINES = 10.0  # where stdout is a file: a log of a night stays readable
BETWEEN_STEPS = ("eval", "checkpoint")  # spans that no step's own time or tokens/s should pay for

_bar_is_live = False


def is_main_rank() -> bool:
    """True without torchrun and on its first process."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """One plain line on stdout, from rank 0 alone, never wrapped."""
    if is_main_rank():
        try:
            console.print(message, soft_wrap=True, highlight=False, markup=False)
            sys.stdout.flush()
        except OSError as error:  # the terminal, or what reads the pipe, is gone: that ends no run
            silence(1)
            print(f"nobody reads stdout any more ({error.strerror}); the run goes on", file=sys.stderr, flush=True)


def silence(descriptor: int) -> None:
    """What is written to it from now on goes nowhere and raises nothing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def to_json(value: object) -> str:
    """One line of strict JSON: NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _finite(asdict(value))
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Telemetry:
    """The record of one run.

        telemetry = Telemetry("runs/a", rank=0)
        with telemetry.span("rollout"):
            ...
        telemetry.log_step(1, {"reward": 0.5}, num_steps=100)
        telemetry.close()

    `watchdog_s`: see run/watchdog.py. `log_to` and `config_yaml`: see run/writers.py. `profile_steps`: see
    run/profiler.py. `resume_step` is the last step of the checkpoint that the run goes on from (0: a new run). What an
    earlier process wrote about later steps is dropped, from rewards.jsonl and samples/, too, so a killed run has no
    step twice. Raises OSError when `output_dir` cannot be written; what fails later is warned about once.
    """

    def __init__(
        self,
        output_dir: str | Path,
        rank: int = 0,
        resume_step: int = 0,
        watchdog_s: float = 0.0,
        log_to: Sequence[str] = ("tensorboard",),
        config_yaml: str = "{}",
        profile_steps: tuple[int, int] | None = None,
    ) -> None:
        self.is_writing = rank == 0
        self._watchdog = Watchdog(watchdog_s, rank)
        self._span_s: dict[str, float] = defaultdict(float)
        self._step_began = time.perf_counter()
        self._failed: set[str] = set()
        self._lines = StepLines()
        self._writers: dict[str, Writer] = {}
        self._profiler = StepProfiler(Path(output_dir), rank, profile_steps, resume_step)
        if not self.is_writing:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "rewards.jsonl"):
            keep_steps_up_to(folder / name, resume_step)
        drop_later_files(folder / "samples", resume_step)
        self._jsonl = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._excepthook, threading.excepthook = threading.excepthook, self._note_thread_error
        for name in log_to:
            with self.forgiven(name, Exception):
                self._writers[name] = WRITERS[name](RunToLog(folder, config_yaml, resume_step))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the wall time of the block to `time/{name}_s` of the step. Waits for the GPU at both ends."""
        _wait_for_gpu()
        began = time.perf_counter()
        try:
            with self._profiler.span(name):
                yield
        finally:
            _wait_for_gpu()
            self._span_s[name] += time.perf_counter() - began

    def seconds_of(self, name: str) -> float:
        """Of the step's spans of that name so far."""
        return self._span_s[name]

    def log_step(self, step: int, metrics: Mapping[str, float], num_steps: int) -> None:
        """Writes one step. Adds step_time, time/*, and tokens_per_s/x for each `step_tokens/x` given.

        step_time runs from the previous log_step to this one, less the spans in BETWEEN_STEPS.
        """
        self._watchdog.feed()
        now = time.perf_counter()
        between_s = sum(self._span_s.get(name, 0.0) for name in BETWEEN_STEPS)
        record = {**metrics, "step_time": now - self._step_began - between_s}
        for name, tokens in metrics.items():
            kind, slash, which = name.partition("/")
            if kind == "step_tokens" and slash:
                record[f"tokens_per_s/{which}"] = tokens / record["step_time"]
        record |= {f"time/{name}_s": seconds for name, seconds in self._span_s.items()}
        self._span_s.clear()
        self._step_began = now
        self._write(step, record)
        if self.is_writing:
            say(self._lines.line(step, num_steps, record))
        self._profiler.after(step)

    def log_eval(self, step: int, scores: Mapping[str, float]) -> None:
        """Writes held-out scores, each under `eval/`, as a line of its own."""
        self._watchdog.feed()
        self._write(step, {f"eval/{name}": score for name, score in scores.items()})
        if self.is_writing:
            say(f"held-out after step {step}: " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))

    def log_media(self, step: int, texts: Mapping[str, str], pictures: Mapping[str, np.ndarray]) -> None:
        """Shows texts as they are, in fixed width, and pictures [H, W, 3] uint8, in each of the writers."""
        self._each_writer(lambda writer: writer.log_media(step, texts, pictures))

    def _write(self, step: int, record: Mapping[str, float]) -> None:
        if not self.is_writing:
            return
        with self.forgiven("metrics.jsonl"):
            self._jsonl.write(to_json({"step": step, **record}) + "\n")
            self._jsonl.flush()  # a killed process loses no finished step
        finite = {name: value for name, value in record.items() if math.isfinite(value)}
        self._each_writer(lambda writer: writer.log(step, finite))

    def _each_writer(self, action: Callable[[Writer], None]) -> None:
        for name, writer in self._writers.items():
            with self.forgiven(name, Exception):  # TensorBoard's raises here what its own thread met
                action(writer)

    @contextmanager
    def forgiven(self, name: str, kind: type[Exception] = OSError) -> Iterator[None]:
        """What the block cannot write is warned about once: a full disk may be empty again at the next checkpoint."""
        try:
            yield
        except kind as error:
            if name not in self._failed:
                self._failed.add(name)
                print(f"cannot write {name} ({error}); the run goes on without it", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._watchdog.close()
        self._profiler.close()
        if self.is_writing:
            with self.forgiven("metrics.jsonl"):
                self._jsonl.close()
            self._each_writer(lambda writer: writer.close())
            threading.excepthook = self._excepthook

    def _note_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """One line for what TensorBoard's thread meets, which would be a traceback; other threads' as ever."""
        if not type(error.thread).__module__.startswith("tensorboard."):
            self._excepthook(error)
            return
        with self.forgiven("tensorboard", Exception):
            raise error.exc_value or OSError("its thread ended")


def keep_steps_up_to(path: Path, step: int) -> None:
    """Drops later steps, and a line torn by a kill, from a file of steps. Step 0 keeps nothing: a new run.

    The file is replaced in one go: killed in the middle of this, it is the old file or the new one.
    """
    if not path.exists():
        return
    kept = [line for line in path.read_text("utf-8", "replace").splitlines() if _step_of(line) <= step] if step else []
    aside = path.with_suffix(".jsonl.new")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)


def drop_later_files(folder: Path, step: int) -> None:
    """Deletes the files step_N.jsonl of later steps. Step 0 keeps none: a new run."""
    for path in folder.glob("step_*.jsonl"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal() and int(number) > step:
            path.unlink(missing_ok=True)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def _wait_for_gpu() -> None:
    """Kernels run asynchronously: without this a span would time their launch. Does not load torch by itself."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items of `iterable`, with a bar on a terminal, else with a line every 10 s; silent on other ranks.

    A bar inside another bar is not drawn: two would overwrite each other.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    if not is_main_rank() or _bar_is_live:
        yield from iterable
    elif console.is_terminal:
        yield from _with_bar(iterable, description, total)
    else:
        yield from _with_lines(iterable, description, total)


def _with_bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    global _bar_is_live
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    clocks = (TimeElapsedColumn(), TimeRemainingColumn())
    _bar_is_live = True
    try:
        with Progress(*columns, *clocks, console=console, transient=True) as bar:
            yield from bar.track(iterable, total=total, description=description)
    finally:
        _bar_is_live = False


def _with_lines(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    last_line = time.monotonic()
    for number, item in enumerate(iterable, start=1):
        yield item
        if time.monotonic() - last_line >= SECONDS_BETWEEN_PROGRESS_LINES:
            last_line = time.monotonic()
            say(f"{description}: {number}" + (f" of {total}" if total is not None else ""))
