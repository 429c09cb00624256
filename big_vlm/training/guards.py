"""What a run does about its own mishaps: bad batches told and skipped, loss spikes told, a stuck run's threads shown.

Where too many come in a row the run has gone astray, and the loop may go back.

All of it happens on the host, beside the devices: no step waits for it.
"""

import faulthandler
import json
import pathlib
import sys
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np

from big_vlm import config
from big_vlm.config import UserError, whole_file

_STDERR = 2  # the descriptor: sys.stderr may be anything
_WINDOW, _FEWEST = 100, 20  # losses that a spike is held against
_LEAST_DEVIATION = 0.01  # of the median: where a loss hardly moves, a small change is no spike


class Astray(UserError):
    """Too much went wrong in a row. Nobody's catching it ends the run.

    step: where that was seen. since: the first step that went wrong. what: its description, without advice.
    """

    def __init__(self, step: int, since: int, what: str, advice: str):
        super().__init__(f'{what}; {advice}')
        self.step, self.since, self.what = step, since, what


class BadBatches:
    """Counts the steps whose loss or gradient was not finite, and writes down which examples they had.

    A line of `path` is {"step", "batch", "loss", "grad_norm", "sources", "ids"}: the step as in metrics.csv, the number
    of the batch, which is another one after a roll-back, the names of the data's sources, and (number of the source,
    number of the record) of each example that this process loaded.

    Args:
      path: the file; it appears with the first bad batch.
      sources: names, in the order of their numbers.
      limit: so many bad steps in a row are too many; 0: the first one is, which then has spoilt the state.
      skipped: so many were skipped before.
      row: those that the last steps before were.
      left_behind: batches that roll-backs passed over: so much larger is a batch's number than its step.
    """

    def __init__(
        self,
        path: pathlib.Path,
        sources: Sequence[str],
        limit: int,
        skipped: int = 0,
        row: Sequence[int] = (),
        left_behind: int = 0,
    ):
        self._path, self._sources, self._limit = path, list(sources), limit
        if jax.process_index():
            self._path = path.with_stem(f'{path.stem}.{jax.process_index()}')
        self.skipped, self.row, self._left_behind = skipped, list(row), left_behind

    def rewind(self, step: int) -> None:
        """The run starts again after `step`: what was written for later steps will be written again."""
        if self._path.is_file():
            lines = self._path.read_text(encoding='utf-8').splitlines(keepends=True)
            told = [(line, json.loads(line)) for line in lines if line.endswith('\n')]
            kept = [line for line, bad in told if bad.get('batch', bad['step']) <= step + self._left_behind]
            whole_file.write_text(self._path, ''.join(kept))

    def see(self, step: int, loss: float, grad_norm: float, ids: np.ndarray | None) -> bool:
        """Whether the step was good. Raises Astray after too many in a row."""
        if np.isfinite(loss) and np.isfinite(grad_norm):
            self.row = []
            return True
        self.skipped += 1
        self.row.append(step)
        told = {'step': step, 'batch': step + self._left_behind, 'loss': str(loss), 'grad_norm': str(grad_norm)}
        told['sources'] = self._sources
        line = json.dumps(told | {'ids': [] if ids is None else np.asarray(ids).tolist()})
        where = str(self._path)
        try:
            whole_file.append(self._path, f'{line}\n'.encode())
        except UserError as error:  # as a checkpoint's: it must not end the run
            where = str(error)
        what = f'step {step}: the loss is {loss}, its gradient {grad_norm}'
        if len(self.row) < self._limit:
            say(f'{what}: nothing was updated; {where}')
            return False
        row = f', and so {len(self.row)} steps in a row' if len(self.row) > 1 else ''
        raise Astray(
            step,
            self.row[0],
            f'{what}{row}',
            f'lower optimizer.lr or lengthen optimizer.warmup, or look at the examples named in {self._path}. '
            'Nothing was saved since',
        )


class Spikes:
    """Tells of a loss far above the last hundred: more than `limit` times their deviation (1.4826 MAD) over the median.

    The first twenty steps have too little behind them. `limit` 0 is silent.

    Args:
      limit: in deviations.
      most: so many in a row are too many; 0: none are.
      losses, row: the last losses, and the spikes among the last steps, of before.
    """

    def __init__(self, limit: float, most: int = 0, losses: Sequence[float] = (), row: Sequence[int] = ()):
        self._limit, self._most, self.losses, self.row = limit, most, list(losses), list(row)

    def see(self, step: int, loss: float) -> bool:
        """Whether the step's loss is a spike; it is told. Raises Astray after too many in a row."""
        spike = False
        if self._limit and len(self.losses) >= _FEWEST:
            median = float(np.median(self.losses))
            deviation = 1.4826 * float(np.median(np.abs(np.subtract(self.losses, median))))
            far = (loss - median) / max(deviation, _LEAST_DEVIATION * abs(median), 1e-12)
            spike = far > self._limit
            if spike:
                say(f'step {step}: a spike, the loss is {loss:.4g}, {far:.0f} deviations above its median {median:.4g}')
        self.losses = [*self.losses, loss][-_WINDOW:]
        self.row = [*self.row, step] if spike else []
        if self._most and len(self.row) >= self._most:
            what = f'step {step}: the loss is {loss:.4g}, a spike for {len(self.row)} steps'
            raise Astray(step, self.row[0], what, 'lower optimizer.lr or lengthen optimizer.warmup')
        return spike


class Watchdog:
    """A thread that says when no step has ended for too long, and where every thread is; the run goes on.

    Used as a context. `minutes` 0: there is none.
    """

    def __init__(self, minutes: float):
        self._limit, self._end = 60 * minutes, threading.Event()
        self._last = (0, time.monotonic())
        self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

    def beat(self, step: int) -> None:
        """`step` has ended."""
        self._last = (step, time.monotonic())

    def rest(self) -> None:
        """An evaluation or a save has ended."""
        self.beat(self._last[0])

    def _watch(self) -> None:
        wait = self._limit
        while not self._end.wait(wait):
            step, since = self._last
            idle = time.monotonic() - since
            wait = self._limit - idle
            if wait <= 0:
                one = f' in process {jax.process_index()}' if jax.process_count() > 1 else ''
                line = f'no step has ended for {idle / 60:.3g} min, since step {step}{one}; the threads are here:'
                config.say(f'big_vlm: {line}', sys.stderr)
                faulthandler.dump_traceback(file=_STDERR, all_threads=True)
                wait = self._limit

    def __enter__(self) -> 'Watchdog':
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()


def say(line: str) -> None:
    """One line on standard error, from the first process."""
    if jax.process_index() == 0:
        config.say(f'big_vlm: {line}', sys.stderr)
