"""Files taken apart: every format, every way in which one can be broken."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from vcr1_fast.prompts import annotation_files
from vcr1_fast.prompts.annotation_files import Entries, read_entries
from vcr1_fast.prompts.dataset import AnnotationSource, read_annotation_files
from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import IntervalTruth

ROW = {"id": "0012", "task": "temporal_grounding", "video": "a.mp4", "query": "NA", "duration_s": 8.0}
ROWS = [ROW | {"intervals": [[1.0, 2.0], [4, 5]]}, ROW | {"id": "0013", "query": "x, y", "intervals": [[3.5, 8.0]]}]

gzipped = functools.partial(gzip.compress, mtime=0)  # names of tests hold it, and must not change with the time


def entries(folder: Path, content: str | bytes, name: str = "set.json") -> Entries:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_entries(file)


def failure(folder: Path, content: str | bytes, name: str = "set.json") -> str:
    with pytest.raises(ConfigError) as info:
        entries(folder, content, name)
    message = str(info.value)
    assert message.startswith(f"annotation file {folder / name} ") and "\n" not in message
    return message


def test_json_list_object_and_lines(tmp_path: Path):
    assert entries(tmp_path, "\ufeff[1, {}]") == Entries([("1", 1), ("2", {})], is_mapping=False)
    assert entries(tmp_path, ' {"v": {"a": 1},\n "w": {}}') == Entries([("v", {"a": 1}), ("w", {})], is_mapping=True)
    lines = '\n{"a": 1}\r\n\n{"a": "line\u2028separator"}\n'
    assert entries(tmp_path, lines) == Entries([("2", {"a": 1}), ("4", {"a": "line\u2028separator"})], False)
    assert entries(tmp_path, '\n{"a": 1, "b": {}}\n') == Entries([("2", {"a": 1, "b": {}})], False)  # one row
    for empty in ("", " \n", "[]", "{}"):
        assert entries(tmp_path, empty).items == []


def test_a_broken_line_is_one_entry(tmp_path: Path):
    (_, good), (where, bad), (_, deep) = entries(tmp_path, '{"a": 1}\n{"b": }\n' + "[" * 100_000).items
    assert good == {"a": 1} and where == "2"
    assert str(bad) == "not valid JSON: line 1, column 7: Expecting value"
    assert "nested too deeply" in str(deep)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": 2,}\n]', "starts like a JSON list but is not valid JSON: line 2, column"),
        (
            '{"v": {"a": 1},\n "w": {"a": 1]}\n}',
            "is neither JSON nor JSONL; line 2, column 14: Expecting ',' delimiter",
        ),
        ("hello\nworld", "is neither JSON nor JSONL; line 1, column 1: Expecting value"),
        ("[" * 100_000, "is not valid JSON: its lists are nested too deeply"),
        ("[" + "9" * 5000 + "]", "is not valid JSON: Exceeds the limit"),
        (b'[{"a": "x"},\n {"a": "caf\xe9"}]', "is not UTF-8 text: line 2 holds the byte 0xe9: save it as UTF-8"),
        ("[1]".encode("utf-16"), "is not UTF-8 text: line 1 holds the byte 0xff"),
        (
            gzipped(b"[1]" * 99)[:-9],
            "is packed by gzip, but cut short or damaged (Compressed file ended before",
        ),
        (
            gzipped(b"[1]")[:-8] + b"12345678",
            "is packed by gzip, but cut short or damaged (CRC check failed",
        ),
        (bz2.compress(b"[1]"), "is packed by bzip2: unpack it"),
        (lzma.compress(b"[1]"), "is packed by xz: unpack it"),
        (b"PK\x03\x04" + b"x" * 40, "is a ZIP archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a pointer of Git LFS"),
    ],
)
def test_a_broken_file_is_answered_with_line_and_column(tmp_path: Path, content, message):
    assert message in failure(tmp_path, content)


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path):
    items = entries(tmp_path, '{"v": {"a": 1}, "w": {}, "v": {"a": 2}}').items  # json would lose the first v silently
    assert items[:2] == [("v", {"a": 2}), ("w", {})]
    assert [(where, str(error)) for where, error in items[2:]] == [
        ("v", "key 'v' stands more than once in one object and only its last value is read")
    ]
    (_, error), _ = entries(tmp_path, '{"a": 1, "a": 2}\n{}\n', "set.jsonl").items
    assert str(error) == "key 'a' stands more than once in the row: remove one"


def test_missing_unreadable_and_huge_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("none.json", "none.parquet"):
        with pytest.raises(ConfigError, match=rf"{name} cannot be read: No such file or directory: check the path"):
            read_entries(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_entries(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        read_entries(tmp_path / ("x" * 300))
    monkeypatch.setattr(annotation_files, "MAX_TEXT_BYTES", 9)
    assert entries(tmp_path, "[1, 2, 3]").items
    assert "has 10 bytes, wanted at most 9" in failure(tmp_path, "[1, 2, 34]")
    monkeypatch.setattr(annotation_files, "MAX_TEXT_BYTES", 99)
    packed = gzipped(b" " * 100)  # few bytes on disk
    assert len(packed) < 99 and "has 100 bytes, wanted at most 99" in failure(tmp_path, packed)


def csv_text() -> str:
    cells = [[row["id"], row["task"], row["video"], row["query"], "8", json.dumps(row["intervals"])] for row in ROWS]
    quoted = [",".join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in cells]
    return "\n".join(["id,task,video,query,duration_s,intervals", *quoted]) + "\n"


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"id": "only"}]), path)
    return path


def test_json_csv_and_parquet_give_the_same_examples(tmp_path: Path):
    files = [tmp_path / name for name in ("a.json", "b.jsonl", "c.csv")]
    files[0].write_text(json.dumps([*ROWS, {"id": "only"}]))
    files[1].write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"id": "only"}]))
    files[2].write_text(csv_text() + "only,,,,,\n")
    packed = [file.with_name(f"{file.name}.gz") for file in files[1:]]
    for file, whole in zip(packed, files[1:], strict=True):
        file.write_bytes(gzipped(whole.read_bytes()))
    files += [write_parquet(tmp_path / "d.parquet"), *packed]
    contents = [read_annotation_files([AnnotationSource(f)], make_tasks(TaskConfig()))[0] for f in files]
    for content in contents:
        assert content.examples == contents[0].examples
        assert [error.reason for error in content.errors] == ["key 'task' is missing; the row has id"]
    first, second = contents[0].examples
    assert (first.id, first.query, first.truth) == ("0012", "NA", IntervalTruth(((1.0, 2.0), (4.0, 5.0))))
    assert (second.query, second.duration_s) == ("x, y", 8.0)
    assert [content.errors[0].source for content in contents] == [
        f"{file}:{row}" for file, row in zip(files, (3, 3, 4, 3, 3, 4), strict=True)
    ]


def test_broken_csv(tmp_path: Path):
    content = 'id,intervals\na,"[[1,2]]"\nb,[[1\nc\n'
    (_, good), (where, cell), (_, short) = entries(tmp_path, content, "set.csv").items
    assert good == {"id": "a", "intervals": [[1, 2]]} and where == "3"
    assert str(cell) == "intervals is '[[1', wanted a number or a list as JSON"
    assert str(short) == "the row has 1 cells, wanted 2 as in the header"
    assert "is not CSV: line 2: unexpected end of data" in failure(tmp_path, 'id\n"a\n', "set.csv")
    assert entries(tmp_path, "", "set.csv").items == entries(tmp_path, "id\n", "set.csv").items == []


def test_a_cell_of_any_length(tmp_path: Path):
    """Python's csv takes 131,072 characters by default."""
    ((_, row),) = entries(tmp_path, f'id,intervals\n{"x" * 200_000},"[{"1, " * 70_000}1]"\n', "set.csv").items
    assert isinstance(row, dict) and (len(row["id"]), len(row["intervals"])) == (200_000, 70_001)
    assert csv.field_size_limit() == 131_072  # of others in this process


