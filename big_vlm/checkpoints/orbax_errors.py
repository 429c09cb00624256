"""What Orbax raises, as an error to catch by its type, and no word of it from elsewhere."""

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """For whatever calls Orbax. The bare Exception that it makes of an array it cannot read is a ValueError."""
    _hush()
    try:
        yield
    except Exception as error:
        if type(error) is Exception:
            raise ValueError(str(error.__cause__ or error)) from error
        raise


@functools.cache  # For good: the reads and writes that fail may outlive the call.
def _hush() -> None:
    """Orbax logs what it raises, too, and Python tells of every other array that fails or comes too late."""
    logging.getLogger('absl').addFilter(lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname)
    logging.getLogger('asyncio').addFilter(lambda record: not (record.exc_info and _late(record.exc_info[1])))
    hook = sys.unraisablehook
    sys.unraisablehook = lambda told: None if _late(told.exc_value) else hook(told)
    warnings.filterwarnings('ignore', "coroutine 'async_serialize_from_host", RuntimeWarning)


def _late(error: BaseException | None) -> bool:
    ours = 'Event loop is closed', 'OCDBT', 'TensorStore', '.orbax-checkpoint-tmp'
    return any(part in str(error) for part in ours)
