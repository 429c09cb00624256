"""From a step's metrics on the devices to the writers, with the eyes of the guards on them."""

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from big_vlm.training import guards, memory, throughput

SKIPPED = 'updates_skipped'


class Writer(Protocol):
    """Where the numbers go."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def rewind(self, step: int, again: Collection[str] = ()) -> None: ...


class Log:
    """Writes metrics a little later than they are computed, so that the device never waits for the host.

    Two steps in flight keep an accelerator busy, and are the prefetch to it: their batches are on their way while an
    earlier step runs. CPU devices share the host's threads, where two programs with collectives at once can lock each
    other out: there it waits for each step.
    """

    def __init__(
        self,
        writers: Writer,
        meter: throughput.Meter,
        bad: guards.BadBatches,
        spikes: guards.Spikes,
        watchdog: guards.Watchdog,
    ):
        self._writers, self._meter, self._bad, self._spikes, self._watchdog = writers, meter, bad, spikes, watchdog
        self._ahead = 0 if jax.default_backend() == 'cpu' else 2
        self._flying: list[tuple[int, dict[str, Any], np.ndarray | None, bool]] = []

    def step(self, step: int, metrics: dict[str, Any], ids: np.ndarray | None, show: bool) -> None:
        """Takes the metrics of a step that may still be running, and the ids of its examples."""
        self._flying.append((step, metrics, ids, show))
        while len(self._flying) > self._ahead:
            self._land()

    def flush(self) -> None:
        """Waits for all steps and writes what there is to write."""
        while self._flying:
            self._land()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Other numbers than a step's."""
        if values:
            self._writers.write(step, {name: float(value) for name, value in values.items()})

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Waits for all steps; what happens inside does not count as training time."""
        self.flush()
        began = time.perf_counter()
        yield
        self._meter.pause(time.perf_counter() - began)
        self._watchdog.rest()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting for the data."""
        began = time.perf_counter()
        yield
        self._meter.wait(time.perf_counter() - began)

    def _land(self) -> None:
        step, metrics, ids, show = self._flying.pop(0)
        loss, norm = float(metrics['loss']), float(metrics['grad_norm'])
        self._meter.done(step)
        self._watchdog.beat(step)
        if self._bad.see(step, loss, norm, ids):
            self._spikes.see(step, loss)
        if show:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            values[SKIPPED] = float(self._bad.skipped)
            self._writers.write(step, {**values, **self._meter.read(step), **memory.read()})
