"""What must be known of a video track before DALI may decode it, and what DALI leaves undone with its frames."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import av
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vcr1_fast.video.bitstream import BitstreamCheck
from vcr1_fast.video.dali_codecs import LIMITS
from vcr1_fast.video.dali_cut import FORMATS as FORMATS_TO_CUT
from vcr1_fast.video.dali_cut import Entries, PacketTable
from vcr1_fast.video.dali_pipeline import Device
from vcr1_fast.video.pyav_reader import FULL_RANGE, PyavReader, orientation
from vcr1_fast.video.reader import Probe

BT601 = (0.299, 0.114)  # (weight of red, weight of blue) in luma
MATRICES = {  # by FFmpeg's number of the colour matrix (ISO 23091-2); 2: not stated, taken for BT.601 by FFmpeg too
    1: (0.2126, 0.0722),  # BT.709
    2: BT601,
    5: BT601,
    6: BT601,
    9: (0.2627, 0.0593),  # BT.2020, not constant luminance
}
# NVDEC also decodes 10 bits and 4:2:2 or 4:4:4 of some codecs, but DALI reads its output as 8-bit 4:2:0.
FORMATS: dict[Device, frozenset[str]] = {
    "gpu": frozenset({"yuv420p", "yuvj420p"}),
    "cpu": frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"}),
}
# Matroska: bytes between two packets, of any track, that belong to none. Measured 6 to 23; after damage FFmpeg skips to
# the next cluster (seconds of video) without a word.
MAX_SKIPPED_BYTES = 512
MAX_FIRST_PACKETS = 32  # kept for the first frame's sake: a decoder holds 16 frames at most before it gives one
FULL_RANGE_ON_GPU = frozenset({"h264", "hevc"})  # DALI takes the range from NVDEC's parser, which finds it in these


@dataclass(frozen=True, slots=True)
class Track:
    """A video track as PyAV sees it."""

    probe: Probe
    codec: str  # FFmpeg's name
    pixel_format: str
    stored_size_px: tuple[int, int]  # (height, width) before the turn
    matrix: int  # FFmpeg's number of the colour matrix
    is_full_range: bool
    is_full_range_inside: bool  # by the coded video alone, without what the container says
    turn: tuple[bool, bool, bool]  # transpose, mirror, flip: what `upright` does
    is_interlaced: bool
    is_best_track: bool  # the one DALI would choose
    num_packets: int  # with video data
    num_hidden: int  # of them, that an edit list hides
    num_listed: int  # frames by the header; 0: it does not say
    damage: str | None  # what is wrong with the first damaged packet
    entries: Entries | None  # where decoding may begin; None: at the first frame only

    @property
    def frame_bytes(self) -> int:
        return self.stored_size_px[0] * self.stored_size_px[1] * 3


def inspect(path: str, ffmpeg: PyavReader) -> Track:
    """Read through the file once, decode a frame. Raises SampleError as `Reader.probe` does."""
    look = _Look()
    probe = ffmpeg.probe(path, look)
    return look.track(probe)


class _Look:
    """What is to be known of a track beside its `Probe`: an onlooker of `PyavReader.probe`."""

    def __init__(self) -> None:
        self._num_packets = self._num_hidden = 0
        self._damage: str | None = None
        self._end_of_packet: int | None = None
        self._first_packets: list[Packet] = []

    def begin(self, container: InputContainer, stream: VideoStream) -> None:
        self._container, self._stream, self._codec = container, stream, stream.codec_context.codec.canonical_name
        self._check = BitstreamCheck(self._codec, stream.codec_context.extradata)
        self._is_matroska = "matroska" in container.format.name
        can_be_cut = container.format.name.split(",")[0] in FORMATS_TO_CUT
        self._table = PacketTable(self._codec, self._check) if can_be_cut else None

    def packet(self, packet: Packet) -> None:
        if self._is_matroska and packet.pos is not None:
            end = self._end_of_packet
            if end is not None and packet.pos - end > MAX_SKIPPED_BYTES:
                self._damage = self._damage or f"comes after {packet.pos - end} bytes that belong to nothing"
            self._end_of_packet = packet.pos + packet.size
        if packet.stream is not self._stream:
            return
        self._num_packets += 1
        self._num_hidden += packet.is_discard
        self._damage = self._damage or self._check.damage(bytes(packet))
        if self._table is not None:
            self._table.add(packet)
        if len(self._first_packets) < MAX_FIRST_PACKETS:
            self._first_packets.append(packet)

    def end(self, first: VideoFrame) -> None:
        self._first = first
        self._alone = _decoded_alone(self._stream.codec_context, self._first_packets) or first
        self._is_best_track = self._container.streams.best("video") is self._stream
        self._num_listed = self._stream.frames

    def track(self, probe: Probe) -> Track:
        turn, _ = orientation(self._first)
        return Track(
            probe=probe,
            codec=self._codec,
            pixel_format=self._first.format.name,
            stored_size_px=(self._first.height, self._first.width),
            matrix=int(self._first.colorspace),
            is_full_range=_has_full_range(self._first),
            is_full_range_inside=_has_full_range(self._alone),
            turn=turn,
            is_interlaced=self._first.interlaced_frame,
            is_best_track=self._is_best_track,
            num_packets=self._num_packets,
            num_hidden=self._num_hidden,
            num_listed=self._num_listed,
            damage=self._damage,
            entries=None if self._table is None else self._table.entries(probe.times_s),
        )


def _has_full_range(frame: VideoFrame) -> bool:
    return int(frame.color_range) == FULL_RANGE or frame.format.name.startswith("yuvj")


def _decoded_alone(context: VideoCodecContext, packets: Iterable[Packet]) -> VideoFrame | None:
    """The first frame by a decoder that knows nothing of the container, as NVDEC. None: it gives none."""
    alone = av.CodecContext.create(context.name, "r")
    assert isinstance(alone, VideoCodecContext)
    alone.extradata, alone.thread_count, alone.options = context.extradata, 1, dict(context.options)
    with contextlib.suppress(FFmpegError):
        for packet in (*packets, None):
            for frame in alone.decode(packet):
                return frame
    return None


def refusal(track: Track, device: Device, codecs: tuple[str, ...]) -> str | None:
    """Why DALI would not give the right frames of this file, in one clause; None: it would."""
    height_px, width_px = track.stored_size_px
    if track.codec not in codecs:
        return f"its codec is {track.codec}, wanted one of {', '.join(codecs)}"
    if track.pixel_format not in FORMATS[device]:
        return f"its pixel format is {track.pixel_format}, wanted one of {', '.join(sorted(FORMATS[device]))}"
    if track.matrix not in MATRICES:
        return f"its colour matrix is number {track.matrix} of ISO 23091-2, wanted BT.601, BT.709 or BT.2020"
    if track.is_interlaced:
        return "it is interlaced"
    if not track.is_best_track:
        return "it has several video tracks, and DALI would take another one"
    num_shown = len(track.probe.times_s)
    if num_shown != track.num_packets - track.num_hidden:
        return (
            f"it shows {num_shown} frames of {track.num_packets} packets, so that DALI's frame numbers are not its own"
        )
    if not track.num_hidden and track.num_listed not in (0, track.num_packets):  # an edit list may end the file early
        return f"its header lists {track.num_listed} frames, {track.num_packets} are there"
    if device == "cpu":
        return None
    limits = LIMITS[track.codec]
    if not limits.allow(width_px, height_px):
        return f"NVDEC does not take {width_px} x {height_px} px ({limits})"
    if width_px % 2 or height_px % 2:  # DALI's kernel looks for the chroma plane at half the size, rounded down
        return f"its size is odd ({width_px} x {height_px} px)"
    if track.num_hidden:  # NVDEC shows what an edit list hides
        return f"an edit list hides {track.num_hidden} of its frames"
    if track.probe.ticks is None:
        # NVDEC gives frames as they are coded, DALI sorts them by their times. FFmpeg guesses those of an AVI: for
        # H.264 with B-frames it guesses the order of coding.
        return "its packets do not say when their frames are shown"
    if track.is_full_range and track.codec not in FULL_RANGE_ON_GPU:
        return f"it is {track.codec} of full range"
    if track.is_full_range != track.is_full_range_inside:
        return "its container says another colour range than its video, and NVDEC does not know of the container"
    return None


def to_displayed(stored_FHW3: torch.Tensor, track: Track) -> torch.Tensor:
    """DALI's frames ([F, H, W, 3] uint8) in the colours that the file means, upright.

    DALI takes every matrix for BT.601 (measured: mean error 7 to 10 levels for BT.709). Colours go back to Y, U, V and
    forth by the right matrix; range and offset are the same both ways, so that is one 3 x 3 matrix. What DALI clipped
    is lost: of all RGB colours 14 % are off by more than 2 levels then, the most saturated ones by up to 37.
    """
    weights = MATRICES[track.matrix]
    if weights != BT601:
        matrix = (_rgb_of_yuv(*weights) @ torch.linalg.inv(_rgb_of_yuv(*BT601))).to(stored_FHW3.device, torch.float32)
        fixed = torch.empty_like(stored_FHW3)
        for rgb_HW3, fixed_HW3 in zip(stored_FHW3, fixed, strict=True):  # frame by frame: 12 bytes a pixel
            fixed_HW3.copy_((rgb_HW3.float() @ matrix.T).round_().clamp_(0, 255))
        stored_FHW3 = fixed
    is_transposed, is_mirrored, is_flipped = track.turn
    if is_transposed:
        stored_FHW3 = stored_FHW3.transpose(1, 2)
    sides = [side for side, is_wanted in ((2, is_mirrored), (1, is_flipped)) if is_wanted]
    return (stored_FHW3.flip(sides) if sides else stored_FHW3).contiguous()


def _rgb_of_yuv(red: float, blue: float) -> torch.Tensor:
    """[3, 3] float64, from Y, U, V in [0, 1], [-0.5, 0.5], [-0.5, 0.5] to R, G, B (BT.601, BT.709, section 3)."""
    green = 1 - red - blue
    to_red, to_blue = 2 * (1 - red), 2 * (1 - blue)
    rows = [[1, 0, to_red], [1, -blue * to_blue / green, -red * to_red / green], [1, to_blue, 0]]
    return torch.tensor(rows, dtype=torch.float64)
