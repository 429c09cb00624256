"""What a checkpoint's folder must hold: every file's size and SHA-256, in `manifest.json` beside them.

It is written before the folder gets its name, so a checkpoint has one from its first moment, and whatever differs from
it later (a file cut short, a bit that flipped, a deletion that was killed) shows before anything is restored.
"""

import concurrent.futures
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from big_vlm.config import UserError, whole_file

NAME = 'manifest.json'
_FORMAT = 1
_STILL_CHANGING = '_CHECKPOINT_METADATA'  # Orbax adds the time of the commit


def write(folder: pathlib.Path, **facts: Any) -> None:
    """Hashes all files below `folder`, one after another, and writes the manifest with `facts` (JSON) beside them."""
    apart = (NAME, _STILL_CHANGING)
    files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob('*')) if f.is_file() and f.name not in apart}
    told = {name: {'bytes': file.stat().st_size, 'sha256': _hash(file)} for name, file in files.items()}
    _write(folder, {'format': _FORMAT, **facts, 'files': told})


def rewrite(folder: pathlib.Path, **facts: Any) -> None:
    """Other `facts` in the manifest that is there, without hashing; one that is not there stays so."""
    told = read(folder)
    if told is not None:
        _write(folder, told | facts)


def read(folder: pathlib.Path) -> dict[str, Any] | None:
    """The manifest; None where there is none. Raises ValueError if it cannot be read as one."""
    file = folder / NAME
    if not file.is_file():
        return None
    manifest = json.loads(file.read_text(encoding='utf-8'))
    if not isinstance(manifest, dict) or not isinstance(manifest.get('files'), dict):
        raise ValueError(f'{NAME} lists no files')
    return manifest


def problem(folder: pathlib.Path, before: Iterable[pathlib.Path] = ()) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file is as it was written.

    One without a manifest, as older versions wrote them, is not judged, unless one of those `before` it has one. Raises
    UserError for one of a newer version.
    """
    try:
        manifest = read(folder)
    except (ValueError, OSError) as error:
        return f'{NAME} cannot be read ({error})'
    if manifest is None:
        return f'{NAME} is missing' if any((older / NAME).exists() for older in before) else None
    if manifest.get('format') != _FORMAT:
        raise UserError(f'{folder}: made by a newer version (format {manifest.get("format")}): use that one')
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: _difference(folder / item[0], item[1]), manifest['files'].items())
        return next((f'{name} {what}' for name, what in zip(manifest['files'], found, strict=True) if what), None)


def _write(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
    whole_file.write_text(folder / NAME, json.dumps(manifest, indent=1))


def _difference(file: pathlib.Path, told: dict[str, Any]) -> str | None:
    try:
        size = file.stat().st_size
        if size != told['bytes']:
            return f'has {size} bytes of {told["bytes"]}'
        return None if _hash(file) == told['sha256'] else 'has changed'
    except FileNotFoundError:
        return 'is missing'
    except OSError as error:
        return f'cannot be read ({error.strerror})'


def _hash(file: pathlib.Path) -> str:
    with file.open('rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()
