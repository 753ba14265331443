"""The process in which decord runs: `python -m vcr1_fast.video.decord_worker`. Imports decord and numpy only.

It reads one JSON request a line from stdin and answers on stdout with messages: a JSON line, of which `num_bytes`
says how many raw bytes follow.

    {"path": p, "indices": null}    -> {"kind": "probe", "num_frames", "width_px", "height_px"}
    {"path": p, "indices": [...]}   -> {"kind": "frames", "shape": [f, H, W, 3]} + uint8, repeated; {"kind": "end"}
    any failure                     -> {"kind": "error", "reason": ...}

Once it has given a frame, decord decodes on in the background and keeps what it decodes, up to the whole file: 250 MB
a second at 1280 x 720 for as long as nobody asks it for more, as when the parent is slow to take what was sent. So
nothing is sent while it has frames to decode: `num_at_once` frames are fetched, then it goes back to the start, which
empties its queue. A further part costs the way from its last keyframe.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

NUM_FRAMES_PER_MESSAGE = 8  # 50 MB of 1080p


def send(out: BinaryIO, message: dict[str, Any], payload: np.ndarray | None = None) -> None:
    raw = b"" if payload is None else payload.reshape(-1).data
    out.write(json.dumps({**message, "num_bytes": len(raw)}).encode() + b"\n")
    out.write(raw)
    out.flush()


@contextmanager
def deadline(give_up_s: float) -> Iterator[None]:
    """End this process if the block takes longer.

    decord can loop for ever while it holds the GIL. The parent kills us then; should the parent be dead too, the
    default action of SIGALRM ends the process without needing the GIL.
    """
    signal.setitimer(signal.ITIMER_REAL, give_up_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def answer(out: BinaryIO, path: str, indices: Sequence[int] | None, num_at_once: int, give_up_s: float) -> None:
    """Do one request. Whatever decord raises goes through to the caller."""
    import decord

    with deadline(give_up_s):
        video = decord.VideoReader(path)  # threads: decord's own choice
    if indices is None:
        with deadline(give_up_s):
            height_px, width_px = video[0].shape[:2]
            video.seek(0)
        send(out, {"kind": "probe", "num_frames": len(video), "width_px": width_px, "height_px": height_px})
        return
    for start in range(0, len(indices), num_at_once):
        with deadline(give_up_s):
            rgb_FHW3 = video.get_batch(list(indices[start : start + num_at_once])).asnumpy()
            video.seek(0)
        for first in range(0, len(rgb_FHW3), NUM_FRAMES_PER_MESSAGE):
            some_FHW3 = rgb_FHW3[first : first + NUM_FRAMES_PER_MESSAGE]
            send(out, {"kind": "frames", "shape": list(some_FHW3.shape)}, some_FHW3)
    send(out, {"kind": "end"})


def serve() -> None:
    """Answer requests until stdin closes."""
    # FFmpeg and decord may print to file descriptor 1 themselves; the messages get a private copy of it.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        import decord  # noqa: F401
    except Exception as error:
        send(out, {"kind": "error", "reason": f"cannot import decord: {error}"})
        return
    send(out, {"kind": "ready"})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(out, request["path"], request["indices"], request["num_at_once"], request["give_up_s"])
        except Exception as error:
            send(out, {"kind": "error", "reason": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    serve()
