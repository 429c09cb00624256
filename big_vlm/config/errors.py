"""The errors a person reads."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import TextIO


class UserError(Exception):
    """One line for a person: what is wrong, where, and the fix. Printed without a traceback, exit code 2."""


def say(line: str, stream: TextIO | None = None) -> None:
    """One line on `stream`, default standard output. A log on a full disk, or a reader who has gone, ends no run."""
    with contextlib.suppress(OSError):
        print(line, file=stream, flush=True)


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Puts `where`, such as a dotted key, before every UserError of its block."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


def unknown(kind: str, name: str, valid: Iterable[str], where: str = '') -> UserError:
    """The error for a name that does not exist: says what was meant, or lists the valid names. To be raised.

    >>> str(unknown('optimizer', 'adamww', ['adamw', 'adafactor'], 'config.optimizer.name'))
    "unknown optimizer 'adamww' (config.optimizer.name): did you mean 'adamw'? Valid: adafactor, adamw"
    """
    valid = sorted({str(v) for v in valid})
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    meant = f'did you mean {near[0]!r}? Valid: ' if near else 'valid: '
    shown = ', '.join(valid[:20]) + (f', … ({len(valid)} in all)' if len(valid) > 20 else '') if valid else '(none)'
    return UserError(f'unknown {kind} {name!r}{f" ({where})" if where else ""}: {meant}{shown}')
