"""Weights by name, read one array at a time: what every format becomes on the way in and out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from big_vlm.config import UserError

_SHOWN = 4  # names per kind of problem; the counts are always complete


@dataclasses.dataclass(frozen=True)
class LazyWeights:
    """Names, shapes and a way to read one array; nothing is in memory until it is read.

    Attributes:
      shapes: name → jax.ShapeDtypeStruct.
      read: name → numpy array of that shape and dtype. Raises UserError where the file is damaged.
      where: the file or folder, for errors.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[str], np.ndarray]
    where: str

    @property
    def nbytes(self) -> int:
        """Of all arrays together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.shapes.values())

    def renamed(self, names: Mapping[str, str]) -> LazyWeights:
        """The weights that `names` (theirs → new name) lists, under their new names."""
        old = {new: name for name, new in names.items()}
        return LazyWeights(
            {new: self.shapes[name] for new, name in old.items()}, lambda n: self.read(old[n]), self.where
        )

    def below(self, part: str) -> LazyWeights:
        """The subtree `part` ('/'-joined; '' is all of it), under the names below it."""
        prefix = f'{part}/' if part else ''
        return self.renamed({name: name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)})

    def changed(self, name: str, shape: Iterable[int], change: Callable[[np.ndarray], np.ndarray]) -> LazyWeights:
        """The same weights with `name` passed through `change`, which gives it `shape`."""
        leaf = jax.ShapeDtypeStruct(tuple(shape), self.shapes[name].dtype)

        def read(wanted: str) -> np.ndarray:
            return change(self.read(wanted)) if wanted == name else self.read(wanted)

        return LazyWeights({**self.shapes, name: leaf}, read, self.where)


def with_rows(weights: LazyWeights, name: str, rows: int) -> LazyWeights:
    """Cuts a token table [V, D] to its first `rows`, or appends its mean row until there are so many.

    The logit of a mean row is the mean of all logits, so an appended row is never the likeliest token.
    """
    before, width = weights.shapes[name].shape
    if rows == before:
        return weights

    def change(table: np.ndarray) -> np.ndarray:
        if rows < before:
            return table[:rows]
        mean = table.mean(axis=0, dtype=np.float32, keepdims=True).astype(table.dtype)
        return np.concatenate([table, np.repeat(mean, rows - before, axis=0)])

    return weights.changed(name, (rows, width), change)


def check_names(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str, expected: str) -> None:
    """Raises one UserError with everything that is missing, unexpected or of another shape; `expected` names the model.

    `wanted` and `found`: name → anything with a `shape`.
    """
    missing = [name for name in wanted if name not in found]
    foreign = [name for name in found if name not in wanted]
    misshapen = [
        f'{name} {list(found[name].shape)} instead of {list(leaf.shape)}'
        for name, leaf in wanted.items()
        if name in found and tuple(found[name].shape) != tuple(leaf.shape)
    ]
    kinds = (('missing', missing), ('not expected', foreign), ('of another shape', misshapen))
    problems = [f'{len(names)} {kind} ({_some(names)})' for kind, names in kinds if names]
    if problems:
        raise UserError(f'{where} is not {expected}: {"; ".join(problems)}')


def _some(names: list[str]) -> str:
    return ', '.join(names[:_SHOWN]) + (', …' if len(names) > _SHOWN else '')
