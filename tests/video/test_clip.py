"""A clip is a video or a part of one."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset
from vcr1_fast.types import SampleError
from vcr1_fast.video.cache import clip_key
from vcr1_fast.video.clip import ClipRequest, read_clip
from vcr1_fast.video.read import open_reader, read_frames
from vcr1_fast.video.source_name import SourceName, focus_name, part_name


def test_a_clip_is_the_frames_of_that_part(tmp_path: Path):
    write_dataset(SynthConfig(output_dir=str(tmp_path), num_train=1, num_eval=1), show_progress=False)
    video = str(sorted((tmp_path / "videos").glob("*.mp4"))[0])
    config = VideoConfig(fps=1000.0, min_frame_pixels=7056, max_frame_pixels=7056)  # every frame there is
    with contextlib.closing(open_reader(config)) as reader:
        whole = read_frames(video, config, reader)
        clip = read_clip(ClipRequest(video, config, 2.0, 4.0), reader)
        inside = (whole.times_s >= 2.0) & (whole.times_s < 4.0)
        assert 2 < len(clip.times_s) == int(inside.sum())
        assert clip.times_s[0] == 0.0 and clip.duration_s == pytest.approx(2.0, abs=0.2)
        assert torch.equal(clip.rgb_FHW3, whole.rgb_FHW3[inside])
        sparse = VideoConfig(fps=1.0, min_frame_pixels=7056, max_frame_pixels=7056)
        named = ClipRequest.of(part_name(video, 2.0, 6.0, fps=2.0), sparse)
        assert named == ClipRequest(video, replace(sparse, fps=2.0), 2.0, 6.0)
        frames = read_clip(named, reader)
        assert len(frames.times_s) == 8 and frames.duration_s == pytest.approx(4.0, abs=0.2)  # the clip's own rate
        with pytest.raises(SampleError, match="no frame lies between 900 and 901 s"):
            read_clip(ClipRequest(video, sparse, 900, 901), reader)
        assert ClipRequest.of(video, sparse) == ClipRequest(video, sparse)
        assert ClipRequest.of(part_name(video, 2.0, 6.0), sparse) == ClipRequest(video, sparse, 2.0, 6.0)


def test_a_focused_clip_is_the_whole_with_more_frames_in_the_evidence(tmp_path: Path):
    write_dataset(SynthConfig(output_dir=str(tmp_path), num_train=1, num_eval=1), show_progress=False)
    video = str(sorted((tmp_path / "videos").glob("*.mp4"))[0])
    config = VideoConfig(fps=2.0, min_frame_pixels=7056, max_frame_pixels=7056)
    with contextlib.closing(open_reader(config)) as reader:
        whole = read_clip(ClipRequest.of(video, config), reader)
        request = ClipRequest.of(focus_name(video, [(2.0, 4.0)]), config)
        assert request == replace(ClipRequest.of(video, config), evidence_s=((2.0, 4.0),))
        focused = read_clip(request, reader)
        every = read_frames(video, replace(config, fps=1000.0), reader)
    shown = [int((every.times_s == time_s).nonzero()) for time_s in focused.times_s]
    assert torch.equal(focused.rgb_FHW3, every.rgb_FHW3[shown])  # frames of their own times
    inside, inside_whole = (int(((f.times_s >= 2.0) & (f.times_s <= 4.0)).sum()) for f in (focused, whole))
    assert inside > inside_whole and focused.times_s[-1] > 4.0
    assert (focused.sampled_fps, focused.duration_s) == (whole.sampled_fps, whole.duration_s)
    keys = [clip_key(ClipRequest.of(focus_name(video, [part]), config), "r") for part in ((2.0, 4.0), (2.0, 4.5))]
    assert len({*keys, clip_key(ClipRequest.of(video, config), "r")}) == 3


def test_a_name_says_part_images_and_evidence():
    name = SourceName.parse("/v/a#images=7&fps=2#t=1.000,3.000&fps=4#focus=0.500,1.000;1.500,2.000")
    assert name == SourceName("/v/a", 1.0, 3.0, 4.0, 7, 2.0, ((0.5, 1.0), (1.5, 2.0)))
    assert SourceName.parse("/v/a#focus=1") == SourceName("/v/a#focus=1")  # no fragment
    assert part_name("/v/a#t=1.000,3.000&fps=4", 1.0, 9.0, 8.0) == "/v/a#t=2.000,3.000&fps=8"  # part of a part
    assert part_name("/v.mp4#t=10.000,20.000", 2.0, 5.0, fps=4.0) == "/v.mp4#t=12.000,15.000&fps=4"
    images = "/tvqa/clip#images=all&fps=3"
    assert part_name(part_name(images, 1.0, 9.0), 1.0, 2.0) == f"{images}#t=2.000,3.000"
