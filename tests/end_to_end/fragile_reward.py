"""A reward that cannot score some examples, whenever they come."""

from collections.abc import Sequence

from vcr1_fast.types import Example


def fragile(examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
    if any(example.id.endswith(("0", "3", "5")) for example in examples):
        raise ConnectionError("nobody is there")
    return [min(1.0, len(answer) / 400) for answer in answers]
