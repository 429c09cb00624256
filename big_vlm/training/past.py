"""What of a run's past decides how it goes on, beside its state: part of every checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from big_vlm.sharding import mesh as meshes
from big_vlm.training import guards


@dataclasses.dataclass(frozen=True)
class Past:
    """At the step of a checkpoint.

    evaluated: whether the evaluations of that step were made.
    images_replaced, answers_cut, updates_skipped: as in the metrics. by_source: those of several sources.
    bad_row, spike_row: the steps just before that were bad, or spikes. losses: the last ones, which spikes are held
    against. With these a run that goes on judges as one that was not cut off.
    rollbacks: (step at which the run went back, step of the checkpoint to which).
    """

    evaluated: bool = False
    images_replaced: int = 0
    answers_cut: int = 0
    updates_skipped: int = 0
    by_source: dict[str, int] = dataclasses.field(default_factory=dict)
    bad_row: tuple[int, ...] = ()
    spike_row: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    rollbacks: tuple[tuple[int, int], ...] = ()

    @property
    def left_behind(self) -> int:
        """Batches that roll-backs passed over: step `s` takes batch `s` + this."""
        return sum(astray - step for astray, step in self.rollbacks)

    def counted(self, batches: Any, mesh: Mesh) -> dict[str, int]:
        """The metrics of what befell the examples of all processes so far; to be asked by all of them at once.

        `batches` (a `loader.Batches`) has this process's counts since the run went on.
        """
        cut = getattr(batches, 'cut', None)
        since = {'images_replaced': getattr(batches, 'replaced', 0), **({} if cut is None else {'answers_cut': cut})}
        since |= getattr(batches, 'by_source', {})
        sums = meshes.sum_of_shards(np.array([*since.values()], np.int64), mesh).tolist()
        before = {'images_replaced': self.images_replaced, 'answers_cut': self.answers_cut, **self.by_source}
        return {name: before.get(name, 0) + count for name, count in zip(since, sums, strict=True)}

    def now(self, bad: guards.BadBatches, spikes: guards.Spikes, evaluated: bool, batches: Any, mesh: Mesh) -> Past:
        """As it is by now; to be asked by all processes at once."""
        counted = self.counted(batches, mesh)
        return dataclasses.replace(
            self,
            evaluated=evaluated,
            updates_skipped=bad.skipped,
            bad_row=tuple(bad.row),
            spike_row=tuple(spikes.row),
            losses=tuple(spikes.losses),
            images_replaced=counted.pop('images_replaced'),
            answers_cut=counted.pop('answers_cut', self.answers_cut),
            by_source=self.by_source | counted,
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Past:
        """From a checkpoint's extra, which has other keys too, and lacks some if it is an older one."""
        known = {field.name: stored[field.name] for field in dataclasses.fields(cls) if field.name in stored}
        return cls(**{key: _tuples(value) for key, value in known.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
