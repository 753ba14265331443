"""NExT-GQA (arXiv 2309.01327): grounded multiple choice, five options.

Three files: test.csv (video_id, question, answer as text, qid, type, a0 to a4), gsub_test.json ({"VIDEO": {"duration":
34, "location": {"1": [[1.2, 5.8]], ...}}}, the segments of each question, seconds) and map_vid_vidorID.json, which says
in which folder a video lies. Without the last one, videos lie in one folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vcr1_fast.evaluation.suites.suite import Found, Suite, as_object, find_video, letters_of, read_rows
from vcr1_fast.prompts.annotation_files import read_entries
from vcr1_fast.prompts.schemas.schema import Entry, Row, read_field, read_text
from vcr1_fast.settings.config import ConfigError

NUM_OPTIONS = 5


def _read(files: Sequence[Path], videos: Path) -> Found:
    questions = [file for file in files if file.suffix.lower() == ".csv"]
    folders: dict[str, object] = {}
    segments: dict[str, object] = {}
    for file in files:
        if file not in questions:
            entries = read_entries(file)
            for where, entry in entries.items:
                if entries.is_mapping:
                    segments[where] = entry
                elif isinstance(entry, Mapping):  # one object of texts: map_vid_vidorID.json
                    folders |= entry
    if not questions or not segments:
        raise ConfigError(
            f"{', '.join(map(str, files))}: wanted the questions (test.csv) and their segments (gsub_test.json)"
        )

    return read_rows(questions, lambda file, where, entry: _row(entry, segments, folders, videos))


def _row(entry: Entry, segments: Mapping[str, object], folders: Mapping[str, object], videos: Path) -> Row:
    video, question = read_text(entry, "video_id"), read_text(entry, "qid")
    if video not in segments:
        raise ValueError(f"video {video} has no segments in the file of segments")
    truth = as_object(segments[video], "entry of its video")
    options = [read_text(entry, f"a{number}") for number in range(NUM_OPTIONS)]
    return {
        "id": f"nextgqa:{video}_{question}",
        "task": "grounded_qa",
        "video": find_video(videos, str(folders.get(video, video)), video),
        "query": read_text(entry, "question"),
        "options": options,
        "answer": letters_of(read_text(entry, "answer"), options)[0],
        "duration_s": read_field(truth, "duration"),
        "intervals": read_field(as_object(truth.get("location"), "location"), question),
        "categories": {"type": read_text(entry, "type")},
    }


SUITE = Suite(
    name="nextgqa",
    title="NExT-GQA",
    tasks=("grounded_qa",),
    files="test.csv gsub_test.json map_vid_vidorID.json",
    metric="acc@gqa, acc, miop, iop@0.3, iop@0.5, nextgqa_miou, iou@0.3, iou@0.5",
    format_source="doc-doc/NExT-GQA, datasets/nextgqa/README.md",
    rule_source="doc-doc/NExT-GQA, code/TempGQA/eval_ground.py",
    checked="the test split, 5,553 questions; the metrics against eval_ground.py on it",
    read=_read,
)
