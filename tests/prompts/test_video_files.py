"""Names of videos become paths, with and without the videos on disk."""

import re
import time
from pathlib import Path

import pytest

from vcr1_fast.prompts import video_files
from vcr1_fast.prompts.video_files import VideoFolder, VideoTree, _below


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.mkv", "a.webm", "b.avi", "sub/c.mp4", "d.mp4", "d.mkv", "v_1.2.webm", "GOT_1/0001.jpg", "e",
                 "K.MP4", "L.mov", "sub/sp ace.mp4"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "dangling.mp4").symlink_to("nowhere.mp4")
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
        ("/cluster/../a", "a.mkv"),
        ("/cluster/../nowhere/a.mp4", "/nowhere/a.mp4"),
        ("K", "K.MP4"),
        ("K.mp4", "K.MP4"),
        ("L.MoV", "L.mov"),
        ("L", "L.mov"),
        ("none.mov", "none.mov"),  # not none.mov.mp4
        ("file:///cluster/d.mkv", "d.mkv"),
        ("file://localhost/cluster/sub/sp%20ace.mp4", "sub/sp ace.mp4"),
        ("file:/cluster/GOT_1#images=7&fps=2", "GOT_1#images=7&fps=2"),
        ("dangling.mp4", "dangling.mp4"),
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


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("video", "found"),
    [
        ("/their/1104/48.mp4", "1104/48.mp4"),
        ("/their/1105/48.mp4", "x/1105/48.MP4"),  # more of its last parts than 1104/48.mp4
        ("/their/1105/48", "x/1105/48.MP4"),
        ("/their/x/1105/48.mp4", "x/1105/48.MP4"),
        ("/their/only.mp4", "deep/er/only.mp4"),
        ("/their/deep/er/two", "deep/er/two.mp4"),  # .mp4 comes before .mkv, as beside a relative name
        ("/their/images_7", "deep/images_7"),
        ("/their/linked.mp4", "deep/er/linked.mp4"),  # the same file twice
        ("/their/hidden.mp4", "/their/hidden.mp4"),
        ("1105/48.mp4", "1105/48.mp4"),  # a relative path says where it is
    ],
)
def test_a_path_from_another_machine_is_found_by_its_end(tmp_path: Path, video: str, found: str):
    touch(tmp_path, "1104/48.mp4", "x/1105/48.MP4", "deep/er/only.mp4", "deep/er/two.mkv", "deep/er/two.mp4")
    touch(tmp_path, "deep/images_7/1.jpg", "deep/er/linked.mp4", ".trash/hidden.mp4")
    (tmp_path / "deep/loop").symlink_to("..")
    (tmp_path / "zz.mp4").symlink_to("deep/er/linked.mp4")
    (tmp_path / "zz").mkdir()
    (tmp_path / "zz/linked.mp4").symlink_to("../deep/er/linked.mp4")
    assert VideoFolder(tmp_path).find(video) == str(tmp_path / found)


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (
            "/their/48.mp4",
            "is not there, and 2 others may be meant: {root}/a/48.mp4, {root}/b/48.mp4: name one of them",
        ),
        ("/their/48", "2 others may be meant: {root}/a/48.mp4, {root}/b/48.mp4"),
        ("c/K.mp4", "2 others may be meant: {root}/c/K.MP4, {root}/c/K.Mp4"),
        ("https://host/48.mp4", "wanted a file on this machine: fetch it and name its path"),
        ("file://host/48.mp4", "wanted a file on this machine"),
    ],
)
def test_what_could_be_several_files_or_is_none_is_refused(tmp_path: Path, video: str, reason: str):
    touch(tmp_path, "a/48.mp4", "b/48.mp4", "c/K.MP4", "c/K.Mp4")
    folder = VideoFolder(tmp_path)
    for _ in range(2):  # the second time it is known
        with pytest.raises(ValueError, match=re.escape(reason.format(root=tmp_path))):
            folder.find(video)


def test_two_names_are_not_one_file(tmp_path: Path):
    touch(tmp_path, "flat/1.mp4", "flat/2.mp4", "c/3.mp4", "4.mp4")
    folder = VideoFolder(tmp_path)
    videos = ["/x/a/1.mp4", "/x/b/1.mp4#t=0,2&fps=1", "/x/a/2.mp4", "/x/c/3.mp4", "/y/3.mp4", "4.mp4", "/x/4.mp4"]
    folder.tell_apart([*videos, "/x/c/3.mp4", "s3://b/9.mp4"])
    for video in ("/x/a/1.mp4", "/x/b/1.mp4#t=0,2&fps=1"):
        with pytest.raises(ValueError, match=r"/flat/1\.mp4 may be another one, /x/[ab]/1\.mp4: keep the folders"):
            folder.find(video)
    with pytest.raises(ValueError, match=r"video /y/3\.mp4 is not there, and .*/c/3\.mp4 may be another one, /x/c/3"):
        folder.find("/y/3.mp4")  # the other one shares its folder's name, too
    assert folder.find("/x/c/3.mp4") == str(tmp_path / "c/3.mp4")
    assert folder.find("4.mp4") == folder.find("/x/4.mp4") == str(tmp_path / "4.mp4")
    assert folder.describe_moved() == (
        f"3 videos found by the end of their path, such as {tmp_path}/flat/2.mp4 for /x/a/2.mp4"
    )
    assert VideoFolder(tmp_path).describe_moved() == ""


def test_the_tree_is_walked_once_and_only_for_paths_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path, "a/1.mp4", "a/2.mp4")
    tree, walks = VideoTree(tmp_path), []
    monkeypatch.setattr(video_files, "_below", lambda root, *more: walks.append(root) or _below(root, *more))
    VideoFolder(tmp_path, tree).find("a/1.mp4")
    assert walks == []
    for name in ("1.mp4", "2.mp4"):
        assert VideoFolder(tmp_path, tree).find(f"/their/{name}") == str(tmp_path / "a" / name)
    assert walks == [str(tmp_path)]
    monkeypatch.setattr(video_files, "MAX_INDEXED", 2)
    with pytest.raises(ValueError, match=r"more than 2 files lie below .* set data\.video_root to a folder of videos"):
        VideoFolder(tmp_path).find("/their/1.mp4")


def test_one_name_in_each_of_many_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """20,000 files, 10 names: comparing each path with all of its name took 26 s."""
    names = [f"{folder}/{name}.mp4" for folder in range(2000) for name in range(10)]
    monkeypatch.setattr(video_files, "_below", lambda root, suffixes: iter(names))
    folder, began = VideoFolder(tmp_path), time.process_time()
    folder.tell_apart(f"/their/{name}" for name in names)
    assert [folder.find(f"/their/{name}") for name in names] == [str(tmp_path / name) for name in names]
    assert time.process_time() - began < 7.0
    with pytest.raises(ValueError, match=rf"and over 64 others may be meant: {tmp_path}/0/7\.mp4, {tmp_path}/1/7\.mp4"):
        folder.find("/their/x/7.mp4")
