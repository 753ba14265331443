"""The version, with the commit where the package runs from a checkout. Reads files of .git and starts no git."""

from __future__ import annotations

from pathlib import Path

from vcr1_fast import __version__

CHECKOUT = Path(__file__).parents[2]  # where the package runs from one


def version_line() -> str:
    """Example: "vcr1-fast 0.3.0 (commit 1a2b3c4d5e6f)"; without a checkout the version alone."""
    commit = commit_of(CHECKOUT)
    return f"vcr1-fast {__version__}" + (f" (commit {commit[:12]})" if commit else "")


def commit_of(checkout: Path) -> str:
    """Hex name of the commit that is checked out there, "" where that cannot be told.

    Files as gitrepository-layout(5) describes them: of a worktree .git names its folder, which names the shared one.
    """
    try:
        git = checkout / ".git"
        if git.is_file():
            git = checkout / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.removeprefix("ref:").strip()
        shared = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
        for folder in (git, shared):
            if (folder / name).is_file():
                return (folder / name).read_text().strip()
        packed = (line.split(" ", 1) for line in (shared / "packed-refs").read_text().splitlines() if " " in line)
        return next((commit for commit, ref in packed if ref == name), "")
    except (OSError, UnicodeDecodeError):
        return ""
