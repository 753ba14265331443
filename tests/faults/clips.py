"""Mutated H.264, HEVC, VP9, MPEG-4 and AV1 clips: frames or one sentence, the same twice, and the next clip is read."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import traceback
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.faults import damage
from tests.faults.runs import Started, run
from tests.faults.trials import Bench, CrashedError, LostError
from tests.faults.undisturbed import Runs
from tests.video import damaged
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.loader import FrameLoader

# Codec -> its file name and options; small and fast
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "libx264": ("h264.mp4", {"preset": "veryfast", "g": "12"}),
    "libx265": ("hevc.mp4", {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:keyint=12"}),
    "libvpx-vp9": ("vp9.webm", {"deadline": "realtime", "cpu-used": "8", "g": "12"}),
    "mpeg4": ("mpeg4.avi", {"g": "12"}),
    "libsvtav1": ("av1.mkv", {"preset": "12", "svtav1-params": "lp=1"}),
}
TIMEOUT_S = 10.0


def read_a_mutated_clip(bench: Bench, runs: Runs, rng: random.Random) -> None:
    """In a worker that reads clips for all trials of a program's run, as a run's worker does."""
    folder, name = bench.empty_folder(), rng.choice([name for name, _ in CODECS.values()])
    path = folder / name
    bench.fault = f"{name}: {mutate(rng, _sound(runs) / name, path)}"
    said = [_Reader.shared(runs).read(path) for _ in range(2)]
    for one in said:
        if "raised" in one:
            raise CrashedError(one["raised"])
        if "\n" in one.get("refused", ""):
            raise LostError(f"a reason of several lines: {one['refused']!r}")
    if said[0] != said[1]:
        raise LostError(f"read twice: {said[0]} and {said[1]}")
    good = _sound(runs) / rng.choice([name for name, _ in CODECS.values()])
    if "frames" not in _Reader.shared(runs).read(good) or _Reader.shared(runs).read(good) != _reference(runs, good):
        raise LostError(f"after it, {good.name} is read otherwise than before")


def train_on_a_mutated_clip(bench: Bench, runs: Runs, rng: random.Random) -> None:
    """One of eight videos: the run goes to its end, and blames no other file."""
    folder = bench.empty_folder()
    data = shutil.copytree(runs.data, folder / "data")
    victim = rng.choice(sorted((data / "videos").glob("train*")))
    if rng.random() < 0.3:
        kind = rng.choice(list(damaged.KINDS))
        damaged.KINDS[kind][0](shutil.copy(victim, folder / "sound.mp4"), victim)
        what = kind
    else:
        what = mutate(rng, Path(shutil.copy(victim, folder / "sound.mp4")), victim)
    bench.fault = f"{what}: {victim.name} of 8 in a run"
    options = (f"--video.max_source_pixels={damaged.MAX_SOURCE_PIXELS}",)
    ended = run(runs.arguments("train", folder / "run", *options, data=data), folder / "log").checked()
    if ended.code != 0:
        raise LostError(f"the run ended: {ended.refusal()}")
    path = folder / "run" / "quarantine.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if blamed := [line["source"] for line in lines if line["source"] != str(victim)]:
        raise LostError(f"other files are blamed: {blamed}")


def mutate(rng: random.Random, source: Path, target: Path) -> str:
    """A damaged copy. Says what was done."""
    shutil.copy(source, target)
    if rng.random() < 0.4:
        name = rng.choice(list(damage.WAYS)[:-1])
        return name + damage.WAYS[name](rng, target)
    data = bytearray(target.read_bytes())
    name = rng.choice(["many", "shuffled", "doubled", "holed", "field", "spliced"])
    at, other = sorted(rng.sample(range(len(data)), 2))
    if name == "many":
        for _ in range(rng.randrange(2, 200)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif name == "shuffled":
        data[at:other] = rng.randbytes(other - at)
    elif name == "doubled":
        data[at:at] = data[at:other]
    elif name == "holed":
        del data[at:other]
    elif name == "field":  # a number of a header: 0, all ones, or large
        at = (
            rng.randrange(min(len(data) - 4, 4096))
            if rng.random() < 0.5
            else max(0, len(data) - rng.randrange(5, 2000))
        )
        data[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\1\0\0"])
    else:
        data[at:] = rng.choice(sorted(path for path in source.parent.iterdir() if path.is_file())).read_bytes()[at:]
    target.write_bytes(data)
    return name


@functools.cache
def _sound(runs: Runs) -> Path:
    """A folder of sound clips, written in a process of its own: encoders have threads."""
    folder = runs.folder / "sound"
    folder.mkdir()

    def write() -> None:
        noise = np.random.default_rng(0)
        for codec, (name, options) in CODECS.items():
            with av.open(str(folder / name), "w") as out:
                stream = out.add_stream(codec, rate=Fraction(8), options=options)
                stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
                for k in range(24):
                    rgb = noise.integers(0, 60, (64, 64, 3), dtype=np.uint8)
                    rgb[k : k + 20, 10:40] += 150
                    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
                    frame.pts, frame.time_base = k, Fraction(1, 8)
                    out.mux(stream.encode(frame))
                out.mux(stream.encode())
        raise SystemExit(0)

    ended = Started([], runs.folder / "sound_log", write).wait()
    assert ended.code == 0, ended.err
    return folder


@functools.cache
def _reference(runs: Runs, path: Path) -> dict[str, str]:
    return _Reader(runs, "reference").read(path)


class _Reader:
    """A process with a FrameLoader of one worker; asked through pipes, a line each."""

    def __init__(self, runs: Runs, name: str) -> None:
        (ask, self._ask), (self._said, say) = os.pipe(), os.pipe()
        self._buffer = b""
        own = self._ask  # which the process must not hold: it ends when this one does
        self._process = Started([], runs.folder / f"reader_{name}", lambda: (os.close(own), _answer(ask, say)))
        os.close(ask)
        os.close(say)

    @staticmethod
    @functools.cache
    def shared(runs: Runs) -> _Reader:
        return _Reader(runs, "shared")

    def read(self, path: Path) -> dict[str, str]:
        os.write(self._ask, f"{path}\n".encode())
        while b"\n" not in self._buffer:
            part = os.read(self._said, 65536)
            if not part:
                _Reader.shared.cache_clear()
                raise CrashedError(f"the reading process ended: {self._process.text()[-300:]}")
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


def _answer(ask: int, say: int) -> None:
    config = VideoConfig(num_workers=1, timeout_s=TIMEOUT_S, max_source_pixels=damaged.MAX_SOURCE_PIXELS, max_frames=8)
    with contextlib.closing(FrameLoader(config)) as loader, os.fdopen(ask) as lines:
        for line in lines:
            os.write(say, json.dumps(_read(loader, ClipRequest(line.strip(), config))).encode() + b"\n")


def _read(loader: FrameLoader, request: ClipRequest) -> dict[str, str]:
    try:
        frames = loader.get(request)
    except SampleError as error:
        return {"refused": error.reason}
    except Exception as error:
        places = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        return {"raised": f"{type(error).__name__}: {error} at {' '.join(places[-3:])}"}
    rgb = frames.rgb_FHW3
    return {"frames": hashlib.sha256(rgb.numpy().tobytes()).hexdigest(), "shape": str(tuple(rgb.shape))}
