"""Where a run's numbers go: a progress line, a CSV file, TensorBoard, Weights & Biases, or several of them.

Every writer has three methods. `write(step, values)` takes the numbers of one step; `rewind(step, again)` says that the
run starts again after `step`, so what was written for later steps no longer counts, nor what the evaluations named
`again` gave at `step` itself; `close()` ends it. A run that was cut off and goes on leaves the same record as one that
was not.
"""

import contextlib
import csv
import io
import itertools
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from big_vlm.config import UserError, say, whole_file
from big_vlm.data import tfrecord

STEP = 'step'


class Writer(Protocol):
    """What all writers offer."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def rewind(self, step: int, again: Collection[str] = ()) -> None: ...

    def close(self) -> None: ...


class MultiWriter:
    """Passes everything on to several writers, in order.

    What the disk or a network refuses one of them to write is told once, and ends nothing; only `rewind` raises it.
    """

    def __init__(self, *writers: Writer):
        self.writers = writers
        self._refused: set[Writer] = set()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self.writers:
            with self._survived(writer):
                writer.write(step, values)

    def rewind(self, step: int, again: Collection[str] = ()) -> None:
        for writer in self.writers:
            writer.rewind(step, again)

    def close(self) -> None:
        for writer in self.writers:
            with self._survived(writer):
                writer.close()

    @contextlib.contextmanager
    def _survived(self, writer: Writer) -> Iterator[None]:
        try:
            yield
            self._refused.discard(writer)
        except (OSError, UserError) as error:
            if writer not in self._refused:
                say(f'big_vlm: {error}. The run goes on', sys.stderr)
            self._refused.add(writer)


class CsvWriter:
    """One row per call, first column `step`; a cell is empty where a row has no such value.

    Columns may grow: a new name adds a column at the end and the file is rewritten. A file that is there already is
    continued, without the last line if the run died in the middle of it. Rewriting goes through a second file that is
    moved into place, so a crash leaves either the old table or the new one. A row that the disk refuses raises
    UserError, and is written before the next one.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._waiting: list[tuple[int, Mapping[str, float]]] = []
        self._columns, rows = _read_table(self.path)
        if self._columns:
            self._rewrite(self._columns, rows)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._waiting.append((step, values))
        self._catch_up()

    def rewind(self, step: int, again: Collection[str] = ()) -> None:
        self._catch_up()
        made = tuple(f'{name}/' for name in again)

        def counts(row: Mapping[str, str]) -> bool:
            evaluated = any(value and name.startswith(made) for name, value in row.items())
            return int(row[STEP]) < step or (int(row[STEP]) == step and not evaluated)

        _, rows = _read_table(self.path)
        if self._columns:
            self._rewrite(self._columns, [row for row in rows if counts(row)])

    def close(self) -> None:
        self._catch_up()

    def _catch_up(self) -> None:
        while self._waiting:
            self._append(*self._waiting[0])
            del self._waiting[0]

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        known = self._columns if self.path.exists() else []  # who moved it away gets a whole one again
        if new := [name for name in values if name not in known]:
            columns, rows = _read_table(self.path)
            self._rewrite([*(columns or [STEP]), *new], rows)
        line = io.StringIO()
        row = {STEP: int(step), **{name: repr(float(value)) for name, value in values.items()}}
        csv.DictWriter(line, self._columns, lineterminator='\n').writerow(row)
        whole_file.append(self.path, line.getvalue().encode())

    def _rewrite(self, columns: list[str], rows: Sequence[Mapping[str, str]]) -> None:
        with whole_file.writing(self.path) as part, part.open('w', newline='', encoding='utf-8') as file:
            table = csv.DictWriter(file, columns, lineterminator='\n')
            table.writeheader()
            table.writerows(rows)
        self._columns = columns


