"""Digit scenes: real handwriting composed into coloured scenes with exact ground truth. No download, no TensorFlow.

The 1,797 scanned digits of scikit-learn (8×8 grey levels, UCI optical recognition) are split by source digit, about
70/15/15 % per class, so no scan is ever seen in two splits. A scene draws one to four of them, each with a mild affine,
thickness and intensity change, in one of eight colours. Some colour-digit pairs are held out: validation and test each
keep their own, and training meets neither, so a score on `held_out` scenes measures new combinations.

    cells   48×48, one (80 %) or two digits in a 3×3 grid of 16 px cells, nearly plain dark ground
    free    64×64, one to four digits of 12 to 20 px anywhere, plain or textured ground

Scene `index` of a split is a pure function of (layout, split, index). The `_tiny` configs are the first few of theirs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import tensorflow_datasets as tfds

from big_vlm.data.builders import scene_language as language

LAYOUTS = ('cells', 'free')
SPLITS = ('train', 'validation', 'test')
INK = {
    'red': (235, 40, 40),
    'green': (40, 190, 60),
    'blue': (50, 90, 255),
    'yellow': (245, 230, 50),
    'magenta': (230, 60, 220),
    'cyan': (50, 220, 230),
    'orange': (255, 135, 15),
    'white': (245, 245, 245),
}
# One digit per colour is new at test time, one for every second colour at validation time.
HELD_OUT = {
    'train': (),
    'validation': (('red', 1), ('blue', 4), ('magenta', 8), ('orange', 3)),
    'test': tuple(zip(INK, (7, 2, 9, 0, 5, 6, 8, 4), strict=True)),
}
_HELD_OUT_SHARE = 0.2  # of the scenes of validation and test
_CELL = 16
_FREE_COUNTS = (0.3, 0.6, 0.8, 1.0)  # cumulative shares of one to four digits
# Rotation (radians), shear, height, width, and the grey level where the stroke ends: its thickness.
_DRAW_FROM, _DRAW_TO = (-0.14, -0.12, 0.92, 0.92, 0.36), (0.14, 0.12, 1.0, 1.0, 0.52)
_CLEAR_OF_LINES = 2.0  # px between a free digit's centre and the lines of the 3×3 division


def source_digits(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scans of one split: (images float32 [N,8,8] in 0..1, labels int64 [N], indices into load_digits [N])."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(1797)
    chosen = []
    for label in range(10):
        indices = rng.permutation(np.flatnonzero(digits.target == label))
        ends = np.round(np.array([0.7, 0.85]) * len(indices)).astype(int)
        chosen.append(np.split(indices, ends)[SPLITS.index(split)])
    indices = np.sort(np.concatenate(chosen))
    return (digits.images[indices] / 16).astype(np.float32), digits.target[indices], indices


class Scenes:
    """Draws the scenes of one split. `scenes[index]` is a dict in the builder's feature format, images as PNG bytes."""

    def __init__(self, layout: str, split: str):
        self.layout, self.split = layout, split
        self.size = 48 if layout == 'cells' else 64
        images, labels, indices = source_digits(split)
        self._images = [np.ascontiguousarray(images[labels == d]) for d in range(10)]
        self._indices = [indices[labels == d] for d in range(10)]
        every = {pair for pairs in HELD_OUT.values() for pair in pairs}
        self._common = [(color, d) for color in INK for d in range(10) if (color, d) not in every]
        self._held_out = list(HELD_OUT[split])
        self._seed = (2026, LAYOUTS.index(layout), SPLITS.index(split))

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((*self._seed, index))
        if self.layout == 'cells':
            count, textured, places = 1 + int(rng.random() >= 0.8), False, _places_in_cells
        else:
            count = 1 + int(np.searchsorted(_FREE_COUNTS, rng.random()))
            textured, places = rng.random() < 0.5, _places_anywhere
        pairs = [self._common[i] for i in rng.integers(len(self._common), size=count)]
        held_out = bool(self._held_out) and rng.random() < _HELD_OUT_SHARE
        if held_out:
            pairs[0] = self._held_out[rng.integers(len(self._held_out))]
        things = list(zip(pairs, places(rng, self.size, count), strict=True))
        things.sort(key=lambda thing: language.reading_key(*thing[1][:2], self.size))

        image = _ground(rng, self.size, textured)
        instances = np.zeros((self.size, self.size), np.uint8)
        objects = []
        for number, ((color, digit), (y, x, side)) in enumerate(things, start=1):
            choice = rng.integers(len(self._images[digit]))
            alpha, top, left = _draw(rng, self._images[digit][choice], self.size, y, x, side)
            window = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
            ink = np.array(INK[color], np.float32) * np.float32(rng.uniform(0.88, 1.0))
            image[window] += alpha[..., None] * (ink - image[window])
            mask = alpha >= 0.5
            instances[window][mask] = number
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            bbox = (top + ys[0], left + xs[0], top + ys[-1] + 1, left + xs[-1] + 1)
            objects.append({
                'digit': digit,
                'color': color,
                'place': language.place(y, x, self.size),
                'bbox': np.array(bbox, np.float32) / self.size,
                'source': self._indices[digit][choice],
            })
        return {
            'id': f'{self.layout}-{self.split}-{index}',
            'image': _png(np.rint(image).astype(np.uint8)[..., ::-1]),
            'instances': _png(instances),
            'caption': language.caption(objects),
            'reading': language.reading(objects),
            'num_digits': count,
            'held_out': held_out,
            'objects': objects,
            'questions': language.questions(objects, rng, list(INK)),
        }


