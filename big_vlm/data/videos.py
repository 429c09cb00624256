"""Videos as the frames that a model sees of them: some of all, as far apart as can be."""

import io
import tempfile

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from big_vlm.data import images, paths
from big_vlm.data.images import ImageLike

VideoLike = ImageLike | list[ImageLike] | tuple[ImageLike, ...]


def frames(video: VideoLike, count: int) -> list[np.ndarray]:
    """`count` frames uint8 [H,W,3] in RGB, or all if there are no more; each the middle one of an equal part.

    `video`: its frames, a list or uint8 [F,H,W,3]; a picture of several frames (GIF, WebP, APNG, TIFF); or a file that
    OpenCV reads (MP4, WebM, AVI). Of 8 frames, 4 are the frames 1, 3, 5 and 7, counted from 0. A picture is one frame.

    Raises ValueError for what is none of these or is cut short, but for a film that OpenCV reads as a shorter one;
    OSError for a file that cannot be read.
    """
    if isinstance(video, np.ndarray) and video.ndim == 4:
        video = list(video)
    if isinstance(video, list | tuple):
        return [images.decode(video[i]) for i in _spread(len(video), count)]
    if isinstance(video, np.ndarray | Image.Image):
        return [images.decode(video)]
    data = video if isinstance(video, bytes) else paths.read(video)
    try:
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as opened:
            images.check_size(opened)
            if opened.format == 'GIF' and not _has_end(data):
                raise ValueError(f'the GIF is cut short ({len(data)} bytes)')
            total = getattr(opened, 'n_frames', 1)
            if total > 1:
                return [_frame(opened, i) for i in _spread(total, count)]
    except (UnidentifiedImageError, Image.DecompressionBombError):
        total = 0
    except ValueError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file
        raise ValueError(f'cannot decode the frames ({len(data)} bytes): {error}') from error
    return [images.decode(data)] if total else _of_file(data, count)


def _spread(total: int, count: int) -> list[int]:
    if not total:
        raise ValueError('a video without frames')
    return [(2 * i + 1) * total // (2 * count) for i in range(count)] if total > count else list(range(total))


def _has_end(gif: bytes) -> bool:
    """Whether the file ends with its trailer. To Pillow one that is cut between two frames is one of fewer frames."""
    try:
        at = 13 + _colors(gif[10])
        while (kind := gif[at]) != ord(';'):
            if kind == ord('!'):  # an extension: its label
                at = _after_parts(gif, at + 2)
            elif kind == ord(','):  # a frame: place, colours, the size of a code
                at = _after_parts(gif, at + 11 + _colors(gif[at + 9]))
            else:  # as Pillow skips what it does not know
                at += 1
    except IndexError:
        return False
    return True


def _colors(flags: int) -> int:
    """Bytes of a table of colours, if there is one."""
    return 3 << (flags % 8 + 1) if flags & 0x80 else 0


def _after_parts(gif: bytes, at: int) -> int:
    """Each part begins with its length; 0 ends them."""
    while size := gif[at]:
        at += 1 + size
    return at + 1


def _frame(opened, i):
    opened.seek(i)
    return images.decode(opened.convert('RGB'))


def _of_file(data: bytes, count: int) -> list[np.ndarray]:
    """OpenCV takes names only."""
    with tempfile.NamedTemporaryFile(suffix='.video') as file:
        file.write(data)
        file.flush()
        video = cv2.VideoCapture(file.name)
        try:
            total = 0  # counted, as what a header says is often wrong
            while video.grab():
                total += 1
            if not total:
                raise ValueError(f'neither a picture nor a video in any known format ({len(data)} bytes)')
            video.release()
            video.open(file.name)
            chosen, found = set(_spread(total, count)), []
            for i in range(max(chosen) + 1):
                if video.grab() and i in chosen:
                    found.append(np.ascontiguousarray(video.retrieve()[1][..., ::-1]))
            return found
        finally:
            video.release()
