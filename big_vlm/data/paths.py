"""Where files lie: on this machine (`pathlib.Path`), or behind an address that fsspec reads (`Remote`).

    gs://bucket/photos/captions.jsonl, s3://…, https://host/photos/captions.jsonl, memory://…

Pictures, members of tar files and groups of parquet rows are read when they are asked for, by ranges of bytes, and not
kept. A file of lines or of arrow, which is read all over, is copied into CACHE once, and the index of a tar is kept
there; a file that changed is copied anew. CACHE is never cleaned up: delete it when no run uses it. Addresses chained
by '::', as of members of a zip, are refused.
"""

import dataclasses
import errno
import hashlib
import os
import posixpath
import re
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from big_vlm.config import UserError

CACHE = '~/.cache/big_vlm/remote'
_ADDRESS = re.compile(r'[a-z][a-z0-9+.-]*://')
# What of a file's description changes with its content, as the file systems call it.
_VERSION = ('size', 'ETag', 'etag', 'Last-Modified', 'LastModified', 'last_modified', 'mtime', 'created', 'generation')


@dataclasses.dataclass(frozen=True, order=True)
class Remote:
    """A file or folder behind an address; of pathlib's Path as much as the sources need.

    All that reads raises OSError where that fails, and UserError for an unknown protocol or a missing package.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str | os.PathLike) -> 'Remote':
        return Remote(f'{self.url}{"" if self.url.endswith("/") else "/"}{name}')

    @property
    def parent(self) -> 'Remote':
        return Remote(posixpath.dirname(self.url))

    @property
    def name(self) -> str:
        return posixpath.basename(self.url)

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def with_suffix(self, suffix: str) -> 'Remote':
        return self.parent / f'{self.stem}{suffix}'

    def relative_to(self, folder: 'Remote') -> PurePosixPath:
        return PurePosixPath(self.url).relative_to(PurePosixPath(folder.url))

    def is_file(self) -> bool:
        try:
            return self.ask(lambda fs, path: fs.info(path)['type']) == 'file'
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        return self.ask(lambda fs, path: fs.isdir(path))

    def is_symlink(self) -> bool:
        return False

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def glob(self, pattern: str) -> list['Remote']:
        """Files of the folder by name, as 'train-*.tar'."""
        return self.ask(lambda fs, path: [_remote(fs, found) for found in fs.glob(f'{path.rstrip("/")}/{pattern}')])

    def rglob(self, pattern: str = '*') -> list['Remote']:
        """All files below the folder."""
        return self.ask(lambda fs, path: [_remote(fs, found) for found in fs.find(path)])

    def read_bytes(self, start: int = 0, size: int | None = None) -> bytes:
        """All of it, or `size` bytes from `start` on; fewer are an OSError."""
        if size is None:
            return self.ask(lambda fs, path: fs.cat_file(path))
        data = self.ask(lambda fs, path: fs.cat_file(path, start=start, end=start + size))
        if len(data) != size:  # a web server may also send all of it, whatever it is asked for
            raise OSError(errno.EIO, f'{len(data)} bytes from {start} on instead of {size}', self.url)
        return data

    def read_text(self, encoding: str = 'utf-8') -> str:
        return self.read_bytes().decode(encoding)

    def version(self) -> str:
        """Another text for another content, as far as the server tells."""
        info = self.ask(lambda fs, path: fs.info(path))
        return repr([(key, str(info[key])) for key in _VERSION if key in info])

    def ask(self, question: Callable[[Any, str], Any]) -> Any:
        """What `question` finds out from fsspec's file system and the path in it."""
        try:
            return question(*_opened(self.url))
        except UserError:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, 'no such file', self.url) from None
        except OSError as error:
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), self.url) from error
        except Exception as error:  # the file systems' own, such as aiohttp's
            raise OSError(errno.EIO, f'{type(error).__name__}: {error}', self.url) from error


AnyPath = Path | Remote


def at(name: str | os.PathLike, folder: str = '') -> AnyPath:
    """The path of that name, below `folder` unless it is absolute or an address. Raises UserError for chained ones."""
    for start, rest in ((name, ''), (folder, name)):
        if '::' in str(start) and '://' in str(start):
            raise UserError(f'{start}: addresses chained by :: are not read: write one, of unpacked files')
        if isinstance(start, str) and _ADDRESS.match(start):
            if start.startswith('file://'):
                return Path(start.removeprefix('file://'), rest)
            address = Remote(start if start.endswith('://') else start.rstrip('/'))
            return address / rest if rest else address
    return Path(folder, name).expanduser()


def folders(path: AnyPath) -> list[str]:
    """Names of the folders right below, links left out. Raises OSError."""
    if isinstance(path, Remote):
        own, found = path.ask(lambda fs, name: (name.rstrip('/'), fs.ls(name, detail=True)))
        below = [one['name'].rstrip('/') for one in found if one['type'] == 'directory']
        return [posixpath.basename(name) for name in below if name != own]  # object stores may list the folder itself
    with os.scandir(path) as found:
        return [one.name for one in found if one.is_dir(follow_symlinks=False)]


def read(path: str | os.PathLike | Remote, start: int = 0, size: int | None = None) -> bytes:
    """All of a file, or a range of its bytes. Raises OSError."""
    if isinstance(path, Remote):
        return path.read_bytes(start, size)
    with open(path, 'rb') as file:
        file.seek(start)
        return file.read() if size is None else file.read(size)


def local(path: AnyPath) -> Path:
    """Itself, or a copy of a remote file in CACHE, made once of each version. Raises OSError."""
    if not isinstance(path, Remote):
        return path
    return cached(path, path.suffix, lambda file: path.ask(lambda fs, remote: fs.get_file(remote, str(file))))


def cached(path: Remote, suffix: str, make: Callable[[Path], None]) -> Path:
    """What `make` writes into a file that belongs to this version of `path`; whole, or not there."""
    key = hashlib.sha256(f'{path.url} {path.version()}'.encode()).hexdigest()[:32]
    file = Path(CACHE).expanduser() / f'{key}{suffix}'
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            make(Path(folder, file.name))
            os.replace(Path(folder, file.name), file)
    return file


def stamp(path: AnyPath) -> str:
    """Another text for another content of a file. Raises OSError."""
    if isinstance(path, Remote):
        return path.version()
    found = path.stat()
    return f'{found.st_size} {found.st_mtime_ns}'


def _remote(fs: Any, path: str) -> Remote:
    return Remote(fs.unstrip_protocol(path))


def _opened(url: str) -> tuple[Any, str]:
    try:
        return fsspec.url_to_fs(url)
    except ValueError:
        raise UserError(f'{url}: fsspec knows no such protocol') from None
    except ImportError as error:
        raise UserError(f'{url}: {error}') from None
