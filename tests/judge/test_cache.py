"""The answers on disk: kept, shared between processes, and never a reason to stop."""

import subprocess
import sys
from pathlib import Path

import pytest

from vcr1_fast.judge.cache import AnswerCache, cache_key


def test_answers_stay_on_disk(tmp_path: Path):
    cache = AnswerCache(tmp_path / "a" / "cache.sqlite")
    assert cache.get("k") is None
    cache.put("k", "first")
    cache.put("k", "второй 🎬")
    cache.close()
    assert cache.get("k") is None and cache.put("k", "x") is None
    assert AnswerCache(tmp_path / "a" / "cache.sqlite").get("k") == "второй 🎬"


def test_half_a_character_is_not_stored(tmp_path: Path, capsys):
    cache = AnswerCache(tmp_path / "cache.sqlite")
    cache.put("half", "\ud83c")
    cache.put("k", "v")
    assert (cache.get("half"), cache.get("k")) == (None, "v")
    assert capsys.readouterr().err == ""


def test_in_memory_when_there_is_no_path(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = AnswerCache(None)
    cache.put("k", "v")
    assert cache.get("k") == "v"
    assert AnswerCache(None).get("k") is None
    assert list(tmp_path.iterdir()) == []


def test_the_key_depends_on_model_and_prompt_and_on_where_one_ends():
    keys = {cache_key("m", "p"), cache_key("m", "q"), cache_key("n", "p"), cache_key("mp", ""), cache_key("", "mp")}
    assert len(keys) == 5
    assert cache_key("m", "p") == cache_key("m", "p")
    assert len(cache_key("m", "\ud800")) == 64  # half a character, which UTF-8 cannot hold


@pytest.mark.parametrize("content", [b"not a database at all" * 300, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_broken_file_is_reported_once_and_left_alone(tmp_path: Path, capsys, content: bytes):
    path = tmp_path / "cache.sqlite"
    path.write_bytes(content)
    cache = AnswerCache(path)
    cache.put("k", "v")
    assert cache.get("k") is None
    err = capsys.readouterr().err
    assert err.count("cannot be used and is left out") == 1
    assert str(path) in err and "judge.cache" in err
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    assert AnswerCache(tmp_path / "file" / "cache.sqlite").get("k") is None
    assert "cannot be used" in capsys.readouterr().err


def test_several_processes_write_at_once(tmp_path: Path):
    path = tmp_path / "cache.sqlite"
    program = (
        "import sys\nfrom pathlib import Path\nfrom vcr1_fast.judge.cache import AnswerCache\n"
        "cache = AnswerCache(Path(sys.argv[1]))\n"
        "for i in range(20):\n    cache.put(f'{sys.argv[2]}:{i}', str(i) * 100)\n    cache.put('same', 'v')\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(path), name], stderr=subprocess.PIPE) for name in "abc"
    ]
    assert [(writer.communicate()[1], writer.returncode) for writer in writers] == [(b"", 0)] * 3
    cache = AnswerCache(path)
    assert all(cache.get(f"{name}:{i}") == str(i) * 100 for name in "abc" for i in range(20))
    assert cache.get("same") == "v"


def test_an_answer_that_the_disk_has_changed_is_asked_again(tmp_path: Path):
    path = tmp_path / "cache.sqlite"
    cache = AnswerCache(path)
    cache.put("k", '{"entailed": [true]}')
    cache.put("l", "as it was")
    cache.close()
    raw = path.read_bytes()
    assert raw.count(b"[true]") == 1
    path.write_bytes(raw.replace(b"[true]", b"[trud]"))
    again = AnswerCache(path)
    assert again.get("k") is None and again.get("l") == "as it was"
    again.put("k", "asked again")
    assert again.get("k") == "asked again"
