"""Which weights a rollout engine has, and whether it has all of them in one version. Used by both engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor


class WeightTable:
    """See the module's docstring."""

    def __init__(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """`weights`: those of the model, by all their names; None: the first load says which there are."""
        known = weights or {}
        self._shapes = {name: tuple(value.shape) for name, value in known.items()}
        self._places: dict[str, object] = {
            name: value.data_ptr() for name, value in known.items()
        }  # tied ones share it
        self.is_named = weights is not None  # False before the first load came to its end
        self.is_whole = False  # False before the first load, and after one that broke off: versions may then be mixed

    def forget(self) -> None:
        """The engine's weights are gone; the next load must be whole."""
        self.is_whole = False

    def checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`weights` as they come.

        The first load names every weight, a tied one by any of its names; later ones may leave out what did not change.
        Raises ValueError for a weight that there is not, comes twice, or has another shape, and at the end for one that
        is missing; the next load must then be whole again.
        """
        must_be_whole, self.is_whole = self.is_named and not self.is_whole, False
        if not self.is_named:
            self._shapes = {}
        came: set[str] = set()
        for name, value in weights:
            shape = tuple(value.shape)
            if name in came:
                raise ValueError(f"weight {name!r} was given twice")
            if self.is_named and name not in self._shapes:
                raise ValueError(
                    f"weight {name!r} is none of the engine's: send the names of its model, such as "
                    f"{next(iter(self._shapes))!r}, and the same ones each time"
                )
            if self._shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"weight {name!r} has shape {shape}, wanted {self._shapes[name]}: send whole tensors of the "
                    "same architecture"
                )
            came.add(name)
            yield name, value
        reached = {self._places.get(name, name) for name in came}
        missing = [name for name in self._shapes if self._places.get(name, name) not in reached]
        if not came or (must_be_whole and missing):
            which = f", the first is {missing[0]!r}" if missing else ""
            raise ValueError(
                f"{len(missing)} weights are missing{which}: the first load, and one after an error or a release of "
                "memory, must name every weight, and no load may be empty"
            )
        self.is_named = self.is_whole = True
