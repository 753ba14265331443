"""The commit of a checkout as git lays it out, and of none."""

from __future__ import annotations

from pathlib import Path

from vcr1_fast.commands.version import commit_of

HEX, OTHER = "1f" * 20, "2e" * 20


def test_the_commit_of_each_kind_of_checkout(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == ""
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text(f"{HEX}\n")  # detached
    assert commit_of(tmp_path) == HEX
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(tmp_path) == ""  # no commit yet
    (git / "packed-refs").write_text(f"# pack-refs with: peeled\n{OTHER} refs/heads/main\n^{HEX}\n{HEX} refs/tags/x\n")
    assert commit_of(tmp_path) == OTHER
    (git / "refs" / "heads" / "main").write_text(f"{HEX}\n")
    assert commit_of(tmp_path) == HEX
    worktree, own = tmp_path / "w", git / "worktrees" / "w"
    worktree.mkdir()
    own.mkdir(parents=True)
    (worktree / ".git").write_text(f"gitdir: {own}\n")
    (own / "HEAD").write_text("ref: refs/heads/main\n")
    (own / "commondir").write_text("../..\n")
    assert commit_of(worktree) == HEX
