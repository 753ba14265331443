"""Made-up completions and their truths, of the length and with the flaws of real ones. Called by `bench.rewards`."""

from __future__ import annotations

import random

from vcr1_fast.types import Box, Interval

NUM_BOXES = 8
# The think block: 4 to 12 of these, about 130 tokens, what VideoAuto-R1 (arXiv 2601.05175) counts for VideoChat-R1.
SENTENCES = (
    "The video starts with a person who stands near the kitchen counter.",
    "At <timestep>3.5</timestep> the person opens the cabinet and takes something out of it.",
    "Between <timestep>8.0 to 12.5</timestep> the camera turns to the left side of the room.",
    "The object moves to the right and becomes larger, so the box has to grow as well.",
    "After that nothing changes until the end, and the person walks out of the picture.",
)


def grounding(count: int, seed: int) -> tuple[list[str], list[list[Interval]]]:
    """`count` completions "X to Y" and one true interval for each."""
    rng = random.Random(seed)
    texts: list[str] = []
    truths: list[list[Interval]] = []
    for _ in range(count):
        start_s = rng.uniform(0.0, 20.0)
        end_s = start_s + rng.uniform(2.0, 15.0)
        truths.append([(start_s, end_s)])
        first_s, last_s = (abs(x + rng.gauss(0.0, 3.0)) for x in (start_s, end_s))
        answer = f"{first_s:.2f} to {last_s:.2f}"
        texts.append(
            _completion(rng, rng.choice((answer, answer, answer, f"From {answer} seconds.", f"{first_s:.1f}s")))
        )
    return texts, truths


def tracking(count: int, seed: int) -> tuple[list[str], list[list[Box]]]:
    """`count` completions with lists of boxes and a true track of 8 boxes for each."""
    rng = random.Random(seed)
    texts: list[str] = []
    truths: list[list[Box]] = []
    for _ in range(count):
        x, y, w, h = rng.uniform(0, 0.5), rng.uniform(0, 0.5), rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.5)
        boxes: list[Box] = [(x + 0.02 * i, y, x + w + 0.02 * i, y + h) for i in range(NUM_BOXES)]
        truths.append(boxes)
        num_rows = NUM_BOXES if rng.random() < 0.9 else NUM_BOXES - 1
        rows = [[round(corner + rng.gauss(0.0, 0.02), 3) for corner in box] for box in boxes[:num_rows]]
        texts.append(_completion(rng, str(rows)))
    return texts, truths


def _completion(rng: random.Random, answer: str) -> str:
    think = " ".join(rng.choices(SENTENCES, k=rng.randrange(4, 13)))
    text = f"<think>{think}</think>\n<answer>{answer}</answer>"
    return text if rng.random() < 0.9 else text[: rng.randrange(len(text))]  # one in ten is cut off
