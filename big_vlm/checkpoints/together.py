"""Several processes save as one: none passes for saved what another could not write."""

import jax
from orbax.checkpoint.multihost import get_barrier_sync_fn

# How long, after all have come, a process that failed is waited for. Nothing but the saving threads waits.
VOUCH_SECONDS = 60
_WRITTEN, _COMMITTED = 'async_write_complete', 'async_commit_complete'  # in the keys of Orbax's barriers
_MISSED = 'another process could not write its part'


class Barrier:
    """What Orbax's saving threads wait at for those of the other processes.

    A process whose part fails never comes to Orbax's own barrier, and the others wait 20 minutes for it. To this one it
    comes too, but not to the second one behind it, where all vouch for their parts: so nobody passes that.

    In every process Orbax comes to six barriers a save: two of its begin, two of what is written, two of its end. Its
    threads come to those of the end after a failure, too.
    """

    def __init__(self):
        self._wait = get_barrier_sync_fn()
        self._saves, self._others = 0, 0  # begun; barriers of beginnings and ends
        self._owed: list[str] = []  # of the save under way

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        place = next((place for place in (_WRITTEN, _COMMITTED) if place in key), None)
        if place is not None:
            self._vouch(place, timeout_ms)
            return
        count, self._others = self._others % 4, self._others + 1
        if count == 2 and self._owed:
            self._come(self._owed[0], timeout_ms)
            self._owed = []
        self._wait(key=key, timeout_ms=timeout_ms)
        if count == 1:
            self._saves += 1
            self._owed = [_WRITTEN, _COMMITTED]

    def _come(self, place: str, timeout_ms: int) -> None:
        self._wait(key=f'{place} of save {self._saves}', timeout_ms=timeout_ms)

    def _vouch(self, place: str, timeout_ms: int) -> None:
        owed, self._owed = self._owed, []
        self._come(place, timeout_ms)
        try:
            self._wait(key=f'{place} of save {self._saves} by all', timeout_ms=1000 * VOUCH_SECONDS)
        except jax.errors.JaxRuntimeError as error:
            raise OSError(_MISSED) from error
        self._owed = owed[1:]
