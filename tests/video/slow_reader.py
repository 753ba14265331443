"""A reader that takes its time over every clip, as a long video on a network disk does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.reader import Probe

CLIP_S = 0.25


class SlowReader(PyavReader):
    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        time.sleep(CLIP_S)
        return super().read(probe, frame_indices)


def open_slow_reader(config: VideoConfig) -> SlowReader:
    return SlowReader()
