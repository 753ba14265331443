"""Folders of images as videos: which image is which frame, which way up, and one clear reason for each defect."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
import torch
from av.video.codeccontext import VideoCodecContext

from tests.video import clips
from vcr1_fast.prompts.dataset import AnnotationSource, read_annotation_files
from vcr1_fast.prompts.schemas.schema import Recipe
from vcr1_fast.settings.config import TaskConfig, VideoConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import SampleError, TrackTruth
from vcr1_fast.video.clip import ClipRequest, read_clip
from vcr1_fast.video.image_folder_reader import ImageFolderReader
from vcr1_fast.video.read import open_reader, read_frames
from vcr1_fast.video.resolution import resize_frame

CONFIG = VideoConfig(min_frame_pixels=7056, max_frame_pixels=7056)
FORMATS = {"jpg": ("mjpeg", "yuvj444p"), "png": ("png", "rgb24"), "bmp": ("bmp", "bgr24"), "webp": ("libwebp", "bgra")}


def encode(rgb_HW3: np.ndarray, suffix: str = "jpg") -> bytes:
    codec, pix_fmt = FORMATS[suffix]
    context = av.CodecContext.create(codec, "w")
    assert isinstance(context, VideoCodecContext)
    context.height, context.width = rgb_HW3.shape[:2]
    context.pix_fmt, context.time_base = pix_fmt, Fraction(1, 25)
    context.options = {"qmin": "1", "qmax": "1"} if suffix == "jpg" else {"lossless": "1"} if suffix == "webp" else {}
    frame = av.VideoFrame.from_ndarray(rgb_HW3, format="rgb24")
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def write_folder(folder: Path, names: Sequence[str], size_px: tuple[int, int] = (48, 96)) -> Path:
    """Image k shows k, in the order of `names`."""
    folder.mkdir(exist_ok=True)
    for k, name in enumerate(names):
        (folder / name).write_bytes(encode(clips.numbered(k, *size_px), name.rpartition(".")[2].lower()))
    return folder


def got_folder(folder: Path, num_images: int) -> Path:
    """With the files that GOT-10k has beside its images."""
    write_folder(folder, [f"{k + 1:08d}.jpg" for k in range(num_images)])
    for name in ("groundtruth.txt", "absence.label", "cover.label", "meta_info.ini", "._00000001.jpg"):
        (folder / name).write_text("no image\n")
    (folder / "thumbnails.jpg").mkdir()
    return folder


def shown(rgb_FHW3: torch.Tensor) -> list[int]:
    return [clips.index_of(rgb) for rgb in rgb_FHW3.numpy()]


@pytest.mark.parametrize("reader_name", ["auto", "pyav", "decord"])
def test_a_folder_is_a_video_of_constant_rate(tmp_path: Path, reader_name: Literal["auto", "pyav", "decord"]):
    folder = got_folder(tmp_path / "GOT-10k_Val_000010", 21)
    reader = open_reader(VideoConfig(reader=reader_name))
    frames = read_frames(str(folder), CONFIG, reader)
    # 21 images at 2 a second and 2 fps: 20 frames when even, 20 / 19 apart
    assert shown(frames.rgb_FHW3) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    assert frames.times_s.tolist() == [k / 2 for k in shown(frames.rgb_FHW3)]
    assert frames.duration_s == 10.5 and frames.sampled_fps == pytest.approx(20 / 10.5)
    assert frames.reader == reader.name and f"pyav {av.__version__}" in reader.name
    film = clips.write_clip(tmp_path / "film.mp4", num_frames=30)
    assert len(read_frames(str(film), CONFIG, reader).times_s) == 4  # files as ever, by the same reader
    reader.close()


def test_the_rate_is_a_setting(tmp_path: Path):
    folder = write_folder(tmp_path / "a", [f"{k}.jpg" for k in range(30)])
    frames = read_frames(str(folder), CONFIG, open_reader(VideoConfig(image_folder_fps=10)))
    assert frames.duration_s == 3.0 and shown(frames.rgb_FHW3) == [0, 6, 12, 17, 23, 29]  # 29 / 5 = 5.8 apart


def test_natural_order_and_all_kinds(tmp_path: Path):
    folder = write_folder(tmp_path / "a", ["img 8.PNG", "img 9.bmp", "img 10.webp", "img 11.JPG"])
    reader = ImageFolderReader(2.0)
    probe = reader.probe(str(folder))
    assert probe.images == ("img 8.PNG", "img 9.bmp", "img 10.webp", "img 11.JPG")
    assert probe.times_s.tolist() == [0.0, 0.5, 1.0, 1.5] and (probe.width_px, probe.height_px) == (96, 48)
    assert [clips.index_of(rgb) for rgb in reader.read(probe, [0, 0, 1, 2, 3])] == [0, 0, 1, 2, 3]


def exif(orientation: int, order: str = "<") -> bytes:
    start = b"II" if order == "<" else b"MM"
    return start + struct.pack(f"{order}HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def with_exif(data: bytes, tiff: bytes) -> bytes:
    if data.startswith(b"\xff\xd8"):
        body = b"Exif\0\0" + tiff
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    return data[:33] + clips.png_chunk(b"eXIf", tiff) + data[33:]  # after the header chunk


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation(tmp_path: Path, suffix: str, order: str):
    """Where the first row and column of the stored picture are to be shown: Exif 2.32, table of tag 274."""
    picture = np.zeros((48, 96, 3), np.uint8)
    picture[:24, :32] = (250, 0, 0)
    picture[24:, 64:] = (0, 0, 250)
    turned = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1),
        7: picture[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(picture),
        9: picture,  # no such value
    }
    for orientation, want in turned.items():
        folder = tmp_path / f"{orientation}{suffix}"
        folder.mkdir()
        (folder / f"1.{suffix}").write_bytes(with_exif(encode(picture, suffix), exif(orientation, order)))
        reader = ImageFolderReader(2.0)
        probe = reader.probe(str(folder))
        [got] = reader.read(probe, [0])
        assert (probe.height_px, probe.width_px) == got.shape[:2] == want.shape[:2]
        assert np.abs(got.astype(int) - want).mean() < 4, orientation
        alone = ClipRequest.of(f"{folder}/1.{suffix}#image", VideoConfig(max_image_pixels=4 * 784))
        frames = read_clip(alone, open_reader(VideoConfig(reader="decord")))
        size_px = (28 * want.shape[0] // 48, 28 * want.shape[1] // 48)  # 39.6 x 79.2 would fit, or 79.2 x 39.6
        assert frames.rgb_FHW3.shape == (1, *size_px, 3) and frames.times_s.tolist() == [0.0]
        assert frames.reader == reader.name
        small = resize_frame(torch.from_numpy(got), *size_px)
        assert torch.equal(frames.rgb_FHW3[0], small)


def test_a_broken_image_is_refused_by_its_own_name(tmp_path: Path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(encode(clips.numbered(1, 48, 96))[:-9])
    with pytest.raises(SampleError, match=r"cut\.jpg cannot be decoded, it is cut short") as caught:
        read_clip(ClipRequest.of(f"{path}#image", CONFIG), open_reader(CONFIG))
    assert caught.value.source == str(path)


def test_images_have_bounds_of_their_own(tmp_path: Path):
    """Between 4 and 1,280 tokens of 28 x 28: 10 x 10 px grow to 2 x 2; 1080 x 1920 px shrink to 26.8 x 47.7 = 1,280."""
    for size_px, seen_px in (((10, 10), (56, 56)), ((1080, 1920), (26 * 28, 47 * 28))):
        (tmp_path / "a.bmp").write_bytes(encode(np.zeros((*size_px, 3), np.uint8), "bmp"))
        frames = read_clip(ClipRequest.of(f"{tmp_path}/a.bmp#image", VideoConfig()), open_reader(CONFIG))
        assert tuple(frames.rgb_FHW3.shape[1:3]) == seen_px


def test_agrees_with_pillow(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    row, column = np.mgrid[0:50, 0:70]
    rgb = np.stack([row * 5, column * 3, 255 - row * 2 - column], axis=-1).astype(np.uint8)
    for k, kind in enumerate(("JPEG", "PNG", "WEBP", "BMP")):
        for mode in ("RGB", "L", "P", "RGBA"):
            if kind == "JPEG" and mode in ("P", "RGBA"):
                continue
            stored = io.BytesIO()
            image.fromarray(rgb).convert(mode).save(stored, kind, quality=95)
            folder = tmp_path / f"{kind}{mode}"
            folder.mkdir()
            (folder / f"{k}.{kind.lower()}").write_bytes(stored.getvalue())
            reader = ImageFolderReader(2.0)
            [got] = reader.read(reader.probe(str(folder)), [0])
            want = np.asarray(image.open(stored).convert("RGB")).astype(int)
            lossy = kind in ("JPEG", "WEBP")
            assert np.abs(got - want).mean() < (3.5 if lossy else 0.01), (kind, mode)


def test_each_defect_has_one_clear_reason(tmp_path: Path):
    def folder(name: str, *others: tuple[str, bytes], num_images: int = 4) -> Path:
        made = write_folder(tmp_path / name, [f"{k:03d}.jpg" for k in range(num_images)])
        for file, content in others:
            (made / file).write_bytes(content)
        return made

    picture = clips.numbered(3, 48, 96)
    png, bmp, webp = (encode(picture, suffix) for suffix in ("png", "bmp", "webp"))
    jpeg = encode(np.random.default_rng(0).integers(0, 256, (48, 96, 3)).astype(np.uint8))
    wide = encode(clips.numbered(3, 48, 98))
    gap = folder("gap", num_images=9)
    (gap / "004.jpg").unlink()
    pipe = folder("pipe")
    os.mkfifo(pipe / "004.jpg")
    dangling = folder("dangling")
    (dangling / "004.jpg").symlink_to(tmp_path / "nowhere")
    cases = {
        folder("empty", num_images=0): r"holds no image \(\.jpg",
        folder("labels", ("groundtruth.txt", b"1,2,3,4"), num_images=0): "holds no image",
        gap: r"an image is missing: 003\.jpg is followed by 005\.jpg, wanted numbers that rise by 1",
        folder("twice", ("002.png", png)): r"there twice \(002\.jpg, 002\.png\)",
        folder("named", ("cover.jpg", jpeg)): r"named in different ways \(000\.jpg, cover\.jpg\)",
        folder("mixed", ("003.jpg", wide)): r"003\.jpg has 98 x 48 px, 000\.jpg has 96 x 48",
        folder("none", ("002.jpg", b"")): r"002\.jpg is empty",
        folder("first", ("000.jpg", b"")): r"000\.jpg is empty",
        folder("text", ("002.jpg", b"<html>404</html>")): r"002\.jpg is not an image .*not a JPEG, PNG, WebP or BMP",
        folder("head", ("002.jpg", jpeg[:60])): r"002\.jpg is not an image .*header is cut short",
        folder("cut", ("003.jpg", jpeg[: len(jpeg) // 2])): r"003\.jpg cannot be decoded",
        folder("end", ("003.jpg", jpeg[:-40])): r"003\.jpg cannot be decoded, it is cut short",
        folder("png", ("004.png", png[: len(png) // 2])): r"004\.png cannot be decoded",
        folder("bits", ("004.png", png[:-30] + bytes(30))): r"004\.png cannot be decoded",
        folder("bmp", ("004.bmp", bmp[:-1000])): r"004\.bmp cannot be decoded",
        folder("webp", ("004.webp", webp[: len(webp) // 2])): r"004\.webp cannot be decoded|header",
        pipe: r"004\.jpg is not a regular file",
        dangling: r"004\.jpg cannot be opened: No such file",
    }
    reader = open_reader(CONFIG)
    for path, reason in cases.items():
        with pytest.raises(SampleError, match=reason) as caught:
            probe = reader.probe(str(path))
            list(reader.read(probe, range(len(probe.times_s))))
        assert caught.value.source == str(path), path.name
        assert "\n" not in caught.value.reason and len(caught.value.reason) < 300


def test_a_bomb_is_refused_by_its_header(tmp_path: Path):
    """400 million pixels in 50 KB of PNG."""
    data = clips.black_png(20_000)
    assert len(data) < 300_000
    folder = write_folder(tmp_path / "a", ["1.jpg"])
    (folder / "2.png").write_bytes(data)
    reader = open_reader(CONFIG)
    probe = reader.probe(str(folder))
    with pytest.raises(SampleError, match=r"2\.png has frames of 20000 x 20000 px, more than video\.max_source_pixels"):
        list(reader.read(probe, [1]))
    small = open_reader(VideoConfig(max_source_pixels=96 * 48 - 1))
    with pytest.raises(SampleError, match=r"1\.jpg has frames of 96 x 48 px, more than .* \(4607\)"):
        small.probe(str(folder))
    exact = open_reader(VideoConfig(max_source_pixels=96 * 48))
    assert len(list(exact.read(exact.probe(str(folder)), [0]))) == 1


@pytest.mark.parametrize("recipe", ["fixed", "paper"])
def test_got_rows_show_seven_images_on_their_declared_timeline(tmp_path: Path, recipe: Recipe):
    """From the annotation row to the frames: box i of 1..7 lies on image i - 1, at the instants that the row names."""
    got_folder(tmp_path / "GOT-10k_Val_000010", 101)
    row = {"path": "/cluster/GOT-10k_Val_000010", "object": "sloth", "gt": [[0.1, 0.0, 0.8, 0.7]] * 8}
    (tmp_path / "got.json").write_text(json.dumps([row]))
    tasks = make_tasks(TaskConfig(recipe=recipe))
    [content] = read_annotation_files([AnnotationSource(tmp_path / "got.json")], tasks, recipe)
    [example] = content.examples
    assert isinstance(example.truth, TrackTruth)
    # whatever the settings say of rate and length: the annotation declares both
    for config in (CONFIG, VideoConfig(fps=1.0, image_folder_fps=10.0, max_frames=4, max_frame_pixels=12544)):
        reader = open_reader(config)
        frames = read_clip(ClipRequest.of(example.video, config), reader)
        # int(i * 100 / 6) of 101 images, the last one again to make pairs
        assert shown(frames.rgb_FHW3) == [0, 16, 33, 50, 66, 83, 100, 100]
        assert frames.times_s.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
        assert frames.sampled_fps == 2.0 and frames.duration_s == 4.0
    first_box = 2 if recipe == "fixed" else 1
    assert set(example.truth.times_s[first_box:]) <= set(frames.times_s.tolist())


def test_a_folder_whose_name_says_its_rate(tmp_path: Path):
    """13 images, 3 a second: 4.33 s, whatever the settings say of folders; a part of it, and a file, which knows."""
    folder = write_folder(tmp_path / "clip", [f"{k + 1:05d}.jpg" for k in range(13)])
    name = f"{folder}#images=all&fps=3"
    requests = [ClipRequest.of(name, replace(CONFIG, fps=fps)) for fps in (3.0, 1.5)]
    reader = open_reader(CONFIG)
    assert CONFIG.image_folder_fps == 2.0 and requests[0].config.image_folder_fps == 3.0
    whole, half = (read_clip(request, reader) for request in requests)
    assert shown(whole.rgb_FHW3) == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]  # 12 of the 13, ends included
    assert shown(half.rgb_FHW3) == [0, 2, 5, 7, 10, 12]  # 4.33 s at 1.5 a second, an even number
    assert whole.duration_s == half.duration_s == pytest.approx(13 / 3) and half.times_s[-1] == 4.0
    part = read_clip(ClipRequest.of(f"{name}#t=1.000,3.000", requests[0].config), reader)
    assert shown(part.rgb_FHW3) == [3, 4, 5, 6, 7, 8] and part.duration_s == 2.0
    film = clips.write_clip(tmp_path / "a.mp4", num_frames=50)
    request = ClipRequest.of(f"{film}#images=all&fps=3", CONFIG)
    assert read_clip(request, reader).duration_s == read_frames(str(film), CONFIG, reader).duration_s


def test_fewer_images_than_asked_for_are_repeated(tmp_path: Path):
    folder = write_folder(tmp_path / "a", ["1.jpg", "2.jpg", "3.jpg"])
    reader = open_reader(CONFIG)
    frames = read_clip(ClipRequest.of(f"{folder}#images=5&fps=2", CONFIG), reader)
    assert shown(frames.rgb_FHW3) == [0, 0, 1, 1, 2, 2] and frames.times_s.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    one = read_clip(ClipRequest.of(f"{folder}#images=1&fps=2", CONFIG), reader)
    assert shown(one.rgb_FHW3) == [0, 0]
    part = read_clip(ClipRequest.of(f"{folder}#images=5&fps=2#t=1.000,2.000&fps=4", CONFIG), reader)
    assert shown(part.rgb_FHW3) == [1, 1] and part.times_s.tolist() == [0.0, 0.5]
    film = clips.write_clip(tmp_path / "a.mp4", num_frames=61)  # a folder that was made a file
    assert shown(read_clip(ClipRequest.of(f"{film}#images=7&fps=2", CONFIG), reader).rgb_FHW3) == [
        *(0, 10, 20, 30, 40, 50, 60, 60)
    ]
