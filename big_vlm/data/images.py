"""Pictures in: bytes, files, PIL images or arrays become uint8 RGB arrays, resized as the contract says."""

import contextlib
import functools
import io
import os
import struct
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from big_vlm.config import UserError
from big_vlm.data import paths
from big_vlm.data.contract import Contract

ImageLike = bytes | str | os.PathLike | paths.Remote | Image.Image | np.ndarray

MAX_PIXELS = 89_478_485  # Pillow's own limit; a larger picture is refused before it is decoded
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')  # of Pillow's: others run other programs
_PILLOW = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}
_GREYS = ('1', 'L', 'I', 'I;16', 'I;16L', 'I;16B', 'F')  # modes of one channel
_PNG_START = b'\x89PNG\r\n\x1a\n'
_PNG_END = b'IEND\xaeB`\x82'
_JPEG_END = b'\xff\xd9'


def decode(image: ImageLike, least: int = 0) -> np.ndarray:
    """uint8 [H,W,3] in RGB, turned as its EXIF orientation says; 16-bit grey keeps its levels, alpha is dropped.

    With `least`, a JPEG may come at a half, a quarter or an eighth of its size, as long as no side has fewer pixels
    than that: its low frequencies alone, which cost less.

    Raises ValueError for what is no picture, is cut short, or has more than MAX_PIXELS pixels; OSError for a file that
    cannot be read.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        with _decoding('the image'):  # a file that was opened is read here
            return _from_pillow(image)
    if not isinstance(image, bytes):
        image = paths.read(image)
    if _is_plain_png(image):
        # A third of Pillow's time on small pictures.
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is not None:
            return pixels
    with _opened(image) as opened:
        if _is_plain_jpeg(opened, image):
            # The same pixels as Pillow's, both are libjpeg-turbo's, in two thirds of the time.
            with contextlib.suppress(ValueError):  # what is not quite in order, Pillow judges
                width, height = (-(-side // _part(min(opened.size), least)) for side in opened.size)
                return simplejpeg.decode_jpeg(image, min_height=height, min_width=width)
        return _from_pillow(opened)


def of_record(value: Any, name: str) -> bytes | paths.AnyPath | np.ndarray:
    """A record's field of that name. Raises ValueError for a text or a number: only a source says which file is one."""
    if not isinstance(value, bytes | paths.AnyPath | np.ndarray):
        raise ValueError(f'{name} is no picture but {type(value).__name__}: {str(value)[:80]!r}')
    return value


def levels(image: bytes | paths.AnyPath | np.ndarray, indices: bool = False) -> np.ndarray:
    """[H,W], the number at each pixel as it is stored: for masks, where 16-bit grey must not become 8-bit.

    Of several channels the highest number. Of a palette that of the colour, or with `indices` the index. Raises as
    `decode`.
    """
    if isinstance(image, np.ndarray):
        return image if image.ndim == 2 else _from_array(image).max(axis=-1)
    with _opened(image if isinstance(image, bytes) else paths.read(image)) as opened:
        check_size(opened)
        turned = ImageOps.exif_transpose(opened)
        as_stored = turned.mode in (*_GREYS, 'P') if indices else turned.mode in _GREYS
        pixels = np.asarray(turned if as_stored else turned.convert('RGB'))
        return pixels if pixels.ndim == 2 else pixels.max(axis=-1)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A picture of one of FORMATS; whatever goes wrong inside is a ValueError."""
    with _decoding(f'the image ({len(data)} bytes)'):
        try:
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f'not an image in any known format ({len(data)} bytes; {", ".join(FORMATS)})') from None
        with opened:
            yield opened


@contextlib.contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Whatever a broken picture raises becomes a ValueError."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file
        raise ValueError(f'cannot decode {what}: {error}') from error


def check_size(image: Image.Image) -> None:
    """Before its pixels are decoded. Raises ValueError for more than MAX_PIXELS."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f'the image has {image.width}×{image.height} pixels, more than {MAX_PIXELS:,}: shrink it')


