"""The benchmark of decoding: its clips, its ways, the CPU time it counts, and what a run gives."""

import argparse
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from vcr1_kernels.reference import patchify

from bench import decode, decode_ways
from bench.decode_sources import SOURCE_FPS, Scene, Source, write_source
from bench.gpu_summary import decode_bars
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.video.clip import ClipRequest

TINY = Source("h264", 128, 96, 2.0)


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(TINY, tmp_path_factory.mktemp("clips"))


def quick(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"quick": True, "seconds": None, "folder": None, **changes})


@pytest.mark.parametrize("source", [TINY, replace(TINY, codec="vp9")], ids=lambda source: source.codec)
def test_clips_show_the_scene_and_are_written_once(source: Source, tmp_path: Path):
    path = write_source(source, tmp_path)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
        assert container.streams.video[0].codec_context.name.removeprefix("lib") == source.codec
    assert len(frames) == 2 * SOURCE_FPS == source.num_frames
    drawn = Scene(128, 96).yuv420(40)
    assert np.abs(frames[40].astype(int) - drawn).mean() < 8 < np.abs(frames[0].astype(int) - drawn).mean()
    assert drawn[:96].std() > 30  # not flat
    written_ns = path.stat().st_mtime_ns
    assert write_source(source, tmp_path) == path and path.stat().st_mtime_ns == written_ns
    assert [file.name for file in tmp_path.iterdir()] == [source.file_name]


def test_their_frames_and_patches_are_ours(clip_path: Path):
    """The bytes agree up to the resize, which is float32 in theirs; the processors agree to float32 rounding."""
    request = ClipRequest(str(clip_path), VideoConfig(fps=2.0, min_frame_pixels=28 * 28))
    frames = decode_ways.read_plain(clip_path, request.config)
    values_F3HW = decode_ways.qwen_frames(request)
    assert frames.rgb_FHW3.shape == (4, 84, 140, 3)
    difference = (values_F3HW.permute(0, 2, 3, 1) - frames.rgb_FHW3.float()).abs()
    assert difference.mean() <= decode_ways.MAX_MEAN_LEVELS and difference.max() <= 12  # 9 where a sharp edge rings
    expected = patchify(values_F3HW.permute(0, 2, 3, 1).to(torch.uint8).contiguous())
    for process in (decode_ways.batched_patches, decode_ways.per_frame_patches):
        torch.testing.assert_close(process(values_F3HW), expected, rtol=1e-5, atol=1e-6)


def test_distance_is_in_levels():
    rgb = torch.full((2, 28, 28, 3), 100, dtype=torch.uint8)
    brighter = rgb.clone()
    brighter[..., 1] += 3  # one channel of three: 1 level on average
    assert decode_ways.mean_levels(patchify(brighter), patchify(rgb)) == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(ValueError, match="shapes differ"):
        decode_ways.mean_levels(patchify(rgb), patchify(rgb.repeat(2, 1, 1, 1)))


def test_cpu_time_of_living_and_ended_children_counts():
    burn = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ninput()"
    before_s = decode.cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    alive_s = decode.cpu_seconds() - before_s
    child.communicate(b"\n")
    ended_s = decode.cpu_seconds() - before_s
    assert 0.38 <= alive_s <= ended_s + 0.02 < 2.0


