"""Grounding and tracking benchmarks as they are published -> rows that the tasks take."""

import json
from pathlib import Path

import pytest

from vcr1_fast.evaluation.suites.command import read_suite
from vcr1_fast.settings.config import ConfigError


def write(file: Path, content: object) -> Path:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


CSV = 'id,subject,descriptions,length\n3MSZA,A,"one, two",30.96\nAMT7R,B,x,12.5\nYVKIV,C,x,soon\n'
LINES = """\
3MSZA 24.3 30.4##person turn a light on.
AMT7R 4.3 12.5##a person is putting a picture onto the wall.

3MSZA 1.0 2##person ## walks
AMT7R 4.3 ##no end.
ZZZZZ 1.0 2.0##of no length.
YVKIV 4.4 9.2##of a strange length.
"""


def test_charades_sta(tmp_path: Path):
    files = [write(tmp_path / "charades_sta_test.txt", LINES), write(tmp_path / "Charades_v1_test.csv", CSV)]
    found = read_suite("charades_sta", files, tmp_path / "videos")
    assert found.rows == [
        {
            "id": f"charades_sta:{video}:{number}",
            "task": "temporal_grounding",
            "video": str(tmp_path / "videos" / f"{video}.mp4"),
            "query": query,
            "duration_s": duration_s,
            "intervals": [interval],
        }
        for video, number, query, duration_s, interval in [
            ("3MSZA", 1, "person turn a light on.", 30.96, [24.3, 30.4]),
            ("AMT7R", 1, "a person is putting a picture onto the wall.", 12.5, [4.3, 12.5]),
            ("3MSZA", 2, "person ## walks", 30.96, [1.0, 2.0]),
        ]
    ]
    assert [(error.source.partition("txt:")[2], error.reason) for error in found.errors] == [
        ("5", "the line is 'AMT7R 4.3 ##no end.', wanted VIDEO START END##sentence"),
        ("6", "video ZZZZZ is not in the CSV file of lengths"),
        ("7", "length is 'soon', wanted a number of seconds"),
    ]
    with pytest.raises(ConfigError, match="does not say how long the videos are: name Charades_v1_test"):
        read_suite("charades_sta", files[:1])


def test_charades_sta_by_video_gives_the_same_rows(tmp_path: Path):
    by_line = [write(tmp_path / "a.txt", "\n".join(LINES.splitlines()[:4])), write(tmp_path / "b.csv", CSV)]
    by_video = {
        "3MSZA": {
            "duration": 30.96,
            "timestamps": [[24.3, 30.4], [1.0, 2.0]],
            "sentences": ["person turn a light on.", "person ## walks"],
        },
        "AMT7R": {
            "duration": 12.5,
            "timestamps": [[4.3, 12.5]],
            "sentences": ["a person is putting a picture onto the wall."],
        },
    }
    found = read_suite("charades_sta", [write(tmp_path / "c.json", by_video)])
    expected = {row["id"]: row for row in read_suite("charades_sta", by_line).rows}
    assert {row["id"]: row for row in found.rows} == expected and len(expected) == 3


ANET = {"duration": 55.15, "timestamps": [[0, 4.14], [4.14, 33.36]], "sentences": ["Two men stand.", " One kneels. "]}


def test_activitynet_captions(tmp_path: Path):
    content = {
        "v_uqiMw7tQ1Cc": ANET,
        "v_a": ANET | {"sentences": ["one"]},
        "v_b": {"duration": 3.0, "sentences": ["one"]},
        "v_c": {"duration": 30.0, "timestamps": [[9.0, 4.0], [4.0, "x"]], "sentences": ["backwards", "no number"]},
        "v_d": {"duration": 30.0, "timestamps": [[1.0, 2.0]], "sentences": [" "]},
    }
    (tmp_path / "v_uqiMw7tQ1Cc.mkv").touch()
    found = read_suite("activitynet_captions", [write(tmp_path / "val_2.json", content)])
    first, second, backwards, refused = found.rows
    assert second == {
        "id": "activitynet_captions:v_uqiMw7tQ1Cc:2",
        "task": "temporal_grounding",
        "video": str(tmp_path / "v_uqiMw7tQ1Cc.mkv"),
        "query": " One kneels. ",  # as it is published
        "duration_s": 55.15,
        "intervals": [[4.14, 33.36]],
    }
    assert first["query"] == "Two men stand."
    assert backwards["query"] == "backwards"  # recipe paper takes it, recipe fixed refuses and counts it
    assert (refused["query"], found.num_refused) == ("no number", 1)
    assert [(error.source.partition("json:")[2], error.reason) for error in found.errors] == [
        ("v_a", "there are 2 timestamps but 1 sentences, wanted one for one"),
        ("v_b", "key 'timestamps' is missing; the row has duration, sentences"),
        ("v_d:1", "query is ' ', wanted text that is not empty"),
        ("v_c:2", "interval 0[1] is 'x', wanted a number; eval will count it as wrong"),
    ]


