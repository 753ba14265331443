"""GOT-10k (arXiv 1810.11981) as object tracking at 8 instants.

val/list.txt names the sequences, one a line; each is a folder beside it with its images, groundtruth.txt (a line per
image: left, top, width, height in pixels), meta_info.ini (object_class, resolution) and cover.label (how much of the
object is to be seen in each image, 0 to 8).

The benchmark tracks through every image; a model that answers in text is asked for NUM_IMAGES at equal distances, as
VideoChat-R1 is (its own 8-box file is read as it is, see prompts/schemas/got10k.py). Instants at which nothing of the
object is seen are not asked for, as the toolkit leaves them out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vcr1_fast.evaluation.suites.suite import Found, Suite, known_categories, made
from vcr1_fast.prompts.annotation_files import read_text_file
from vcr1_fast.prompts.schemas.got10k import IMAGES_PER_S
from vcr1_fast.prompts.schemas.schema import Row, read_text
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.tasks.frame_overlap import inside_picture
from vcr1_fast.types import Box
from vcr1_fast.video.source_name import images_name

NUM_IMAGES = 8
_RESOLUTION = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)")


def _read(files: Sequence[Path], videos: Path) -> Found:
    for file in files:
        for number, line in enumerate(read_text_file(file).splitlines(), start=1):
            if line.strip():
                yield f"{file}:{number}", made(partial(_row, line.strip(), videos))


def _row(name: str, videos: Path) -> Row:
    folder = videos / name
    try:
        meta, boxes, covers = _read_meta(folder), _read_boxes(folder), _read_covers(folder)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    if len(boxes) < NUM_IMAGES or len(covers) != len(boxes):
        raise ValueError(
            f"{folder} has {len(boxes)} boxes and {len(covers)} covers, wanted one of each per image and at least "
            f"{NUM_IMAGES}; those of the test set are withheld"
        )
    shown = [i * (len(boxes) - 1) // (NUM_IMAGES - 1) for i in range(NUM_IMAGES)]
    seen = [i for i, image in enumerate(shown) if i == 0 or covers[image] > 0]
    return {
        "id": f"got10k:{name}",
        "task": "object_tracking",
        "video": images_name(str(folder.absolute()), NUM_IMAGES, IMAGES_PER_S),
        "query": read_text(meta, "object_class"),
        "duration_s": NUM_IMAGES / IMAGES_PER_S,
        "boxes": [list(_corners(boxes[shown[i]], _size_px(meta))) for i in seen],
        "times_s": [i / IMAGES_PER_S for i in seen],
        "categories": known_categories({key: meta.get(key) for key in ("root_class", "motion_class")}),
    }


def _read_meta(folder: Path) -> dict[str, str]:
    lines = (line.partition(": ") for line in read_text_file(folder / "meta_info.ini").splitlines())
    return {key.strip(): value.strip() for key, colon, value in lines if colon}


def _read_boxes(folder: Path) -> list[list[float]]:
    return [_numbers(folder / "groundtruth.txt", line, 4) for line in _lines(folder / "groundtruth.txt")]


def _read_covers(folder: Path) -> list[float]:
    return [_numbers(folder / "cover.label", line, 1)[0] for line in _lines(folder / "cover.label")]


def _lines(file: Path) -> list[str]:
    return [line for line in read_text_file(file).splitlines() if line.strip()]


def _numbers(file: Path, line: str, count: int) -> list[float]:
    try:
        numbers = [float(number) for number in line.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise ValueError(f"{file} has the line {line!r:.60}, wanted {count} numbers")
    return numbers


def _size_px(meta: dict[str, str]) -> tuple[int, int]:
    match = _RESOLUTION.fullmatch(read_text(meta, "resolution"))
    if match is None:
        raise ValueError(f"resolution is {meta['resolution']!r:.60}, wanted (WIDTH, HEIGHT)")
    return int(match[1]), int(match[2])


def _corners(box: list[float], size_px: tuple[int, int]) -> Box:
    (left, top, width, height), (width_px, height_px) = box, size_px
    corners = (left / width_px, top / height_px, (left + width) / width_px, (top + height) / height_px)
    return inside_picture(corners)


SUITE = Suite(
    name="got10k",
    title="GOT-10k (validation, 8 instants of each sequence)",
    tasks=("object_tracking",),
    files="val/list.txt, with the folders of the sequences beside it",
    metric="ao, sr@0.5, sr@0.75, on the instants that are asked for: no value of the benchmark's own table",
    format_source="got-10k/toolkit, README.md and got10k/datasets/got10k.py",
    rule_source="got-10k/toolkit, got10k/experiments/got10k.py and got10k/utils/metrics.py (rect_iou)",
    checked="the published description only; overlaps against the toolkit's function",
    read=_read,
)
