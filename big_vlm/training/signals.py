"""Being asked to stop: SIGTERM and Ctrl-C set a flag that the loop reads between steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """Whether to stop; all processes answer alike."""

    def __init__(self) -> None:
        self.requested = False

    def now(self, agree: bool) -> bool:
        """True if a signal has come. With several processes only where `agree` (at the same steps on all of them)."""
        if jax.process_count() == 1:
            return self.requested
        return agree and bool(multihost_utils.process_allgather(np.array(self.requested)).any())


@contextmanager
def catch() -> Iterator[StopRequest]:
    """Turns SIGTERM and the first Ctrl-C into a request; a second Ctrl-C interrupts at once.

    Outside the main thread, where no signal arrives, it does nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, frame: object) -> None:
        if request.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.requested = True

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
