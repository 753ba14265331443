"""The factors of LoRA adapters on their way to the workers, which add them to their matrices (lora.py).

They are few (0.16 GB at rank 32 for 7B, in bfloat16), so they go through host memory or TCP whatever way the weights
take, and what a worker that is started again needs is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vcr1_fast.learner.lora import is_factor
from vcr1_fast.rollout.sgl.feed import Feed
from vcr1_fast.rollout.sgl.weights import Batch, Weights, WeightStore


class Adapters:
    """The newest factors of all adapters in host memory."""

    def __init__(self, bucket_bytes: int, dtype: torch.dtype, scale: float) -> None:
        """`dtype`: that they are sent in, the one in which the learner multiplies; `scale`: alpha / rank."""
        self._store = WeightStore(bucket_bytes, dtype)
        self._scale = scale
        self._shapes: dict[str, tuple[int, ...]] = {}

    def keeping(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """Passes on what is no factor, and keeps the factors.

        Raises ValueError at the end unless the factors are those of the first time, in name and shape.
        """
        came: dict[str, tuple[int, ...]] = {}
        for name, value in weights:
            if not is_factor(name):
                yield name, value
                continue
            came[name] = tuple(value.shape)
            self._store.place(name, value)
        different = dict(came.items() ^ self._shapes.items())
        if self._shapes and different:
            raise ValueError(
                f"{len(different)} factors of adapters are missing, new or of another shape, such as "
                f"{next(iter(different))!r}: give all adapters each time"
            )
        self._shapes = came

    def send(self, feed: Feed, *, is_fresh: bool) -> None:
        """To all workers of the feed, as the end of a load, also of one without adapters. `is_fresh`: the load began
        with the matrices themselves."""
        batches = self._store.all() or [Batch(torch.zeros(1, dtype=torch.uint8), ())]
        for index, batch in enumerate(batches):
            details = {"scale": self._scale, "begins": index == 0, "is_fresh": is_fresh and index == 0}
            feed.begin(
                "adapters",
                batch.entries(feed.wants_checksums),
                is_last=index == len(batches) - 1,
                tensors={"bytes_B": batch.memory or batch.flat_B},
                details_of=lambda _, details=details: details,
            )
            feed.finish()

    def close(self) -> None:
        self._store.close()
