"""Charades-STA (arXiv 1705.02101): temporal grounding, 3,720 test queries.

charades_sta_test.txt, a line each: "VIDEO START END##sentence", seconds; the lengths of the videos stand in another
file, Charades_v1_test.csv (columns id, length). Or the JSON of TimeZero and VideoChat-R1, with the lengths: {"AO8RW":
{"duration": 33.75, "timestamps": [[0.0, 6.9]], "sentences": ["a person is ..."]}, ...}. Both give the same ids and
rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from vcr1_fast.evaluation.suites.grounding import read_sentences
from vcr1_fast.evaluation.suites.suite import Found, Suite, find_video, made
from vcr1_fast.prompts.annotation_files import read_entries, read_text_file
from vcr1_fast.prompts.schemas.schema import Row
from vcr1_fast.settings.config import ConfigError

_LINE = re.compile(r"(\S+)\s+(\d+(?:\.\d+)?)\s+(\d+(?:\.\d+)?)\s*##(.*\S)\s*")


def _read(files: Sequence[Path], videos: Path) -> Found:
    lengths = [file for file in files if file.suffix.lower() == ".csv"]
    lines = [file for file in files if file.suffix.lower() == ".txt"]
    if lines and not lengths:
        raise ConfigError(
            f"{lines[0]} does not say how long the videos are: name Charades_v1_test.csv (columns id, length) beside it"
        )
    yield from _line_rows(lines, _read_lengths(lengths), videos)
    others = [file for file in files if file not in lengths and file not in lines]
    yield from read_sentences("charades_sta", others, videos, ("timestamps", "sentences"))


def _line_rows(files: Sequence[Path], lengths: Mapping[object, object], videos: Path) -> Found:
    num_of: Counter[str] = Counter()
    for file in files:
        for number, line in enumerate(read_text_file(file).splitlines(), start=1):
            if line.strip():
                yield f"{file}:{number}", made(partial(_row, line, lengths, num_of, videos))


def _row(line: str, lengths: Mapping[object, object], num_of: Counter[str], videos: Path) -> Row:
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"the line is {line!r:.80}, wanted VIDEO START END##sentence")
    video, start_s, end_s, query = match.groups()
    num_of[video] += 1
    if video not in lengths:
        raise ValueError(f"video {video} is not in the CSV file of lengths")
    return {
        "id": f"charades_sta:{video}:{num_of[video]}",
        "task": "temporal_grounding",
        "video": find_video(videos, video),
        "query": query,
        "duration_s": _seconds(lengths[video]),
        "intervals": [[float(start_s), float(end_s)]],
    }


def _read_lengths(files: Sequence[Path]) -> dict[object, object]:
    entries = (entry for file in files for _, entry in read_entries(file).items if isinstance(entry, Mapping))
    return {entry["id"]: entry["length"] for entry in entries if "id" in entry and "length" in entry}


def _seconds(length: object) -> float:
    try:
        return float(str(length))
    except ValueError:
        raise ValueError(f"length is {length!r:.60}, wanted a number of seconds") from None


SUITE = Suite(
    name="charades_sta",
    title="Charades-STA",
    tasks=("temporal_grounding",),
    files="charades_sta_test.txt Charades_v1_test.csv, or the JSON by video",
    metric="r@0.3, r@0.5, r@0.7, miou",
    format_source="jiyanggao/TALL, README.md; README of Charades (length); the JSON of OpenGVLab/VideoChat-R1",
    rule_source="arXiv 1705.02101 (R@1 at an IoU); lmms-eval, tasks/charades_sta/utils.py",
    checked="both files of the test split, 3,720 queries each",
    read=_read,
)
