"""GOT-10k as VideoChat-R1 samples it: one object and 8 boxes in a folder of images.

    [{"path": ".../GOT-10k_Val_000010", "object": "sloth", "gt": [[x0, y0, x1, y1], ...]}, ...]

Corners as fractions of width and height, 0 to 0.999. The file does not say to which instants the boxes belong, and the
original gets it wrong: it shows 7 images, the first, the last and five at equal distances between, pads them to 8 with
the last one and takes box i for image i.

What the 180 validation tracks say: from box 0 to box 1 the centre moves by 0.0145 on average, from each later box to
the next by 0.089 to 0.106. So boxes 1 to 7 lie at six equal distances, which is where the 7 images are, and box 0, the
one given in the prompt, is 0.0145 / 0.0975 = 0.15 of such a distance before box 1.
"""

from __future__ import annotations

from collections.abc import Iterator

from vcr1_fast.prompts.schemas.schema import Entry, Recipe, Row, Schema, read_field, read_text
from vcr1_fast.video.source_name import images_name

IMAGES_PER_S = 2.0  # a list of images is declared to run at this rate, whatever the real one
NUM_IMAGES = 7
BOX_1_S = 0.07  # 0.15 of the 0.5 s between two images: on the first image, but told apart from box 0
# Instants on that declared timeline.
FIXED_TIMES_S = (0.0, BOX_1_S, *(image / IMAGES_PER_S for image in range(1, NUM_IMAGES)))
FIXED_DURATION_S = NUM_IMAGES / IMAGES_PER_S
PAPER_TIMES_S = tuple(image / IMAGES_PER_S for image in range(NUM_IMAGES + 1))
PAPER_DURATION_S = (NUM_IMAGES + 1) / IMAGES_PER_S


def _to_rows(where: str, entry: Entry, recipe: Recipe) -> Iterator[tuple[str, Row]]:
    """fixed: 3.5 s with boxes at 0, 0.07, 0.5, 1.0, ... 3.0 s. paper: 4 s with box i at i / 2 s, as in the original.

    Both show the same: NUM_IMAGES of the folder, the last one twice as the vision tower takes frames in pairs.
    A row with another number of boxes is refused by the task, as there are then more or fewer boxes than instants.
    """
    is_paper = recipe == "paper"
    yield (
        where,
        {
            "task": "object_tracking",
            "video": images_name(read_text(entry, "path"), NUM_IMAGES, IMAGES_PER_S),
            "query": read_text(entry, "object"),
            "duration_s": PAPER_DURATION_S if is_paper else FIXED_DURATION_S,
            "boxes": read_field(entry, "gt"),
            "times_s": list(PAPER_TIMES_S if is_paper else FIXED_TIMES_S),
        },
    )


SCHEMA = Schema(
    name="got10k", task="object_tracking", keys=("path", "object", "gt"), is_mapping=False, to_rows=_to_rows
)
