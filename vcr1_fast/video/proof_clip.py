"""A small clip of a codec, written here, and whether a decoder gave its frames: in order and with the right pictures.

For decoders that may not work on a machine, or not for all codecs. Asked once, when a reader is opened.
"""

from __future__ import annotations

import io
import os
from typing import Any

import av
import numpy as np
import torch

# FFmpeg's name of a codec -> what writes a clip of it. Hidden reference frames and B-frames on, they confuse decoders.
_VPX = {"g": "12", "lag-in-frames": "12", "auto-alt-ref": "1", "b": "300k", "deadline": "realtime", "cpu-used": "8"}
_B_FRAMES = {"bf": "3", "g": "12", "preset": "ultrafast"}
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {**_B_FRAMES, "b_strategy": "0"}),
    "hevc": ("libx265", {**_B_FRAMES, "x265-params": "log-level=none"}),
    "vp8": ("libvpx", _VPX),
    "vp9": ("libvpx-vp9", _VPX),
    "av1": ("libsvtav1", {"preset": "10", "svtav1-params": "keyint=12"}),
    "mpeg4": ("mpeg4", {"bf": "2", "g": "12", "q": "2", "flags": "+cgop", "sc_threshold": "1000000000"}),
    "mjpeg": ("mjpeg", {"q": "2"}),
}
PROOF_FRAMES, PROOF_FPS, PROOF_SIZE_PX = 30, 24, (160, 192)  # (height, width); NVDEC takes no HEVC below 144 x 144
MAX_PROOF_DIFFERENCE = 8.0  # levels, mean over a frame; measured 1 to 3 for the right frame, 60 for its neighbour


def proof_clip(codec: str) -> tuple[np.ndarray, np.ndarray]:
    """(file [B] uint8, its frames as FFmpeg decodes them [F, H, W, 3] uint8): frame k shows k as 8 columns."""
    encoder, options = ENCODERS[codec]
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder prints its settings otherwise
    height, width = PROOF_SIZE_PX
    memory = io.BytesIO()
    with av.open(memory, "w", format="matroska") as out:
        stream: Any = out.add_stream(encoder, rate=PROOF_FPS)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = {**options, "threads": "1"}
        for k in range(PROOF_FRAMES):
            bits_W = (k >> (np.arange(width) * 8 // width) & 1).astype(np.uint8) * 200 + 28
            picture = np.broadcast_to(bits_W[None, :, None], (height, width, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = k
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    encoded = np.frombuffer(memory.getvalue(), np.uint8)
    with av.open(io.BytesIO(memory.getvalue()), "r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return encoded, np.stack(frames)


def difference(got: torch.Tensor, wanted_FHW3: np.ndarray, what: str = "") -> str | None:
    """What is wrong with frames that should be these, [F, H, W, 3] uint8; None: nothing. `what` goes before it."""
    got_FHW3 = got.cpu().numpy()
    if got_FHW3.shape != wanted_FHW3.shape:
        return f"{what}it gave frames of shape {got_FHW3.shape}, wanted {wanted_FHW3.shape}"
    difference_F = np.abs(got_FHW3.astype(np.int16) - wanted_FHW3).mean((1, 2, 3))
    wrong = np.flatnonzero(difference_F > MAX_PROOF_DIFFERENCE)
    return None if not len(wrong) else f"{what}frame {wrong[0]} of {len(wanted_FHW3)} is another picture"
