"""What MkDocs does with a page before it renders it: puts in pages that stand elsewhere, and mends links out of docs/.

    <!-- include: ../kernels/README.md -->    the page is that file; what else it holds is for readers of the repository

A link to a page becomes one relative to docs/, as the README's `docs/data.md`. A link to any other file of the
repository becomes its name, because the site has no such page.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
ELSEWHERE = {"README.md": "index.md", "kernels/README.md": "kernels.md"}  # pages that other files are
_INCLUDE = re.compile(r"<!-- include: (\S+) -->")
_ROW = re.compile(r"^\|.*$", re.MULTILINE)
_CODE = re.compile(r"`[^`]*`")  # in a row GitHub wants \| there, MkDocs does not
_LINK = re.compile(r"(?P<is_image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page of the site."""
    found = _INCLUDE.match(markdown)
    source = DOCS / page.file.src_uri
    if found:
        source = (DOCS / found[1]).resolve()
        markdown = source.read_text(encoding="utf-8")
    folder = source.parent.relative_to(ROOT).as_posix()
    markdown = _ROW.sub(lambda row: _CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0]), markdown)
    return _LINK.sub(lambda link: mended(link, folder), markdown)


def mended(link: re.Match[str], folder: str) -> str:
    """A link of a file in `folder` of the repository, as the site has it."""
    target = link["target"]
    if ":" in target:
        return link[0]
    path = normpath(PurePosixPath(folder, target).as_posix())
    path = ELSEWHERE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
    if path:
        return f"{link['is_image']}[{link['text']}]({path}{link['anchor'] or ''})"
    return link["text"] if link["text"].startswith("`") else f"`{link['text']}`"