def _png(image: np.ndarray) -> bytes:
    # Measured on these scenes: no row filter is both faster and smaller than cv2's default.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    return cv2.imencode('.png', image, options)[1].tobytes()


def _places_in_cells(rng: np.random.Generator, size: int, count: int) -> list[tuple[float, float, float]]:
    """(centre y, centre x, side) of distinct cells; the jitter keeps the digit inside its cell."""
    cells = rng.choice(9, size=count, replace=False)
    placed = []
    for cell in cells:
        dy, dx = rng.uniform(-0.7, 0.7, 2)
        y, x = divmod(int(cell), 3)
        placed.append(((y + 0.5) * _CELL + dy, (x + 0.5) * _CELL + dx, rng.uniform(13.5, 15.0)))
    return placed


def _places_anywhere(rng: np.random.Generator, size: int, count: int) -> list[tuple[float, float, float]]:
    """(centre y, centre x, side) of squares that do not touch, clear of the lines that decide the place words.

    Two digits of one row of the 3×3 division lie more beside than above each other, so reading order is plain to see.
    """
    lines = np.array([size / 3, 2 * size / 3])
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(40):
            side = rng.uniform(12, 20)
            y, x = rng.uniform(side / 2, size - side / 2, 2)
            if np.abs(lines - y).min() < _CLEAR_OF_LINES or np.abs(lines - x).min() < _CLEAR_OF_LINES:
                continue
            row = language.row_and_column(y, x, size)[0]
            if all(
                max(abs(y - v), abs(x - u)) > (side + other) / 2 + 1
                and (row != language.row_and_column(v, u, size)[0] or abs(x - u) >= abs(y - v))
                for v, u, other in placed
            ):
                placed.append((y, x, side))
            if len(placed) == count:
                return placed


def _draw(rng: np.random.Generator, scan: np.ndarray, size: int, y: float, x: float, side: float) -> tuple:
    """One scan enlarged bicubically with a mild rotation, shear and change of stroke.

    Returns coverage float32 [h,w] in 0..1 and the (top, left) pixel of that window in an image of `size`.
    """
    angle, shear, tall, wide, edge = rng.uniform(_DRAW_FROM, _DRAW_TO)
    cos, sin = math.cos(angle), math.sin(angle)
    tall, wide = tall * side / 8, wide * side / 8
    linear = np.array([[cos * wide, (cos * shear - sin) * tall], [sin * wide, (sin * shear + cos) * tall]])
    reach = side / 2 + 3
    top, left = max(int(y - reach), 0), max(int(x - reach), 0)
    height, width = min(int(y + reach) + 1, size) - top, min(int(x + reach) + 1, size) - left
    # cv2 puts pixel centres at whole numbers: the centre of the scan is 3.5, that of the digit half a pixel less.
    offset = np.array([x - 0.5 - left, y - 0.5 - top]) - linear @ (3.5, 3.5)
    matrix = np.concatenate([linear, offset[:, None]], 1)
    big = cv2.warpAffine(scan, matrix, (width, height), flags=cv2.INTER_CUBIC)
    return np.clip((big - np.float32(edge)) * np.float32(2.5) + np.float32(0.5), 0, 1), top, left