def test_timelens_bench_cleans_its_queries(tmp_path: Path):
    entry = {"duration": 30.96, "spans": [[24.3, 30.4]], "queries": [" A person\n turns a light  on.. "]}
    files = [write(tmp_path / f"{name}-timelens.json", {"3MSZA": entry}) for name in ("charades", "activitynet")]
    found = read_suite("timelens_bench", files)
    assert [row["id"] for row in found.rows] == [
        "timelens_bench:charades-timelens:3MSZA:1",
        "timelens_bench:activitynet-timelens:3MSZA:1",
    ]
    assert found.rows[0]["query"] == "A person turns a light on"
    assert found.rows[0]["intervals"] == [[24.3, 30.4]] and found.errors == []
    lacking = write(tmp_path / "x.json", {"a": {"duration": 1.0, "spans": [[0, 1], [0, 1]], "queries": ["q"]}})
    with pytest.raises(ConfigError, match="there are 2 spans but 1 queries"):
        read_suite("timelens_bench", [lacking])


QVH = {
    "qid": 2579,
    "query": "A girl cooks.",
    "duration": 150,
    "vid": "NUsG9BgSes0_210.0_360.0",
    "relevant_clip_ids": [41],
    "saliency_scores": [[1, 1, 2]],
    "relevant_windows": [[82, 150], [0, 4]],
}


def test_qvhighlights(tmp_path: Path):
    withheld = {key: value for key, value in QVH.items() if key != "relevant_windows"} | {"qid": 1}
    lines = [QVH, withheld, QVH, QVH | {"qid": 2, "relevant_windows": []}, QVH | {"qid": 3, "vid": None}]
    file = write(tmp_path / "highlight_val_release.jsonl", "\n".join(json.dumps(line) for line in lines))
    found = read_suite("qvhighlights", [file])
    first, refused = found.rows
    assert first == {
        "id": "qvhighlights:2579",
        "task": "temporal_grounding",
        "video": str(tmp_path / "NUsG9BgSes0_210.0_360.0.mp4"),
        "query": "A girl cooks.",
        "duration_s": 150,
        "intervals": [[82, 150], [0, 4]],
    }
    assert refused["id"] == "qvhighlights:2"
    assert [error.reason[:38] for error in found.errors] == [
        "key 'relevant_windows' is missing; the",
        "id 'qvhighlights:2579' is already take",
        "vid is None, wanted text that is not e",
        "intervals is [], wanted a list of list",
    ]


NEXTGQA_CSV = """\
video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
2574374895,719,320,240,what did the baby do,lay on floor,8,TN,clap,sit,lay on floor,pick,crawl
2574374895,719,320,240,without a segment,sit,9,TN,clap,sit,lay,pick,crawl
1111,719,320,240,no video,sit,1,TN,clap,sit,lay,pick,crawl
2574374895,719,320,240,wrong answer,stand,3,CW,clap,sit,lay,pick,crawl
2574374895,719,320,240,four options,sit,3,CW,clap,sit,lay,pick,
"""


