"""A file that appears under its name when it is whole, or not at all; lines that are added whole, or not at all."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

from big_vlm.config.errors import UserError, say


@contextlib.contextmanager
def writing(file: str | os.PathLike) -> Iterator[pathlib.Path]:
    """The path to write to meanwhile, beside `file`, which is replaced; its folder is made if absent.

    Of a write that fails nothing is left. Raises UserError for what the disk refuses.
    """
    file = pathlib.Path(file)
    part = file.with_name(f'.{file.name}.part')
    with _told(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)


def write_text(file: str | os.PathLike, text: str, must: bool = True) -> None:
    """The whole file, in UTF-8. Raises as `writing` does; with `must=False` that is said, and nothing more."""
    try:
        with writing(file) as part:
            part.write_text(text, encoding='utf-8')
    except UserError as error:
        if must:
            raise
        say(f'big_vlm: {error}. The run goes on', sys.stderr)


def append(file: str | os.PathLike, data: bytes) -> None:
    """All of `data` at the end of a file, which is made if absent. Raises UserError for what the disk refuses.

    Then the file is as long as before: what is appended later stands on a line of its own.
    """
    with _told(file):
        before = None
        try:
            with open(file, 'ab', buffering=0) as end:
                before, left = end.seek(0, os.SEEK_END), memoryview(data)
                while left:
                    left = left[end.write(left) :]
        except OSError:
            if before is not None:
                os.truncate(file, before)
            raise


@contextlib.contextmanager
def _told(file: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f'{file}: not written: {error.strerror or error}') from error
