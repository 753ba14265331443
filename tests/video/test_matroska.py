"""Where a Matroska file may end."""

from pathlib import Path

import pytest

from vcr1_fast.video.matroska import is_cut_short

HEAD = b"\x1a\x45\xdf\xa3\x82xx"  # EBML, 2 bytes
SEGMENT = b"\x18\x53\x80\x67\x01" + b"\xff" * 7  # of unknown length, as live recordings have it
INFO = b"\x15\x49\xa9\x66\x40\x03xxx"  # its length in two bytes
CLUSTER = b"\x1f\x43\xb6\x75\xff"
BLOCK = b"\xa3\x84xxxx"
WHOLE_CLUSTER = b"\x1f\x43\xb6\x75\x86" + BLOCK


@pytest.mark.parametrize(
    "parts",
    [
        (HEAD, SEGMENT, INFO, CLUSTER, BLOCK, BLOCK, CLUSTER, BLOCK),
        (HEAD, SEGMENT, INFO, WHOLE_CLUSTER, WHOLE_CLUSTER),
    ],
)
def test_cut_anywhere_but_between_two_elements(tmp_path: Path, parts: tuple[bytes, ...]) -> None:
    whole, ends = b"".join(parts), {sum(map(len, parts[:k])) for k in range(len(parts) + 1)}
    path = tmp_path / "a.mkv"
    for num_bytes in range(len(whole) + 1):
        path.write_bytes(whole[:num_bytes])
        assert is_cut_short(str(path)) == (num_bytes not in ends), num_bytes


@pytest.mark.parametrize("end", [bytes(20), b"\xa3\x00", INFO[:4] + b"\xff"], ids=["zeros", "no length", "unknown"])
def test_what_cannot_be_followed_is_not_judged(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(HEAD + SEGMENT + CLUSTER + BLOCK + end)
    assert not is_cut_short(str(path))
