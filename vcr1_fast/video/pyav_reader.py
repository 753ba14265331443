"""The default reader: FFmpeg through PyAV, in this process, from the first frame to the last wanted one.

Everything goes by presentation timestamp (pts). The number of frames in the header is wrong for files with an edit
list (455 listed, 302 shown), and seeking to each frame is 4 to 9 times slower than decoding through the file.

What FFmpeg flags as damaged is refused; that is not all. Of changes of 1 bit to 400 bytes inside one packet, each of
which changed pictures, it flags 79 of 90 in H.264 without CABAC, 34 of 90 with it, 77 of 90 in MPEG-4, 40 of 53 in AV1
and none of 60 in HEVC, VP8 and VP9. err_detect=explode, crccheck, bitstream, careful and compliant find no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Protocol

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.image_header import AnimatedImageError, read_image_header
from vcr1_fast.video.matroska import is_cut_short
from vcr1_fast.video.reader import Probe, decoder_limit, require_pixels, require_video_file, upright

# A stream may end this much before the length in its header (rounding, a dropped last frame); more is a cut file.
MISSING_END_S = 1.0
MISSING_END_FRAC = 0.05

MAX_FRAMES = 4_000_000  # 18 h at 60 fps; the times of that many take 0.5 GB of memory while a file is probed
MAX_WAITING = 32  # frames the decoder gave before their turn; H.264 keeps 16 at most, each may take 200 MB

# Formats that name other files: their frames would not be those of the file, and a live playlist is never at its end.
PLAYLISTS = frozenset({"applehttp", "concat", "concatf", "dash", "hls", "image2", "imf", "lavfi", "rtsp", "sdp"})
FORMATS = ",".join(sorted({part for name in av.formats_available for part in name.split(",")} - PLAYLISTS))

NUM_THREADS = 4  # of FFmpeg, per file; its own choice is one per core, for each of the clips that are read at once
# Others get one thread. With four, frames of MPEG-4 part 2 are decoded at once while damage in the one before is being
# concealed: 11 of 80 readings of one damaged file raised no flag, and their pixels differed.
THREADED = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d"})
# With it a slice that does not end where its bits end is an error. Of 90 changes inside a packet of H.264 without CABAC
# FFmpeg then flags 79 and not 50; 210 sound files of all the forms that x264 writes came out the same.
STRICT_H264 = {"err_detect": "aggressive"}
FULL_RANGE = 2  # AVCOL_RANGE_JPEG
NO_FRAME = "has a video track, but not one frame can be decoded from it"

UPRIGHT = (False, False, False)  # transpose, mirror, flip: see `upright`
QUARTER_TURNS = {1: (True, False, True), 2: (False, True, True), 3: (True, True, False)}  # counter-clockwise

Span = tuple[int | None, int]  # (pts, duration) of a frame in ticks; pts None where the file does not say


class Onlooker(Protocol):
    """Of a file that is being probed."""

    def begin(self, container: InputContainer, stream: VideoStream) -> None:
        """The file is open; `stream` is the track that will be shown."""
        ...

    def packet(self, packet: Packet) -> None:
        """Each one with data, of any track, in the order of the file."""
        ...

    def end(self, first: VideoFrame) -> None:
        """That was all. `first`: the first frame; the file is still open."""
        ...


class PyavReader:
    """Stateless, so any number of threads may share one."""

    name = f"pyav {av.__version__}"

    def __init__(self, max_source_pixels: int = VideoConfig.max_source_pixels) -> None:
        self.max_source_pixels = max_source_pixels

    def probe(self, path: str, onlooker: Onlooker | None = None) -> Probe:
        """Times of the shown frames from the packets alone: the file is read through once, one frame is decoded.

        Decodes the whole file where packets do not say which frames will be shown when: AVI (it stores no pts),
        packets without pts, interlaced video (it may have a packet per field). `onlooker` sees every packet, so that
        who must know more of a file need not read through it again.
        """
        with self.open(path) as (container, stream):
            if onlooker is not None:
                onlooker.begin(container, stream)
            first, spans = _first_frame_and_spans(container, stream, path, onlooker)
            if onlooker is not None:
                onlooker.end(first)
            (is_transposed, _, _), is_turned_only = orientation(first)
            context, stream_index = stream.codec_context, stream.index
            codec, pixel_format = context.name, context.pix_fmt or ""
            is_full_range = context.color_range == FULL_RANGE
            distinct = {pts for pts, _ in spans if pts is not None}
            is_by_order = container.format.name == "avi" or first.interlaced_frame or len(distinct) < len(spans)
            time_base, rate = stream.time_base, stream.guessed_rate  # of raw H.264 the average is FFmpeg's default, 25
            declared_s = _declared_duration_s(stream, first)
            is_endless = declared_s == 0 and "matroska" in container.format.name
        if is_by_order:
            with self.open(path) as (container, stream):
                spans = [(frame.pts, frame.duration) for frame in _decode(container, stream, path)]
        if not spans:
            raise SampleError(path, NO_FRAME)
        times_s, ticks, duration_s = _times(spans, time_base, rate, path)
        if is_endless and is_cut_short(path):
            raise SampleError(
                path,
                f"the file is cut short: {duration_s:.2f} s can be shown, and its end is not whole; fetch it again, or "
                "write it anew up to there (ffmpeg -i OLD -c copy NEW.mkv)",
            )
        if declared_s - duration_s > max(MISSING_END_S, MISSING_END_FRAC * declared_s):
            raise SampleError(
                path,
                f"the file is cut short: its header says {declared_s:.2f} s of video, "
                f"the frames end after {duration_s:.2f} s; fetch it again",
            )
        width_px, height_px = (first.height, first.width) if is_transposed else (first.width, first.height)
        ticks_to_find = None if is_by_order else ticks
        shown = (times_s, width_px, height_px, duration_s)
        track = (codec, stream_index, pixel_format, is_full_range, is_turned_only)
        return Probe(path, *shown, ticks_to_find, *track)

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        """See `Reader.read`. Frames no one asked for are decoded, because later ones refer to them, not converted."""
        names = range(len(probe.times_s)) if probe.ticks is None else probe.ticks.tolist()
        wanted = [names[i] for i in frame_indices]
        missing, ready, next_wanted, is_damaged = set(wanted), dict[int, np.ndarray](), 0, False
        converter = VideoReformatter()
        with self.open(probe.path) as (container, stream):
            for order, frame in enumerate(_decode(container, stream, probe.path)):
                # Frames up to the next keyframe are built on the damaged one, though FFmpeg flags only that one.
                is_damaged = frame.is_corrupt or (is_damaged and not frame.key_frame)
                name = order if probe.ticks is None else frame.pts
                if name is None or name not in missing:
                    continue
                if is_damaged:
                    raise SampleError(
                        probe.path, f"the frame at {frame.time or 0:.2f} s is damaged; fetch the file again"
                    )
                missing.discard(name)
                ready[name] = _to_rgb(frame, probe, converter)
                if len(ready) > MAX_WAITING:
                    raise SampleError(probe.path, "its frames come out of order; convert it to MP4")
                while next_wanted < len(wanted) and wanted[next_wanted] in ready:
                    name = wanted[next_wanted]
                    next_wanted += 1
                    is_last_use = next_wanted == len(wanted) or wanted[next_wanted] != name
                    yield ready.pop(name) if is_last_use else ready[name]
                if next_wanted == len(wanted):
                    return
        raise SampleError(
            probe.path,
            f"{len(missing)} of {len(set(wanted))} wanted frames cannot be decoded, the first of them at "
            f"{probe.times_s[frame_indices[next_wanted]]:.2f} s; the file is damaged",
        )

    def close(self) -> None:
        """Nothing is held between calls."""

    @contextmanager
    def open(self, path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
        """The file and its video track; whatever FFmpeg raises meanwhile becomes a SampleError.

        Playlists (HLS, ffconcat) posing as videos must not make FFmpeg open other files or network addresses.
        """
        require_video_file(path)
        self._require_image_pixels(path)
        doing = "is not a video file FFmpeg can open"
        limit = decoder_limit(self.max_source_pixels)
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS, **limit}
        try:
            # file: keeps FFmpeg from reading a colon in the name as a protocol. Broken tags are no reason to refuse it.
            with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
                doing = "cannot be decoded, it is damaged or cut short"
                stream = _video_stream(container, path)
                stream.codec_context.thread_count = NUM_THREADS if stream.codec_context.name in THREADED else 1
                if stream.width and stream.height:
                    require_pixels(path, stream.width, stream.height, self.max_source_pixels)
                else:  # FFmpeg looked for it in the first frames, under the same limit
                    doing = "cannot be decoded, it is damaged or has frames above video.max_source_pixels"
                is_h264 = stream.codec_context.name == "h264"
                stream.codec_context.options = {**limit, **STRICT_H264} if is_h264 else limit
                stream.thread_type = "AUTO"
                yield container, stream
        except (FFmpegError, OSError, ValueError, RuntimeError, MemoryError) as error:
            cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise SampleError(path, f"{doing} (FFmpeg says: {cause})") from error

    def _require_image_pixels(self, path: str) -> None:
        """An image under the name of a video: FFmpeg decodes it to find its size, and 100 KB of PNG can be 2.7 GB."""
        with open(path, "rb") as file:
            start = file.read(1 << 16)
        try:
            header = read_image_header(start)
        except AnimatedImageError as error:
            raise SampleError(path, f"{error}, which FFmpeg cannot decode: convert it to MP4") from error
        except ValueError:
            return  # no image
        else:
            require_pixels(path, header.width_px, header.height_px, self.max_source_pixels)


def _video_stream(container: InputContainer, path: str) -> VideoStream:
    streams = list(container.streams.video)
    if container.metadata.get("major_brand") == "avis":  # animated AVIF: its first track is a still picture
        streams.sort(key=lambda stream: -stream.frames)
    for stream in streams:
        if not stream.disposition & Disposition.attached_pic:  # the cover picture of a music file
            if stream.codec_context is None:
                raise SampleError(path, "its video is in a codec that FFmpeg has no decoder for; convert it to H.264")
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    raise SampleError(path, f"has no video track (it holds: {kinds})")


def _packets(
    container: InputContainer, stream: VideoStream, path: str, onlooker: Onlooker | None = None
) -> Iterator[Packet]:
    """Packets from the first keyframe on, with the empty one at the end that makes the decoder give its last frames.

    What comes before the first keyframe (a recording that starts anywhere) cannot be decoded by anything.
    """
    has_begun, tracks = False, (stream,) if onlooker is None else ()  # (): all
    for packet in container.demux(*tracks):
        if onlooker is not None and packet.size > 0:
            onlooker.packet(packet)
        if packet.stream is not stream:
            continue
        if packet.is_corrupt:
            raise SampleError(path, "a part of its video track is missing or damaged; fetch the file again")
        has_begun = has_begun or packet.is_keyframe
        if has_begun:
            yield packet


def _first_frame_and_spans(
    container: InputContainer, stream: VideoStream, path: str, onlooker: Onlooker | None
) -> tuple[VideoFrame, list[Span]]:
    first: VideoFrame | None = None
    spans: list[Span] = []
    key_pts: int | None = None
    for packet in _packets(container, stream, path, onlooker):
        if first is None:
            first = next((frame for frame in packet.decode() if isinstance(frame, VideoFrame)), None)
        if key_pts is None:
            key_pts = packet.pts
        # A picture shown before the first keyframe refers to frames that were cut away; the decoder drops it.
        is_leading = packet.pts is not None and key_pts is not None and packet.pts < key_pts
        if packet.size > 0 and not packet.is_discard and not is_leading:
            spans.append((packet.pts, packet.duration or 0))
        if len(spans) > MAX_FRAMES:
            raise SampleError(path, f"has more than {MAX_FRAMES:,} frames; cut it into parts")
    if first is None or not spans:
        raise SampleError(path, NO_FRAME)
    return first, spans


def _times(
    spans: list[Span], time_base: Fraction | None, rate: Fraction | None, path: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """(times_s [N] from 0, ticks [N] ascending, duration_s) of shown frames in any order.

    Where any frame has no time of its own (raw streams), all are spaced evenly at the rate in the header.
    """
    duration_of = {pts: duration for pts, duration in spans if pts is not None}
    if len(duration_of) == len(spans) and time_base is not None:
        ticks, seconds_per_tick = np.array(sorted(duration_of), dtype=np.int64), float(time_base)
    elif rate:
        ticks, seconds_per_tick = np.arange(len(spans)), float(1 / rate)
    else:
        raise SampleError(path, "its frames carry no times and the file states no frame rate; convert it to MP4")
    times_s = (ticks - ticks[0]) * seconds_per_tick
    last_s = duration_of.get(int(ticks[-1]), 0) * seconds_per_tick
    if last_s <= 0:  # Matroska does not say how long the last frame stays
        last_s = float(times_s[-1]) / (len(ticks) - 1) if len(ticks) > 1 else float(1 / rate) if rate else 0.0
    return times_s, ticks, float(times_s[-1]) + last_s


def _decode(container: InputContainer, stream: VideoStream, path: str) -> Iterator[VideoFrame]:
    """Shown frames in presentation order. Frames that an edit list hides are decoded and dropped by FFmpeg."""
    for packet in _packets(container, stream, path):
        for frame in packet.decode():
            if isinstance(frame, VideoFrame):
                yield frame


def _declared_duration_s(stream: VideoStream, first: VideoFrame) -> float:
    """Length of the video track as the header states it, seconds; 0 where it does not.

    Matroska states, in a tag h:m:s, the time at which the track ends.
    """
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    parts = stream.metadata.get("DURATION", "").split(":")
    try:
        end_s = sum(float(Fraction(part)) * 60.0**power for power, part in enumerate(reversed(parts)))
    except ValueError:
        return 0.0
    return end_s - (first.time or 0.0)


def orientation(frame: VideoFrame) -> tuple[tuple[bool, bool, bool], bool]:
    """(transpose, mirror, flip) for `upright`, to show the frame as its display matrix asks; is it a turn, and no more?

    The matrix (ISO 14496-12, 8.5.2: a b u c d v x y w, native-endian 16.16) sends the pixel at column p, row q to
    column a p + c q, row b p + d q. Phones write quarter turns; anything between is taken to the nearest one.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 does not know all side data of FFmpeg 8: Exif, of each frame of some MJPEG files
        return QUARTER_TURNS.get(round(frame.rotation / 90) % 4, UPRIGHT), False
    if matrix is None:
        return UPRIGHT, True
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32).tolist()
    is_transposed = abs(b) > abs(a)
    is_mirrored, is_flipped = (c < 0, b < 0) if is_transposed else (a < 0, d < 0)
    is_quarter = (a, d) == (0, 0) if is_transposed else (b, c) == (0, 0)
    is_reflection = is_transposed ^ is_mirrored ^ is_flipped
    return (is_transposed, is_mirrored, is_flipped), is_quarter and not is_reflection


def _to_rgb(frame: VideoFrame, probe: Probe, converter: VideoReformatter) -> np.ndarray:
    """[H, W, 3] uint8, upright. `converter` is kept for the frames of a file and used by one thread at a time."""
    turn, _ = orientation(frame)
    # Left alone each frame makes a converter with a thread per core: 10 % of the CPU time of a clip of 320 x 240, on 2.
    rgb_HW3 = upright(converter.reformat(frame, format="rgb24", threads=1).to_ndarray(), *turn)
    height_px, width_px = rgb_HW3.shape[:2]
    if (width_px, height_px) != (probe.width_px, probe.height_px):
        raise SampleError(
            probe.path,
            f"the frame size changes from {probe.width_px} x {probe.height_px} to {width_px} x {height_px} px "
            "in the middle; convert it to one size",
        )
    return rgb_HW3