def test_a_reader_that_is_another_one_is_refused(clip_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plain = decode_ways.open_reader
    monkeypatch.setattr(decode_ways, "open_reader", lambda config: plain(replace(config, reader="pyav")))
    config = VideoConfig()
    frames = decode_ways.read_plain(clip_path, config)
    clip = decode_ways.Clip(ClipRequest(str(clip_path), config), frames, torch.device("cpu"), tmp_path)
    with ExitStack() as stack, pytest.raises(RuntimeError, match="open_reader gave pyav"):
        decode_ways.open_reader_way("torchcodec", clip, stack)


def test_what_crosses_to_a_gpu_is_frames_and_for_nvdec_the_file_too(clip_path: Path, tmp_path: Path):
    frames = decode_ways.read_plain(clip_path, VideoConfig())
    for device, name, wanted in (
        ("cuda", "dali", clip_path.stat().st_size + frames.rgb_FHW3.numel()),
        ("cuda", "pyav", frames.rgb_FHW3.numel()),
        ("cpu", "dali", frames.rgb_FHW3.numel()),
    ):
        clip = decode_ways.Clip(ClipRequest(str(clip_path), VideoConfig()), frames, torch.device(device), tmp_path)
        assert decode_ways.bytes_to_device(name, clip) == wanted


def test_a_run_measures_every_way_and_they_agree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(decode_ways, "READERS", ("pyav", "decord"))
    monkeypatch.setattr(decode, "QUICK_POINTS", decode.QUICK_POINTS[:1])
    result = decode.run(quick())
    assert result["disagreements"] == [] and decode.failed(result) is None and result["left_out"] == []
    rows = {row["way"]: row for row in result["rows"]}
    assert result["absent"] == []
    assert set(rows) == {*decode_ways.openers(has_workers=True)} and len(rows) >= 7
    for row in rows.values():
        assert row["num_frames"] == 4 and row["repeats"] == 3
        assert row["clips_per_s"] == pytest.approx(1e3 / row["median_ms"])
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["cpu_s"] > 0
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["median_ms"])
        width, height = map(int, row["model_size"].split("x"))
        is_ours = row["way"].startswith("ours")
        assert row["gpu_bytes"] == 4 * width * height * 3 * (1 if is_ours else 4)
        assert row["speedup_batched"] == pytest.approx(rows[decode.BATCHED]["median_ms"] / row["median_ms"])
    assert rows[decode.PLAIN]["mean_levels"] == 0.0
    assert rows["ours, RAM cache"]["median_ms"] < rows[decode.PLAIN]["median_ms"]
    assert "all patches agree" in capsys.readouterr().out.splitlines()[-1]


def test_wrong_patches_fail_the_run_and_a_broken_way_does_not(monkeypatch: pytest.MonkeyPatch):
    def ways(*, has_workers: bool) -> dict[str, decode_ways.Opener]:
        assert has_workers

        def dark(clip: decode_ways.Clip, stack: ExitStack) -> decode_ways.ClipWay:
            way = decode_ways.open_reader_way("pyav", clip, stack)
            return replace(way, name="dark", run=lambda: way.run() - 1.0)

        def broken(clip: decode_ways.Clip, stack: ExitStack) -> decode_ways.ClipWay:
            raise RuntimeError("no such library")

        return {decode.PLAIN: lambda c, s: decode_ways.open_reader_way("pyav", c, s), "dark": dark, "broken": broken}

    monkeypatch.setattr(decode, "openers", ways)
    monkeypatch.setattr(decode, "QUICK_POINTS", decode.QUICK_POINTS[:1])
    result = decode.run(quick())
    assert [row["way"] for row in result["absent"]] == ["broken"]
    assert "no such library" in result["absent"][0]["reason"]
    assert len(result["disagreements"]) == 1 and "dark" in (decode.failed(result) or "")
    assert [row["speedup_batched"] for row in result["rows"]] == [None, None]


def test_points_above_the_budget_are_left_out_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "measure_point", lambda *_: pytest.fail("there was no time for it"))
    result = decode.run(quick(quick=False, seconds=0.5))
    assert len(result["left_out"]) == len(decode.POINTS) and decode.MIDDLE.name in result["left_out"][0]


def test_a_run_stopped_from_outside_reports_what_it_has(monkeypatch: pytest.MonkeyPatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "measure_point", stopped)
    assert "stopped from outside" in decode.run(quick())["left_out"][0]


def test_bars_are_judged_on_a_gpu_only():
    def row(way: str, batched: float, gpu_bytes: int) -> dict:
        return {"size": "h264", "way": way, "speedup_batched": batched, "gpu_bytes": gpu_bytes}

    rows = [row("ours, pyav", 1.1, 10), row("ours, dali", 2.5, 10), row(decode.BATCHED, 1.0, 40)]
    bars = {bar.what: bar for bar in decode_bars({"is_gpu": True, "rows": rows})}
    assert bars["decode h264, dali: x qwen-vl-utils, batched"].holds is True
    assert bars["decode, bytes to the GPU: x fewer"].measured == pytest.approx(4.0)
    assert bars["decode, bytes to the GPU: x fewer"].holds is True
    missing = decode_bars({"is_gpu": True, "rows": rows[:1]})
    assert [bar.measured for bar in missing] == [None, None] and all(bar.holds is None for bar in missing)
    assert all(bar.holds is None for bar in decode_bars({"is_gpu": False, "rows": rows}))
