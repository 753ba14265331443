"""Processes that use one cache folder at once, run by test_cache.py.

cache_hammer.py FOLDER BUDGET_BYTES NUM_PROCESSES NUM_ROUNDS   get and put small entries, check each one got
cache_hammer.py FOLDER BUDGET_BYTES                            write large entries until killed
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from vcr1_fast.video.cache import TensorCache

NUM_KEYS, SMALL_BYTES, LARGE_BYTES = 60, 40_000, 32 << 20


def key_of(number: int) -> str:
    return blake2b(str(number).encode(), digest_size=20).hexdigest()


def tensor_of(number: int, num_bytes: int = SMALL_BYTES) -> torch.Tensor:
    """Known content for each number, of a length of its own."""
    rng = np.random.default_rng(number)
    return torch.from_numpy(rng.integers(0, 256, num_bytes + number, dtype=np.uint8))


def hammer(folder: Path, budget_bytes: int, seed: int, num_rounds: int) -> dict[str, float]:
    cache, rng = TensorCache(folder, 0, budget_bytes), random.Random(seed)
    num_wrong = 0
    for _ in range(num_rounds):
        number = rng.randrange(NUM_KEYS)
        wanted = tensor_of(number)
        entry = cache.get(key_of(number))
        if entry is None:
            cache.put(key_of(number), {"values": wanted}, {"number": str(number)})
        elif entry.metadata != {"number": str(number)} or not torch.equal(entry.tensors["values"], wanted):
            num_wrong += 1
    return {"wrong": num_wrong, **cache.metrics()}


def write_for_ever(folder: Path, budget_bytes: int) -> None:
    cache, values = TensorCache(folder, 0, budget_bytes), tensor_of(0, LARGE_BYTES)
    for number in itertools.count():
        cache.put(key_of(number), {"values": values}, {})


def main() -> None:
    folder, budget_bytes = Path(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) == 3:
        write_for_ever(folder, budget_bytes)
    num_processes, num_rounds = int(sys.argv[3]), int(sys.argv[4])
    pids = []
    for seed in range(num_processes):
        pid = os.fork()  # torch is imported once, and nothing has started a thread yet
        if pid == 0:
            report = json.dumps(hammer(folder, budget_bytes, seed, num_rounds)) + "\n"
            os.write(1, report.encode())  # at once: print may write line and end apart, and another's report between
            os._exit(0)
        pids.append(pid)
    sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in pids))


if __name__ == "__main__":
    main()