def test_nextgqa(tmp_path: Path):
    location = {"8": [[23.0, 27.7]], "3": [[1.0, 2.0], [4.0, 5.0]]}
    files = [
        write(tmp_path / "map_vid_vidorID.json", {"2574374895": "1101/2574374895"}),
        write(tmp_path / "test.csv", NEXTGQA_CSV),
        write(tmp_path / "gsub_test.json", {"2574374895": {"duration": 30, "location": location, "fps": 29.97}}),
    ]
    found = read_suite("nextgqa", files, tmp_path / "videos")
    first, refused = found.rows
    assert first == {
        "id": "nextgqa:2574374895_8",
        "task": "grounded_qa",
        "video": str(tmp_path / "videos" / "1101" / "2574374895.mp4"),
        "query": "what did the baby do",
        "options": ["clap", "sit", "lay on floor", "pick", "crawl"],
        "answer": "C",
        "duration_s": 30,
        "intervals": [[23.0, 27.7]],
        "categories": {"type": "TN"},
    }
    assert (refused["query"], refused["intervals"]) == ("wrong answer", [[1.0, 2.0], [4.0, 5.0]])
    assert [error.reason[:44] for error in found.errors] == [
        "key '9' is missing; the row has 8, 3",
        "video 1111 has no segments in the file of se",
        "key 'a4' is missing; the row has video_id, f",
        "answer is 'stand', wanted one letter from A ",
    ]
    flat = read_suite("nextgqa", files[1:], tmp_path / "videos")
    assert flat.rows[0]["video"] == str(tmp_path / "videos" / "2574374895.mp4")
    with pytest.raises(ConfigError, match=r"wanted the questions \(test.csv\) and their segments"):
        read_suite("nextgqa", files[:2])


def got_sequence(folder: Path, num_images: int, covers: list[int] | None = None) -> None:
    """Image k has a box of 100 x 50 px at (10 k, 5 k) in a picture of 400 x 200."""
    folder.mkdir()
    write(folder / "groundtruth.txt", "".join(f"{10 * k}.0000,{5 * k}.0,100.0,50.0\n" for k in range(num_images)))
    meta = "[METAINFO]\nurl: https://a/b\nobject_class: sloth\nroot_class: mammal\nresolution: (400, 200)\n"
    write(folder / "meta_info.ini", meta)
    write(folder / "cover.label", "".join(f"{cover}\n" for cover in covers or [8] * num_images))


def test_got10k(tmp_path: Path):
    covers = [8] * 36
    covers[10], covers[11] = 0, 0
    got_sequence(tmp_path / "GOT-10k_Val_000001", 36)
    got_sequence(tmp_path / "GOT-10k_Val_000002", 36, covers)
    got_sequence(tmp_path / "GOT-10k_Test_000001", 1)
    (tmp_path / "empty").mkdir()
    got_sequence(tmp_path / "odd", 36)
    write(tmp_path / "odd" / "groundtruth.txt", "1,2,3,4\n1,2,3\n")
    names = "GOT-10k_Val_000001\nGOT-10k_Val_000002\n\nGOT-10k_Test_000001\nempty\nodd\n"
    found = read_suite("got10k", [write(tmp_path / "list.txt", names)])
    whole, hidden = found.rows
    corners = [[k / 40, k / 40, k / 40 + 0.25, k / 40 + 0.25] for k in (0, 5, 10, 15, 20, 25, 30)]  # every fifth
    corners.append([0.875, 0.875, 1.0, 1.0])  # image 35: 400 of 450 px are inside
    assert whole["boxes"] == [pytest.approx(box) for box in corners]
    assert whole["times_s"] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5] and whole["duration_s"] == 4.0
    assert whole["video"] == f"{tmp_path / 'GOT-10k_Val_000001'}#images=8&fps=2"
    assert (whole["task"], whole["query"], whole["categories"]) == (
        "object_tracking",
        "sloth",
        {"root_class": "mammal"},
    )
    assert hidden["times_s"] == [0.0, 0.5, 1.5, 2.0, 2.5, 3.0, 3.5]  # not image 10, on which nothing of it is seen
    assert hidden["boxes"] == [pytest.approx(box) for i, box in enumerate(corners) if i != 2]
    assert [error.source.rpartition(":")[2] for error in found.errors] == ["4", "5", "6"]
    assert "has 1 boxes and 1 covers" in found.errors[0].reason
    assert "meta_info.ini cannot be read" in found.errors[1].reason
    assert "groundtruth.txt has the line '1,2,3', wanted 4 numbers" in found.errors[2].reason
