"""Pictures in: decoded and resized to 224 px with antialiasing, per core, beside Pillow."""

import argparse
import io
from typing import Any

from tools import command

EXPLAIN = """`decode | resize` gives Pillow's pixels, `decode_resize` nearly; how nearly is told in grey levels before
the times. The pictures are JPEGs of scikit-learn's two photographs, side by side until they fill 500×375 or 1920×1080.
CPU time of all threads is counted, so that other programs are not. For all sides glibc keeps its pages, as in training.
`decoding` is what `decode_resize` takes for that alone, at half size where it may.

examples:
  python -m tools.bench.input
  python -m tools.bench.input --height=1080 --method=bilinear --quality=75
"""

SIZE = 224
WIDTHS = {375: 500, 1080: 1920}
METHODS = ('bicubic', 'bilinear')


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('bench.input', __doc__, EXPLAIN)
    result.add_argument('--height', type=int, choices=tuple(WIDTHS), action='append', help='(default: both)')
    result.add_argument('--method', choices=METHODS, action='append', help='(default: both)')
    result.add_argument('--quality', type=int, default=90, metavar='Q', help='of the JPEGs, 1 to 100 (default: 90)')
    result.add_argument('--rounds', type=int, default=15, metavar='N', help='(default: 15)')
    return result


def photographs(height: int, width: int, quality: int) -> list[bytes]:
    """Four JPEGs, mosaics of the two photographs at their own resolution."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos, encoded = load_sample_images().images, []
    for turn in range(4):
        row = np.concatenate([photos[(turn + n) % 2][:, :: 1 - 2 * (n % 2)] for n in range(4)], axis=1)
        rows = [np.roll(row, 320 * n + 160 * turn, axis=1) for n in range(-(-height // len(row)))]
        data = io.BytesIO()
        Image.fromarray(np.concatenate(rows)[:height, :width]).save(data, 'JPEG', quality=quality)
        encoded.append(data.getvalue())
    return encoded


def pillow(data: bytes, method: str) -> Any:
    """uint8 [SIZE,SIZE,3], as anyone writes it."""
    import numpy as np
    from PIL import Image

    resample = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}[method]
    with Image.open(io.BytesIO(data)) as opened:
        return np.asarray(opened.convert('RGB').resize((SIZE, SIZE), resample))


def compare(height: int, method: str, quality: int, count: int) -> None:
    """One table, and its line of JSON."""
    import numpy as np

    from big_vlm.data import antialias, images
    from tools.bench import interleaved

    def exact(one: bytes) -> np.ndarray:
        return images.resize(images.decode(one), SIZE, method, True)

    def fast(one: bytes) -> np.ndarray:
        return antialias.resize(images.decode(one, least=2 * SIZE), SIZE, method)

    data = photographs(height, WIDTHS[height], quality)
    about = {'pictures': f'{len(data)} of {WIDTHS[height]}×{height}', 'quality': quality, 'method': method}
    for name, ours in (('decode | resize', exact), ('decode_resize', fast)):
        apart = np.abs(np.stack([pillow(one, method).astype(int) - ours(one) for one in data]))
        about |= {f'{name} off by': round(float(apart.mean()), 3), f'{name} at most': int(apart.max())}
    sides = {
        'Pillow': lambda: [pillow(one, method) for one in data],
        'Pillow again': lambda: [pillow(one, method) for one in data],
        'decode | resize': lambda: [exact(one) for one in data],
        'decode_resize': lambda: [fast(one) for one in data],
        'decoding': lambda: [images.decode(one, least=2 * SIZE) for one in data],
    }
    times = interleaved.both_clocks(sides, count)
    pairs = [('Pillow', name) for name in sides if name != 'Pillow']
    interleaved.report('input', about, times, pairs, ('pillow', 'simplejpeg', 'opencv-python-headless', 'numpy'))


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    import cv2

    from big_vlm.main import keep_memory

    cv2.setNumThreads(1)
    keep_memory()
    for height in args.height or WIDTHS:
        for method in args.method or METHODS:
            compare(height, method, args.quality, args.rounds)


if __name__ == '__main__':
    main()
