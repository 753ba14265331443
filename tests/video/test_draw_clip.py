"""A clip drawn again: uneven times, odd sizes and the second encoder, by decoding what was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from vcr1_fast.types import SampleError
from vcr1_fast.video import draw_clip
from vcr1_fast.video.draw_clip import span_mark, write_clip
from vcr1_fast.video.reader import Probe

TIMES_S = [0.0, 0.1, 0.35, 0.4, 1.0]


class GreyReader:
    """Frames of one grey each, 10 levels apart; with `num_good` it finds the rest damaged."""

    name = "made"

    def __init__(self, height_px: int, width_px: int, num_good: int = len(TIMES_S)) -> None:
        self.shape, self.num_good = (height_px, width_px, 3), num_good

    def probe(self, path: str) -> Probe:
        return Probe(path, np.array(TIMES_S), self.shape[1], self.shape[0], 1.2)

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in frame_indices:
            if index >= self.num_good:
                raise SampleError(probe.path, "is damaged")
            yield np.full(self.shape, 100 + 10 * index, np.uint8)

    def close(self) -> None: ...


@pytest.mark.parametrize(("codec", "wanted"), [("libx264", "h264"), ("mpeg4", "mpeg4")])
def test_times_and_an_odd_size_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, wanted: str):
    monkeypatch.setattr(draw_clip, "CODECS", {codec: draw_clip.CODECS[codec]})
    reader = GreyReader(61, 83)
    write_clip(tmp_path / "a.mp4", reader, reader.probe("a"), span_mark([(0.2, 0.6)], 1.2))
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [*container.decode(video=0)]
        assert container.streams.video[0].codec_context.name == wanted
    assert [(frame.width, frame.height) for frame in frames] == [(83, 61)] * 5
    assert [float(frame.time or 0) for frame in frames] == pytest.approx(TIMES_S, abs=1e-4)
    levels = [int(frame.to_ndarray(format="rgb24")[5, 5, 0]) for frame in frames]
    assert levels == pytest.approx([100, 110, 120, 130, 140], abs=2)


def test_what_cannot_be_read_or_written_leaves_no_file(tmp_path: Path):
    damaged = GreyReader(60, 84, num_good=3)
    with pytest.raises(SampleError, match="is damaged"):
        write_clip(tmp_path / "a.mp4", damaged, damaged.probe("a"), span_mark([], 1.2))
    assert list(tmp_path.iterdir()) == []
    whole = GreyReader(60, 84)
    with pytest.raises(OSError, match=r"none/a.mp4 cannot be written \(No such file or directory\)"):
        write_clip(tmp_path / "none" / "a.mp4", whole, whole.probe("a"), span_mark([], 1.2))
