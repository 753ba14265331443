"""Damage to files at rest: a bit, a block, the end, or all of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

BLOCK_BYTES = 4096


def damage_a_file(rng: random.Random, folder: Path, ways: str = "all") -> str:
    """Each file below `folder` is as likely. Says what was done; `ways`: `bits` for single flipped bits alone."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    name = "flip" if ways == "bits" or rng.random() < 0.6 else rng.choice(list(WAYS))
    where = WAYS[name](rng, path)
    return f"{name} {path.relative_to(folder.parent)}{where}"


def flip(rng: random.Random, path: Path) -> str:
    """One bit. Half of them in the first KiB, where headers are."""
    data = bytearray(path.read_bytes())
    if not data:
        return ""
    at = rng.randrange(len(data) if rng.random() < 0.5 else min(1024, len(data)))
    bit = rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f" at byte {at} bit {bit} of {len(data)}"


def blank(rng: random.Random, path: Path) -> str:
    """A block of zeros, as a disk that has lost one."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(max(1, len(data))) // BLOCK_BYTES * BLOCK_BYTES
    end = min(len(data), at + BLOCK_BYTES)
    data[at:end] = bytes(end - at)
    path.write_bytes(data)
    return f" at byte {at} of {len(data)}"


def cut(rng: random.Random, path: Path) -> str:
    data = path.read_bytes()
    at = rng.randrange(max(1, len(data)))
    path.write_bytes(data[:at])
    return f" at byte {at} of {len(data)}"


def lengthen(rng: random.Random, path: Path) -> str:
    path.write_bytes(path.read_bytes() + bytes(rng.randrange(1, 5000)))
    return ""


def empty(rng: random.Random, path: Path) -> str:
    path.write_bytes(b"")
    return ""


def delete(rng: random.Random, path: Path) -> str:
    path.unlink()
    return ""


WAYS: dict[str, Callable[[random.Random, Path], str]] = {
    "flip": flip,
    "blank": blank,
    "cut": cut,
    "lengthen": lengthen,
    "empty": empty,
    "delete": delete,
}
