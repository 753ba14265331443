"""What `video.reader: auto` stands for in a run: measured once, when it is new, and kept from then on.

Readers may differ in pixels, so one run has one: the same on all ranks, after a resume, and in the evaluation of its
model. Called by `run.open_run`. The run's saved settings go on saying auto: what it had stands, with its version, in
its checkpoints and its exported model, from where it is taken again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch

from vcr1_fast.learner.sharding import World, gather_all, on_main_rank
from vcr1_fast.prompts.dataset import AnnotationFile
from vcr1_fast.run.sources import annotation_contents
from vcr1_fast.run.telemetry import say
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.video import ReaderName
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import SampleError
from vcr1_fast.video import dali_codecs
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.reader_speed import fastest, measure_readers
from vcr1_fast.video.source_name import SourceName

NUM_CLIPS = 64  # that are tried at most


def with_reader(config: Config, world: World, tasks: Mapping[str, Task], kept: str | None, *, trains: bool) -> Config:
    """The settings with a reader in the place of auto. A collective.

    `kept`: the name of the reader that the run had before, or that the model was trained with; None: none is known. A
    run that `trains` keeps it also where auto would not take it, others where it would. Only rank 0 looks at it.
    Raises ReaderError where no reader works, on every rank.
    """
    if "auto" not in (config.video.reader, config.eval.video.reader):
        return config
    cores = _cores_of_rank(world)
    found: list[ReaderName] = []

    def choose() -> None:
        readers, before = candidates(world.device), reader_of(kept or "")
        if before is not None and (trains or before in readers):
            found.append(before)
            return
        clips = _some_clips(config, tasks, "train" if trains else "eval") if len(readers) > 1 else []
        found.append(_measured(readers, clips, cores) if clips else "pyav")

    on_main_rank("choosing a video reader", choose, world)
    reader = gather_all(found, world)[0][0]
    video, in_evaluation = config.video, config.eval.video
    if video.reader == "auto":
        video = replace(video, reader=reader)
    if in_evaluation.reader == "auto":
        in_evaluation = replace(in_evaluation, reader=reader)
    return replace(config, video=video, eval=replace(config.eval, video=in_evaluation))


def candidates(device: torch.device) -> list[ReaderName]:
    """What auto may stand for in a run on `device`, in the order in which it is taken on equal speed.

    Without a GPU the reference alone. decord is not among them: it hangs on files that PyAV reads, which costs each of
    them video.timeout_s and the run the clip.
    """
    readers: list[ReaderName] = ["pyav"]
    if device.type == "cuda":
        if dali_codecs.version() is not None:
            readers.insert(0, "dali+pyav")
        if importlib.util.find_spec("torchcodec"):
            readers.extend(("torchcodec_cuda+pyav", "torchcodec+pyav"))
    return readers


def reader_of(name: str) -> ReaderName | None:
    """The setting that gave a reader of this name, for example "dali 2.4 gpu h264, others pyav 18.1": dali+pyav."""
    first, _, others = name.split(", images ")[0].partition(", others ")
    wanted = "+".join(part.split()[0] for part in (first, others) if part)
    return next((reader for reader in get_args(ReaderName) if reader == wanted), None)


def require_one_reader(name: str, world: World) -> None:
    """Raises ConfigError, on every rank, unless all have a reader of the same name and version. A collective."""
    names = gather_all(name, world)
    other = next((rank for rank, theirs in enumerate(names) if theirs != names[0]), None)
    if other is not None:
        raise ConfigError(
            f"rank {other} has the video reader {names[other]!r}, rank 0 has {names[0]!r}, which may give other "
            "pixels: install the same versions on all machines, or set video.reader to pyav"
        )


def _measured(readers: Sequence[ReaderName], clips: Sequence[ClipRequest], cores: Sequence[int]) -> ReaderName:
    speeds = measure_readers(readers, clips, cores)
    best, by_clips = fastest(speeds)
    told = [
        f"{speed.reader} {speed.clip_s(by_clips):.3f} s a clip"
        if set(by_clips) & speed.read_s.keys()
        else f"{speed.reader} read no clip in time"
        if speed.num_processes
        else f"{speed.reader} does not work ({speed.name})"
        for speed in speeds
    ]
    say(
        f"video.reader auto: {', '.join(told)} (by {len(by_clips)} clips, on {len(cores)} cores); taken and kept: "
        f"{best.reader}"
    )
    return best.reader


def _some_clips(config: Config, tasks: Mapping[str, Task], name: Literal["train", "eval"]) -> list[ClipRequest]:
    """Of data.train or data.eval, drawn by train.seed; [] without files that can be read: who needs them says so."""
    contents: list[AnnotationFile] = []
    with contextlib.suppress(ConfigError):
        contents = annotation_contents(config, tasks, name)
    rows = [row for content in contents for row in content.rows if not row.is_refused]
    sources = {source for row in rows for source in row.sources}
    videos = sorted(source for source in sources if not SourceName.parse(source).is_image)
    clips: list[ClipRequest] = []
    for video in random.Random(config.train.seed).sample(videos, min(NUM_CLIPS, len(videos))):
        try:
            clips.append(ClipRequest.of(video, config.video))
        except SampleError:  # the run says so when it comes to it
            continue
    return clips


def _cores_of_rank(world: World) -> list[int]:
    """This rank's part of the cores that it shares with others of its machine. A collective."""
    cores = sorted(os.sched_getaffinity(0))
    num_sharing = gather_all((socket.gethostname(), cores), world).count((socket.gethostname(), cores))
    return cores[: max(1, len(cores) // num_sharing)]
