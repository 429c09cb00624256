"""A file that appears under its name when it is whole, or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from big_vlm.config.errors import UserError


@contextlib.contextmanager
def writing(file: str | os.PathLike) -> Iterator[pathlib.Path]:
    """The path to write to meanwhile, beside `file`, which is replaced; its folder is made if absent.

    Of a write that fails nothing is left. Raises UserError for what the disk refuses.
    """
    file = pathlib.Path(file)
    part = file.with_name(f'.{file.name}.part')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f'{file}: not written: {error.strerror or error}') from error


def write_text(file: str | os.PathLike, text: str) -> None:
    """The whole file, in UTF-8. Raises as `writing` does."""
    with writing(file) as part:
        part.write_text(text, encoding='utf-8')