def test_broken_parquet(tmp_path: Path):
    assert "is packed by gzip, and parquet is not read so" in failure(tmp_path, gzipped(b"PAR1"), "a.parquet.gz")
    assert "is not readable as parquet after row 0: " in failure(tmp_path, b"PAR1 and no more", "set.parquet")
    assert "is not readable as parquet after row 0: " in failure(tmp_path, b"", "set.parquet")
    whole = write_parquet(tmp_path / "whole.parquet").read_bytes()
    assert "is not readable as parquet" in failure(tmp_path, whole[: len(whole) // 2], "set.parquet")


def test_parquet_leaves_nothing_in_the_cache_and_is_not_imported_for_json(tmp_path: Path):
    file = write_parquet(tmp_path / "set.parquet")
    (tmp_path / "set.json").write_text("[1]")
    program = (
        "import sys\nfrom pathlib import Path\nfrom vcr1_fast.prompts.annotation_files import read_entries\n"
        f"read_entries(Path({str(tmp_path / 'set.json')!r}))\n"
        "assert not {'datasets', 'pyarrow', 'pandas', 'torch'} & set(sys.modules)\n"
        f"print(len(read_entries(Path({str(file)!r})).items))\n"
    )
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={"HF_HOME": str(home), "HOME": str(home), "PYTHONPATH": ".:kernels", "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n"
    assert [path for path in home.rglob("*") if path.is_file()] == []
