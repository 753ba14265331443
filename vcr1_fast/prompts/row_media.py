"""What an annotation row shows: names under "video", "videos", "image", "images" -> sources. Called by `dataset`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vcr1_fast.prompts.video_files import VideoFolder, VideoTree
from vcr1_fast.types import MediaKind
from vcr1_fast.video.image_header import SUFFIXES as IMAGE_SUFFIXES
from vcr1_fast.video.source_name import IMAGE

KINDS: tuple[MediaKind, ...] = ("image", "video")
MAX_SHOWN = 64  # of a row: more is a column read by mistake
Trees = dict[tuple[str, MediaKind], VideoTree]  # by root and kind, shared by annotation files


def named_in(row: Mapping[str, object], kind: MediaKind) -> list[str]:
    """The names under "video" and "videos", or "image" and "images": a text or a list of texts; null is nothing.

    Raises ValueError when both keys say something, or one says something else.
    """
    keys = [key for key in (kind, f"{kind}s") if row.get(key) is not None]
    if len(keys) > 1:
        raise ValueError(f"the row has both {keys[0]!r} and {keys[1]!r}, wanted one of them")
    if not keys:
        return []
    value = row[keys[0]]
    names = value if isinstance(value, list | tuple) else [value]
    for name in names:
        if not isinstance(name, str) or not name.strip():
            wanted = "a list of texts that are not empty" if names is value else "text that is not empty"
            raise ValueError(f"{keys[0]} is {value!r:.60}, wanted {wanted}")
    if len(names) > MAX_SHOWN:
        raise ValueError(f"{keys[0]} holds {len(names)} names, wanted at most {MAX_SHOWN}")
    return [str(name) for name in names]


class MediaFolder:
    """Finds the videos and images that one annotation file names."""

    def __init__(self, root: str, trees: Trees) -> None:
        """`trees`: those of earlier files, to which this one's are added."""
        new: dict[MediaKind, VideoTree] = {"image": VideoTree(root, IMAGE_SUFFIXES), "video": VideoTree(root)}
        self.of_kind = {kind: VideoFolder(t.root, trees.setdefault((t.root, kind), t)) for kind, t in new.items()}

    def tell_apart(self, rows: Iterable[Mapping[str, object]]) -> None:
        """See `VideoFolder.tell_apart`. Rows that name what cannot be are left to `sources`."""
        names: dict[MediaKind, list[str]] = {kind: [] for kind in KINDS}
        for row in rows:
            for kind in KINDS:
                try:
                    names[kind] += named_in(row, kind)
                except ValueError:
                    continue
        for kind in KINDS:
            self.of_kind[kind].tell_apart(names[kind])

    def sources(self, row: Mapping[str, object]) -> dict[MediaKind, tuple[str, ...]]:
        """Kind -> names as `source_name` reads them, with absolute paths. Raises ValueError with one reason."""
        images = tuple(self.of_kind["image"].find(name) + IMAGE for name in named_in(row, "image"))
        return {"image": images, "video": tuple(self.of_kind["video"].find(name) for name in named_in(row, "video"))}

    def describe_moved(self) -> str:
        """See `VideoFolder.describe_moved`."""
        return "; ".join(filter(None, (self.of_kind[kind].describe_moved() for kind in KINDS)))
