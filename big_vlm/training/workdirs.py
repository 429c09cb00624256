"""What all of a run's working directory needs: a lock, keys of stages in errors, scores by stage, lines to the user."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax

from big_vlm import config
from big_vlm.config import Stage, UserError, whole_file

WAIT_SECONDS = 120  # for a run that is ending, or whose host has gone: network file systems take a while to see that
_SCORES = 'evals.json'


def where(stages: Mapping[str, Stage], name: str) -> str:
    """The dotted key of a stage."""
    return 'config' if len(stages) == 1 and name == 'train' else f'config.{name}'


@contextlib.contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
    """Keeps every other run out of a working directory, where the file system knows locks.

    Waits for one that is under way there, and raises UserError if it does not end soon.
    """
    folder, lock = pathlib.Path(workdir), None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # the run itself tells what cannot be written
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(folder / '.lock', 'w'))
        if lock is not None and not _locked(lock, 0):
            say(f'{folder}: another run is under way there, or about to end: waiting up to {WAIT_SECONDS} s')
        if lock is not None and not _locked(lock, WAIT_SECONDS):
            raise UserError(
                f'--workdir={workdir}: another run is under way there: wait until it has ended, or name another folder'
            )
        yield


def _locked(file: IO, seconds: float) -> bool:
    """Whether the file could be locked within so many seconds; true, too, where there are no locks."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.2)
        except OSError:
            return True
        else:
            return True


def scores(folder: pathlib.Path) -> dict[str, Any]:
    """Evaluation → its scores, of a stage's folder; {} where nothing was evaluated."""
    file = folder / _SCORES
    return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}


def write_scores(folder: pathlib.Path, scores: Mapping[str, Any], must: bool = True) -> None:
    """In the place of those that are there. Raises as `whole_file.write_text` does."""
    whole_file.write_text(folder / _SCORES, json.dumps(scores, indent=1), must)


def say(line: str) -> None:
    """One line on standard output, from the first process."""
    if jax.process_index() == 0:
        config.say(line)
