"""MVBench (arXiv 2311.17005): 20 multiple-choice tasks, 200 questions each.

One JSON list per task (action_sequence.json, ...) of OpenGVLab/MVBench: video, question, candidates, answer (the text
of one candidate). Of candidates that are alike the first counts, as in lmms-eval.

The videos are those of the branch "video": tasks that ask about a part of a longer video have it cut out. TVQA's, of
episodic_reasoning, may also be folders of images, 3 of them a second; those of the branch "main" (frames_fps3_hq) are
not cut, "start" and "end" say the part (VLMEvalKit, vlmeval/dataset/mvbench.py: read_frame).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vcr1_fast.evaluation.suites.suite import (
    Found,
    Suite,
    choice_row,
    find_video,
    letters_of,
    read_options,
    read_rows,
)
from vcr1_fast.prompts.schemas.schema import Entry, Row, read_field, read_text
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.tasks.annotations import read_number
from vcr1_fast.video.source_name import folder_name, part_name

# Where the archives of the branch "video" put the videos of each task (lmms-eval, tasks/mvbench/utils.py).
MVBENCH_FOLDERS = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
UNCUT_FRAMES = "tvqa/frames_fps3_hq"
TVQA_FPS = 3.0


def _read(files: Sequence[Path], videos: Path) -> Found:
    for file in files:
        if file.stem not in MVBENCH_FOLDERS:
            raise ConfigError(
                f"{file} is not named after a task of MVBench, wanted one of {', '.join(MVBENCH_FOLDERS)}.json"
            )

    return read_rows(files, lambda file, where, entry: _row(file.stem, where, entry, videos))


def _row(task: str, where: str, entry: Entry, videos: Path) -> Row:
    candidates, answer = read_options(entry, "candidates"), read_text(entry, "answer")
    return choice_row(
        f"mvbench:{task}:{where}",
        _video(task, entry, videos),
        read_text(entry, "question"),
        candidates,
        letters_of(answer, candidates)[0],
        {"task": task},
        scoring="mvbench",
    )


def _video(task: str, entry: Entry, videos: Path) -> str:
    name = read_text(entry, "video")
    path = find_video(videos / MVBENCH_FOLDERS[task], name)
    if task != "episodic_reasoning":
        return path
    uncut = os.path.abspath(videos / UNCUT_FRAMES / name)
    if not os.path.exists(path) and os.path.isdir(uncut):
        start_s, end_s = (read_number(read_field(entry, key), key) for key in ("start", "end"))
        return part_name(folder_name(uncut, TVQA_FPS), start_s, end_s)
    return folder_name(path, TVQA_FPS) if os.path.isdir(path) else path


SUITE = Suite(
    name="mvbench",
    title="MVBench",
    tasks=("multiple_choice",),
    files="the JSON files of the 20 tasks; --videos: folder into which the archives were unpacked",
    metric="acc, mean over the 20 tasks",
    format_source="OpenGVLab/Ask-Anything, video_chat2/MVBENCH.md; lmms-eval, tasks/mvbench/utils.py",
    rule_source="lmms-eval, tasks/mvbench/utils.py (which leaves empty answers out of the mean; here they are wrong)",
    checked="the published description only",
    read=_read,
    average=("task",),
)
