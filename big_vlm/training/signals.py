"""Being asked to stop: SIGTERM and Ctrl-C set a flag that the loop reads between steps, evaluations between batches; a
second Ctrl-C ends at once.

With several processes, a SIGTERM that any of them gets (the cluster's notice) goes through JAX's preemption service: it
names one step, a little ahead of all of them, at which all stop.
"""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

from big_vlm.sharding import mesh as meshes

# The service counts up to the step it names. Ours begin anew with every stage, but all processes ask equally often.
_ASKED = itertools.count()
_FIRST = b'\nbig_vlm: stopping; the state is saved first. Ctrl-C again ends at once, with the checkpoint before\n'
_STDERR = 2


class Stopped(Exception):
    """An evaluation was asked to stop; it is made again when the run goes on."""


class StopRequest:
    """Whether to stop; all processes answer alike."""

    def __init__(self) -> None:
        self.requested = False

    def now(self, agree: bool) -> bool:
        """True if a signal has come; to be asked at every step.

        With several processes, Ctrl-C counts only where `agree` (at the same steps on all of them).
        """
        if jax.process_count() == 1:
            return self.requested
        noticed = _service() and multihost_utils.reached_preemption_sync_point(next(_ASKED))
        return noticed or (agree and bool(meshes.anywhere(self.requested)))


_listening: list[StopRequest] = []  # the one of `catch`, within it


def check() -> None:
    """Raises Stopped within `catch` if a signal has come; all processes ask equally often."""
    if _listening and _listening[-1].now(agree=False):
        raise Stopped


@contextmanager
def catch() -> Iterator[StopRequest]:
    """Turns SIGTERM and the first Ctrl-C into a request; a second Ctrl-C is the system's, and ends the process.

    Outside the main thread, where no signal arrives, it does nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            os.write(_STDERR, _FIRST)
        request.requested = True
        # Not an exception: that would wait for what the main thread computes or saves.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    caught = (signal.SIGINT,) if _service() else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, on_signal) for number in caught}
    _listening.append(request)
    try:
        yield request
    finally:
        _listening.remove(request)
        for number, handler in before.items():
            signal.signal(number, handler)


def _service() -> bool:
    """Whether JAX listens for SIGTERM, in all processes of several."""
    return jax.process_count() > 1 and jax.config.jax_enable_preemption_service
