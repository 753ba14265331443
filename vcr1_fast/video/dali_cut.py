"""The part of a file that some frames need, as a file of its own in memory: from a keyframe to the last of them.

DALI has no index of a file in memory: it decodes from the first frame on, whichever are wanted. PyAV has seen every
packet when it probed the file, so it can tell where decoding may begin, and copies the packets from there on. Packets
are named by their presentation times in ticks. P packets in the order of the file, F wanted frames.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from vcr1_fast.video.bitstream import BitstreamCheck

FORMATS = ("mov", "matroska")  # FFmpeg's first names; they hold codec headers as the copy does, MPEG-TS does not
CLOCK_S = 1e-3  # of the copy: frames closer than two of these could fall on one time


class PacketTable:
    """When the packets of a track are shown, and at which of them decoding may begin."""

    def __init__(self, codec: str, check: BitstreamCheck) -> None:
        self._check, self._has_leading = check, codec == "hevc"
        self._ticks: list[int] = []
        self._can_begin: list[bool] = []
        self._is_whole = True

    def add(self, packet: Packet) -> None:
        if packet.pts is None or packet.is_discard:
            self._is_whole = False  # by these times a packet cannot be found, or would come to be shown
            return
        self._ticks.append(packet.pts)
        self._can_begin.append(packet.is_keyframe and self._check.can_begin(bytes(packet)))

    def entries(self, times_s: np.ndarray) -> Entries | None:
        """None where nothing can be cut. `times_s`: of the frames, [N] seconds, ascending."""
        ticks_P = np.array(self._ticks, np.int64)
        is_clear = len(times_s) < 2 or float(np.diff(times_s).min()) >= 2 * CLOCK_S
        if not self._is_whole or not is_clear or not len(ticks_P):
            return None
        # All before it are shown earlier, all behind it later: but for the leading pictures of HEVC, which by its rules
        # no picture that is shown after the keyframe refers to, so that they may be left out.
        may_begin_P = np.array(self._can_begin) & (np.maximum.accumulate(ticks_P) == ticks_P)
        if not self._has_leading:
            may_begin_P &= np.minimum.accumulate(ticks_P[::-1])[::-1] == ticks_P
        return Entries(ticks_P, np.flatnonzero(may_begin_P))


@dataclass(frozen=True, slots=True)
class Cut:
    """What is copied of a file, and where the wanted frames are in that."""

    ticks_C: np.ndarray  # int64, of the packets, in the order of the file: from a keyframe on, without earlier frames
    indices_F: np.ndarray  # int32, by time


@dataclass(frozen=True, slots=True)
class Entries:
    """Where decoding may begin."""

    ticks_P: np.ndarray  # int64
    places_E: np.ndarray  # of the packets that it may begin with, ascending

    def cut(self, wanted_F: np.ndarray) -> Cut | None:
        """What the frames at these ticks (ascending, distinct) need; None: the file from its start."""
        places = self.places_E[self.ticks_P[self.places_E] <= wanted_F[0]]
        if not len(places) or places[-1] == 0:
            return None
        start = int(places[-1])
        by_time_P = np.argsort(self.ticks_P, kind="stable")
        end = int(by_time_P[np.searchsorted(self.ticks_P, wanted_F, sorter=by_time_P)].max()) + 1
        ticks = self.ticks_P[start:end]
        ticks = ticks[ticks >= ticks[0]]
        return Cut(ticks, np.searchsorted(np.sort(ticks), wanted_F).astype(np.int32))


def copy_of(cut: Cut, container: InputContainer, stream: VideoStream) -> np.ndarray:
    """A Matroska file [C] uint8 with the packets of `cut`. Raises FFmpegError, ValueError where they are not there."""
    # Times of decoding, which Matroska does not tell: any that ascend, and lie before those of showing, do.
    ordered_C = np.sort(cut.ticks_C)
    decoded_at_C = ordered_C - (ordered_C - cut.ticks_C).max()
    ticks, num_copied = cut.ticks_C.tolist(), 0
    memory = io.BytesIO()
    container.seek(ticks[0], stream=stream)
    with av.open(memory, "w", format="matroska") as out:
        copy = out.add_stream_from_template(stream, opaque=True)  # as it is: nothing is encoded
        for packet in container.demux(stream):  # a seek may end before the one that was asked for
            if packet.pts == ticks[num_copied]:
                packet.stream, packet.dts = copy, int(decoded_at_C[num_copied])
                out.mux(packet)
                num_copied += 1
                if num_copied == len(ticks):
                    break
    if num_copied < len(ticks):
        raise ValueError(f"{num_copied} of {len(ticks)} packets are there: the file was changed while it was read")
    return np.frombuffer(memory.getbuffer(), np.uint8)
