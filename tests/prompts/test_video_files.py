"""Names of videos become paths, with and without the videos on disk."""

from pathlib import Path

import pytest

from vcr1_fast.prompts.video_files import VideoFolder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.mkv", "a.webm", "b.avi", "sub/c.mp4", "d.mp4", "d.mkv", "v_1.2.webm", "GOT_1/0001.jpg", "e"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("video", "found"),
    [
        ("a", "a.mkv"),  # mp4, mkv, webm, avi in this order
        ("d", "d.mp4"),
        ("b", "b.avi"),
        ("v_1.2", "v_1.2.webm"),  # a dot alone is no suffix
        ("sub/c", "sub/c.mp4"),
        ("sub/../a", "a.mkv"),
        ("GOT_1", "GOT_1"),  # a folder of images
        ("e", "e"),
        ("none", "none.mp4"),  # the reader will say that it is missing
        ("nowhere/x", "nowhere/x.mp4"),
        ("none.MP4", "none.MP4"),
        ("a.mp4", "a.mp4"),  # a name with a suffix is never changed
        ("/cluster/data/GOT_1", "GOT_1"),  # moved here from another machine
        ("/cluster/data/GOT_1#images=7&fps=2", "GOT_1#images=7&fps=2"),
        ("GOT_1#images=7&fps=2", "GOT_1#images=7&fps=2"),
        ("a#t=1.000,2.000&fps=2", "a.mkv#t=1.000,2.000&fps=2"),
        ("a#t=1", "a#t=1.mp4"),  # no fragment
        ("/cluster/data/d.mkv", "d.mkv"),
        ("/cluster/data/x.mp4", "/cluster/data/x.mp4"),
        ("/cluster/../a", "/a"),
        ("bad\0name", "bad\0name.mp4"),
        ("x" * 300, "x" * 300 + ".mp4"),
    ],
)
def test_names(root: Path, video: str, found: str):
    assert VideoFolder(root).find(video) == str(root / found)


def test_an_absolute_path_that_exists_stays(root: Path, tmp_path_factory: pytest.TempPathFactory):
    other = tmp_path_factory.mktemp("other") / "d.mp4"
    other.touch()
    assert VideoFolder(root).find(str(other)) == str(other)


def test_home_and_relative_roots(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(root))
    assert VideoFolder("~/sub").find("c") == str(root / "sub/c.mp4")
    monkeypatch.chdir(root)
    assert VideoFolder("sub").find("c") == str(root / "sub/c.mp4")
    assert VideoFolder("sub").find("~/d.mp4") == str(root / "d.mp4")


def test_a_folder_is_listed_once(root: Path, monkeypatch: pytest.MonkeyPatch):
    folder = VideoFolder(root)
    assert folder.find("a") == str(root / "a.mkv")
    (root / "a.mp4").touch()
    assert folder.find("a") == str(root / "a.mkv")
    assert VideoFolder(root).find("a") == str(root / "a.mp4")