def read_csv(path: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
    """A CsvWriter's file as {column: [(step, value), …]}, without the empty cells. An absent file is an empty dict.

    Raises UserError for a file that is none.
    """
    columns, rows = _read_table(Path(path))
    names = [name for name in columns if name != STEP]
    try:
        return {name: [(int(row[STEP]), float(row[name])) for row in rows if row[name]] for name in names}
    except (ValueError, KeyError) as error:
        raise UserError(f'{path} is damaged: {type(error).__name__}: {error}') from error


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows, without a last line that was cut off."""
    if not path.exists():
        return [], []
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    if lines and not lines[-1].endswith('\n'):
        lines.pop()
    table = csv.DictReader(lines)
    rows = [{name: row[name] or '' for name in table.fieldnames or ()} for row in table]
    return list(table.fieldnames or ()), rows


class TensorBoardWriter:
    """Scalars as TensorBoard event files in `logdir`. No file appears before the first value.

    The events of a step are written at once, by the thread that asks: a full disk loses them, and damages nothing.
    """

    def __init__(self, logdir: str | os.PathLike):
        self.logdir = Path(logdir)
        self._file: Path | None = None
        self._head: list[dict] = []  # the events that a file begins with, until they are written
        self._purge_step: int | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX import summary  # Only runs that log to TensorBoard load it.

        if self._file is None:
            self._open()
        scalars = [{'step': int(step), 'summary': summary.scalar(name, float(x))} for name, x in values.items()]
        self._append([*self._head, *scalars])
        self._head = []

    def rewind(self, step: int, again: Collection[str] = ()) -> None:
        # A new event file that says "forget everything from here on": TensorBoard never edits an old one. What is made
        # again at `step` is the same point.
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        self._file = None

    def _open(self) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        self.logdir.mkdir(parents=True, exist_ok=True)
        # Files of one second are told apart by a number: a quick restart must not append to the one before.
        number = next(n for n in itertools.count() if not any(self.logdir.glob(f'*.run{n}')))
        name = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}.run{number}'
        self._file, self._head = self.logdir / name, [{'file_version': 'brain.Event:2'}]
        if self._purge_step is not None:
            self._head.append({'step': self._purge_step, 'session_log': SessionLog(status=SessionLog.START)})

    def _append(self, events: Sequence[Mapping]) -> None:
        from tensorboardX.proto.event_pb2 import Event

        made = [Event(wall_time=time.time(), **event).SerializeToString() for event in events]
        whole_file.append(self._file, b''.join(map(tfrecord.framed, made)))


class WandbWriter:
    """Scalars on Weights & Biases (`pip install wandb`), as one run that restarts go on with.

    Args:
      project: theirs.
      name: of the run.
      folder: of the stage; the run's id is kept there.
      config: the stage's, shown beside the curves.

    Whatever theirs raises is a UserError.
    """

    def __init__(self, project: str, name: str, folder: str | os.PathLike, config: Mapping):
        import wandb  # Only runs that log there load it.

        file = Path(folder) / 'wandb_id.txt'
        if not file.is_file():
            whole_file.write_text(file, uuid.uuid4().hex)
        options = dict(id=file.read_text(), resume='allow', dir=str(folder), config=dict(config))
        with _of_wandb(". Run 'wandb login', set WANDB_MODE=offline, or set wandb to ''"):
            self._run = wandb.init(project=project, name=name, **options)
            # Their own counter never goes back, as a restart does; over this column, a repeated step is the same point.
            self._run.define_metric('*', step_metric=STEP)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with _of_wandb():
            self._run.log({STEP: int(step), **values})

    def rewind(self, step: int, again: Collection[str] = ()) -> None:
        """Nothing there can be taken back; what comes again is the same."""

    def close(self) -> None:
        with _of_wandb():
            self._run.finish()


@contextlib.contextmanager
def _of_wandb(remedy: str = '') -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A login, a network, a quota: they share no type.
        raise UserError(f'wandb: {" ".join(str(error).split()) or type(error).__name__}{remedy}') from error


class ProgressWriter:
    """How far a run is and when it will end.

    On a terminal one bar that redraws itself; elsewhere (a log file, a batch system) one short line per call that has
    something to show. The time left comes from the steps of this process alone, and from the first `write` on, so that
    neither the steps before a restart nor the compilation of the first step distort it.

    Args:
      total_steps: where the run ends.
      name: what the line begins with, the stage's name.
      show: value names to show, in this order, where a call has them.
      stream: default standard error.
      clock: seconds that only go forward.
    """

    def __init__(
        self,
        total_steps: int,
        name: str = 'train',
        show: Sequence[str] = ('loss',),
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps, self.name, self.show = total_steps, name, tuple(show)
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._anchor: tuple[int, float] | None = None
        self._bar = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = self._clock()
        if self._anchor is None:
            self._anchor = (step, now)
        shown = [f'{name} {values[name]:.4g}' for name in self.show if name in values]
        if self.show and not shown:  # An evaluation's numbers: whoever made them prints them.
            return
        shown.append(f'{self._remaining(step, now)} left')
        if not self._stream.isatty():
            share = 100 * step / max(self.total_steps, 1)
            print(
                f'{self.name} {step}/{self.total_steps} ({share:.0f}%)  ' + '  '.join(shown),
                file=self._stream,
                flush=True,
            )
            return
        if self._bar is None:
            import tqdm  # Only a terminal needs it.

            form = '{desc} {bar} {n_fmt}/{total_fmt}  {postfix}'
            self._bar = tqdm.tqdm(
                total=self.total_steps,
                initial=step,
                desc=self.name,
                file=self._stream,
                bar_format=form,
                dynamic_ncols=True,
            )
        self._bar.n = step
        self._bar.set_postfix_str('  '.join(shown), refresh=True)

    def rewind(self, step: int, again: Collection[str] = ()) -> None:
        self._anchor = None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _remaining(self, step: int, now: float) -> str:
        first, started = self._anchor or (step, now)
        if step <= first:
            return '?'
        seconds = round((now - started) / (step - first) * max(self.total_steps - step, 0))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
