"""Readers that misbehave on purpose, as functions of a module, because worker processes import them by name."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.reader import Probe, ReaderError


class MadeUpReader:
    """Reads no file: 8 frames of the number in the file's name. What else it does, the name says too."""

    name = "made-up 1"

    def probe(self, path: str) -> Probe:
        stem = Path(path).stem
        if "broken" in stem:
            raise SampleError(path, "is broken on purpose")
        if "nomemory" in stem:
            raise ReaderError("there is no memory left on purpose")
        if "bug" in stem:
            raise ValueError("a bug\nin two lines")
        if "big" in stem:
            return Probe(path, np.arange(64) / 8.0, 280, 280, 8.0)
        return Probe(path, np.arange(8) / 2.0, 56, 56, 4.0)

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        stem, folder = Path(probe.path).stem, Path(probe.path).parent
        if folder.is_dir():
            with open(folder / "reads.txt", "a") as log:
                log.write(f"{stem} {os.getpid()}\n")
        if "hang" in stem:
            ctypes.PyDLL(None).pause()  # PyDLL keeps the GIL
        if "crash" in stem or ("once" in stem and not (folder / f"{stem}.seen").exists()):
            (folder / f"{stem}.seen").touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        if "slow" in stem:
            time.sleep(0.5)
        if "long" in stem:
            time.sleep(60.0)
        number = int("".join(filter(str.isdigit, stem)) or 0)
        for index in frame_indices:
            yield np.full((probe.height_px, probe.width_px, 3), (number + index) % 256, dtype=np.uint8)

    def close(self) -> None:
        pass


class JitteryReader(MadeUpReader):
    """Takes between 0 and 20 ms, another time in each process."""

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        time.sleep(random.SystemRandom().random() * 0.02)
        return super().read(probe, frame_indices)


class LeakyReader(MadeUpReader):
    """Forgets 8 MB a clip."""

    def __init__(self) -> None:
        self.leak: list[np.ndarray] = []

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        self.leak.append(np.ones(8_000_000, dtype=np.uint8))
        return super().read(probe, frame_indices)


def made_up(config: VideoConfig) -> MadeUpReader:
    return MadeUpReader()


def jittery(config: VideoConfig) -> JitteryReader:
    return JitteryReader()


def leaky(config: VideoConfig) -> LeakyReader:
    return LeakyReader()


class ReaderOnItsCores(MadeUpReader):
    """Writes the cores that it may use beside each clip."""

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        with open(Path(probe.path).parent / "cores.txt", "a") as log:
            log.write(f"{sorted(os.sched_getaffinity(0))}\n")
        return super().read(probe, frame_indices)


def on_its_cores(config: VideoConfig) -> ReaderOnItsCores:
    return ReaderOnItsCores()


def failing_in_workers(config: VideoConfig) -> PyavReader:
    if sys.argv[0].endswith("loader_worker.py"):
        raise ImportError("no such decoder here")
    return PyavReader()
