"""Damage that shows in the packets of a video, without decoding them: for decoders that hide it.

NVDEC and DALI give a picture for whatever bits they get. What a packet must look like is checked here instead: zeroed
blocks (a download that was never finished) and overwritten blocks that reach over the start of a packet are found;
other bits changed inside one packet are not, FFmpeg does not see them either where the codec has no redundancy (VP8,
VP9, AV1). Called by dali_reader for every packet of a file; 1 ms for 10 MB.
"""

from __future__ import annotations

# A file that was never written to its end has holes of whole disk blocks (4096 bytes). An arithmetic coder that only
# meets its likely symbol writes zeros as well, 1 byte for 1400 symbols: 512 are more than the blocks of a 4K screen.
HOLE = bytes(512)

H264_SLICES, HEVC_SLICES = range(1, 6), range(32)
H264_IDR, H264_SPS, HEVC_SPS = 5, 7, 33


class BitstreamCheck:
    """The state of one video track, packet by packet in the order of the file."""

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        """`codec`: FFmpeg's name of it; `extradata`: the codec's header as the container keeps it."""
        self.codec = codec
        self._length_bytes = _nal_length_bytes(codec, extradata or b"")
        self._sps: bytes | None = None
        self._size_px: tuple[int, int] | None = None

    def damage(self, packet: bytes) -> str | None:
        """What is wrong with the packet, or None. Also when the picture size changes: what follows would be garbage."""
        if not packet:
            return None
        if self.codec != "mjpeg" and HOLE in packet.rstrip(b"\0"):  # JPEG codes flat grey as zeros
            return f"holds more than {len(HOLE)} zero bytes in a row"
        match self.codec:
            case "h264" | "hevc" if self._length_bytes:
                return self._nal_damage(packet)
            case "vp8":
                return self._vp8_damage(packet)
            case "vp9":
                return self._vp9_damage(packet)
            case "av1":
                return _av1_damage(packet)
            case "mjpeg":
                is_whole = packet.startswith(b"\xff\xd8") and b"\xff\xd9" in packet[-512:]
                return None if is_whole else "holds a JPEG picture without start or end"
            case _:
                return None

    def can_begin(self, packet: bytes) -> bool:
        """Whether this keyframe is right by itself. H.264's may be one from which pictures only become right, over some
        frames; an IDR picture is. False, too, where units have no length.
        """
        if self.codec != "h264":
            return True
        at = 0
        while self._length_bytes and at + self._length_bytes < len(packet):
            start = at + self._length_bytes
            if packet[start] & 31 in H264_SLICES:
                return packet[start] & 31 == H264_IDR
            at = start + int.from_bytes(packet[at:start], "big")
        return False

    def _nal_damage(self, packet: bytes) -> str | None:
        """ISO 14496-15: NAL units behind their lengths fill the packet. ISO 14496-10 and 23008-2, 7.4.1: the bytes of
        a unit never contain 00 00 00, 00 00 01 or 00 00 02.
        """
        is_h264 = self.codec == "h264"
        at = num_empty = 0
        while at < len(packet):
            start = at + self._length_bytes
            at = start + int.from_bytes(packet[at:start], "big")
            if start > len(packet) or at > len(packet):
                return "holds a NAL unit that is longer than its packet"
            if at == start:
                num_empty += 1  # one is sloppy, more are zeros written over the packet
                if num_empty > 1:
                    return "holds NAL units of length 0"
                continue
            header = packet[start]
            kind = header & 31 if is_h264 else header >> 1 & 63
            if header & 128:
                return "holds a NAL unit without a valid header"
            unit = packet[start:at].rstrip(b"\0")
            if kind in (H264_SLICES if is_h264 else HEVC_SLICES):
                if any(forbidden in unit for forbidden in (b"\0\0\0", b"\0\0\1", b"\0\0\2")):
                    return "holds bytes that no encoder writes"
            elif kind == (H264_SPS if is_h264 else HEVC_SPS):
                if self._sps not in (None, unit):
                    return "changes its picture format in the middle"
                self._sps = unit
        return None

    def _vp8_damage(self, packet: bytes) -> str | None:
        """RFC 6386, 9.1: 3 bytes with the length of the first partition; on keyframes then 9D 01 2A and the size."""
        if len(packet) < 3:
            return "holds a VP8 frame of less than 3 bytes"
        tag = int.from_bytes(packet[:3], "little")
        is_key = not tag & 1
        if (tag >> 5) + (10 if is_key else 3) > len(packet):
            return "holds a VP8 frame that is cut short"
        if not is_key:
            return None
        if packet[3:6] != b"\x9d\x01\x2a":
            return "holds a VP8 keyframe without a start code"
        size_px = tuple(int.from_bytes(packet[i : i + 2], "little") & 0x3FFF for i in (6, 8))
        return self._size_damage((size_px[0], size_px[1]))

    def _vp9_damage(self, packet: bytes) -> str | None:
        """VP9 bitstream specification 6.2, annex B: marker 10, sync code 49 83 42, sizes of a superframe's frames."""
        frames = [packet]
        last = packet[-1]
        if last & 0xE0 == 0xC0:
            num_bytes, num_frames = (last >> 3 & 3) + 1, (last & 7) + 1
            index = packet[-(2 + num_bytes * num_frames) :]
            if len(index) == 2 + num_bytes * num_frames and index[0] == last:
                cuts = range(1, len(index) - 1, num_bytes)
                sizes = [int.from_bytes(index[i : i + num_bytes], "little") for i in cuts]
                if sum(sizes) + len(index) > len(packet):
                    return "holds a VP9 superframe that is cut short"
                ends = [sum(sizes[: i + 1]) for i in range(num_frames)]
                frames = [packet[end - size : end] for end, size in zip(ends, sizes, strict=True) if size]
        for frame in frames:
            first = frame[0]
            if first >> 6 != 0b10:
                return "holds a VP9 frame without a frame marker"
            is_profile_0 = not first & 0x30
            is_key = first & 0x0C == 0  # neither show_existing_frame nor an inter frame
            if not is_profile_0 or not is_key:
                continue
            if frame[1:4] != b"\x49\x83\x42" or len(frame) < 9:
                return "holds a VP9 keyframe without a sync code"
            if frame[4] >> 5 != 7:  # colour space RGB has other fields here
                bits = int.from_bytes(frame[4:9], "big") >> 4  # 3 colour space, 1 range, 16 width - 1, 16 height - 1
                if damage := self._size_damage((bits >> 16 & 0xFFFF, bits & 0xFFFF)):
                    return damage
        return None

    def _size_damage(self, size_px: tuple[int, int]) -> str | None:
        if self._size_px not in (None, size_px):
            return "changes its picture size in the middle"
        self._size_px = size_px
        return None


def _nal_length_bytes(codec: str, extradata: bytes) -> int:
    """Bytes of the length in front of each NAL unit (ISO 14496-15, 5.3.3 and 8.3.3); 0: start codes instead."""
    at = {"h264": 4, "hevc": 21}.get(codec)
    if at is None or len(extradata) <= at or extradata[0] != 1:
        return 0
    return (extradata[at] & 3) + 1


def _av1_damage(packet: bytes) -> str | None:
    """AV1 bitstream specification 5.3: units with a header bit of 0 and their size in leb128 fill the packet."""
    at = 0
    while at < len(packet):
        header = packet[at]
        if header & 0x81 or not header >> 3:  # forbidden bit, reserved bit, reserved type 0
            return "holds an AV1 unit without a valid header"
        at += 2 if header & 4 else 1
        if not header & 2:  # no size: the last one, it fills the rest
            return None
        size = shift = 0
        while True:
            if at >= len(packet) or shift > 28:
                return "holds an AV1 unit that is cut short"
            byte = packet[at]
            size |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if not byte & 128:
                break
        at += size
    return None if at == len(packet) else "holds an AV1 unit that is longer than its packet"