def _ground(rng: np.random.Generator, size: int, textured: bool) -> np.ndarray:
    """A dark ground, float32 [size,size,3]."""
    shade = (rng.uniform(14, 45) + rng.uniform(-8, 8, 3)).astype(np.float32)
    # Grain of 2×2 px: single pixels of noise would be most of the file and of the time it takes to compress.
    grain = rng.standard_normal((size // 2, size // 2), np.float32) * np.float32(rng.uniform(0.8, 2.5))
    ground = shade + grain.repeat(2, 0).repeat(2, 1)[..., None]
    if textured:
        amplitude = rng.uniform(10, 28)
        kind = rng.integers(4)
        ys, xs = np.mgrid[:size, :size].astype(np.float32)
        direction = rng.uniform(0, np.pi)
        along = xs * np.cos(direction) + ys * np.sin(direction)
        if kind == 0:  # a slope
            pattern = along / size - 0.5
        elif kind == 1:  # stripes
            pattern = np.sin(along * 2 * np.pi / rng.uniform(5, 14))
        elif kind == 2:  # checks
            period = rng.uniform(4, 9)
            pattern = ((ys // period + xs // period) % 2) - 0.5
        else:  # clouds
            pattern = cv2.resize(rng.standard_normal((7, 7), np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        ground += (amplitude * pattern).astype(np.float32)[..., None] * rng.uniform(0.5, 1, 3).astype(np.float32)
    return np.maximum(ground, 0, out=ground)


@dataclasses.dataclass(eq=False)
class DigitScenesConfig(tfds.core.BuilderConfig):
    """`layout` is 'cells' or 'free'; the three numbers are the scenes per split."""

    layout: str = 'cells'
    train: int = 24_000
    validation: int = 1_000
    test: int = 2_000


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """Coloured scenes of real handwritten digits with captions, questions, boxes and masks."""

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [
        DigitScenesConfig(name='cells', description='48 px, one or two digits in a 3×3 grid', layout='cells'),
        DigitScenesConfig(name='free', description='64 px, one to four digits anywhere', layout='free', train=60_000),
        DigitScenesConfig(name='cells_tiny', description='the first of cells', train=96, validation=32, test=32),
        DigitScenesConfig(
            name='free_tiny', description='the first of free', layout='free', train=96, validation=32, test=32
        ),
    ]

    on_scene: Callable[[], object] | None = None  # called after every scene, for a progress bar

    def scenes_per_split(self) -> dict[str, int]:
        return {split: getattr(self.builder_config, split) for split in SPLITS}

    def _info(self) -> tfds.core.DatasetInfo:
        side = 48 if self.builder_config.layout == 'cells' else 64
        features = tfds.features.FeaturesDict({
            'id': tfds.features.Text(),
            'image': tfds.features.Image(shape=(side, side, 3), encoding_format='png'),
            # Pixel value n marks the ink of object n (from 1, in the order of `objects`), 0 the ground.
            'instances': tfds.features.Image(shape=(side, side, 1), encoding_format='png'),
            'caption': tfds.features.Text(),
            'reading': tfds.features.Text(),
            'num_digits': np.int32,
            'held_out': np.bool_,
            # Columns of one length, objects in reading order. A Sequence of Text takes three times as long to write.
            'objects': {
                'digit': tfds.features.Tensor(shape=(None,), dtype=np.int32),
                'color': tfds.features.Tensor(shape=(None,), dtype=np.str_),
                'place': tfds.features.Tensor(shape=(None,), dtype=np.str_),
                # ymin, xmin, ymax, xmax of the ink, in 0..1.
                'bbox': tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
                # Index of the scan in scikit-learn's load_digits.
                'source': tfds.features.Tensor(shape=(None,), dtype=np.int32),
            },
            'questions': {
                'question': tfds.features.Tensor(shape=(None,), dtype=np.str_),
                'answer': tfds.features.Tensor(shape=(None,), dtype=np.str_),
                'kind': tfds.features.Tensor(shape=(None,), dtype=np.str_),
            },
        })
        return self.dataset_info_from_configs(
            features=features,
            homepage='https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits',
            # Scenes are drawn at random already, and the loader shuffles: sorting them here would only cost time.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        scenes = Scenes(self.builder_config.layout, split)
        for index in range(self.scenes_per_split()[split]):
            scene = scenes[index]
            for key in ('objects', 'questions'):
                scene[key] = {name: [row[name] for row in scene[key]] for name in scene[key][0]}
            yield index, scene
            if self.on_scene:
                self.on_scene()