def resize(image: np.ndarray, size: int | tuple[int, int], method: str, antialias: bool) -> np.ndarray:
    """uint8 [H,W,3] → uint8 [size,size,3], or of (height, width); `method` is 'bilinear', 'bicubic' or 'area'.

    With antialias: Pillow's, as Hugging Face does. Without: samples at half-pixel centres in float32, truncated to
    uint8, as big_vision does. 'area' is the mean of what a pixel covers, in either case.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[:2] == (height, width):
        return image
    if method == 'area':
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if antialias:
        return np.asarray(Image.fromarray(image).resize((width, height), _PILLOW[method]))
    if method == 'bicubic':
        rows, columns = _cubic(image.shape[0], height), _cubic(image.shape[1], width)
        floats = np.einsum('hH,HWC,wW->hwC', rows, image.astype(np.float32), columns, optimize=True)
    else:
        floats = cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(floats, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=32)
def _cubic(size: int, new: int) -> np.ndarray:
    """float32 [new, size]: what each pixel weighs in each new one by Keys' cubic, a = −0.5 (OpenCV's has −0.75)."""
    centres = (np.arange(new) + 0.5) * size / new - 0.5
    x = np.abs(centres[:, None] - np.arange(size))
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def prepare(image: ImageLike, contract: Contract, where: str = 'image') -> np.ndarray:
    """Any picture as the model takes it: uint8 [image_size,image_size,3]. Raises UserError naming `where`."""
    return resize(read(image, where), contract.image_size, contract.resample, contract.antialias)


def read(image: ImageLike, where: str = 'image') -> np.ndarray:
    """`decode`, for a person: raises UserError naming `where`."""
    with told(image, where):
        return decode(image)


@contextlib.contextmanager
def told(image: object, where: str) -> Iterator[None]:
    """What decoding raises inside becomes a UserError naming `where`."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{where}: cannot read {image}: {error.strerror or error}') from error
    except ValueError as error:
        raise UserError(f'{where}: {error}') from error


def _is_plain_png(data: bytes) -> bool:
    """Complete, 8-bit RGB without interlace or orientation, and of a size that may be decoded."""
    if not data.startswith(_PNG_START) or not data.endswith(_PNG_END) or b'eXIf' in data:
        return False
    if len(data) < 29:  # no room for a header
        return False
    width, height, depth, color, _, _, interlace = struct.unpack('>IIBBBBB', data[16:29])
    return (depth, color, interlace) == (8, 2, 0) and 0 < width * height <= MAX_PIXELS


def _is_plain_jpeg(opened: Image.Image, data: bytes) -> bool:
    """Complete, RGB or grey, not to be turned, and of a size that may be decoded."""
    if opened.format != 'JPEG' or opened.mode not in ('RGB', 'L') or not data.endswith(_JPEG_END):
        return False
    return opened.getexif().get(ExifTags.Base.Orientation, 1) == 1 and opened.width * opened.height <= MAX_PIXELS


def _part(side: int, least: int) -> int:
    """The largest of 8, 4, 2 and 1 by which a side can be divided and keep `least` pixels."""
    return next((part for part in (8, 4, 2) if 0 < least * part <= side), 1)


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        raise ValueError(f'an image array must be uint8 in 0..255, not {array.dtype}')
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, -1)
    if array.ndim != 3 or array.shape[-1] not in (3, 4) or 0 in array.shape:
        raise ValueError(f'an image array must be [H,W], [H,W,1], [H,W,3] or [H,W,4], not {list(array.shape)}')
    return np.ascontiguousarray(array[..., :3])


def _from_pillow(image: Image.Image) -> np.ndarray:
    check_size(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):
        # Pillow's own conversion clips 16-bit grey at 255.
        grey = np.asarray(image).astype(np.float64) / 257
        return _from_array(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    return _from_array(np.array(image.convert('RGB')))
