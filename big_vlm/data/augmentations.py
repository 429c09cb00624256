"""Operations on decoded pictures: other sizes and crops, and what training changes at random.

An example may carry `objects` with a column `bbox`, edges y1 x1 y2 x2 in parts of the picture, and masks: whatever
moves pixels moves these too. Parts of boxes that a crop leaves out stay in the column, beyond 0..1, and `detect` cuts
them off. What is random happens in training only; an evaluation gets the picture as it is, or its middle.

Crops, flip_lr and shuffle_channels take several pictures of one size too, such as a video's frames, and do the same to
all; the others take one.
"""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from big_vlm.config import UserError
from big_vlm.data import fields, images, objects

if TYPE_CHECKING:
    from big_vlm.data.transforms import Context

Example = dict[str, Any]
Method = Literal['', 'bilinear', 'bicubic', 'area']
_RED = (255, 0, 0)
_GREY = (128, 128, 128)  # what comes in from beyond the edges
_LEVELS = 10  # RandAugment's magnitudes
_TRIES = 10


def resize_small(example: Example, context: 'Context', size: Annotated[int, 1], method: Method = '') -> None:
    """The shorter side to `size`, at the same aspect ratio; '' is the contract's method, big_vision's was 'area'."""
    _scale(example, context, size, min, method, 'resize_small')


def resize_long(example: Example, context: 'Context', size: Annotated[int, 1], method: Method = '') -> None:
    """The longer side to `size`, at the same aspect ratio."""
    _scale(example, context, size, max, method, 'resize_long')


def central_crop(example: Example, context: 'Context', size: Annotated[int, 0] = 0) -> None:
    """The middle, size × size; 0: the largest square."""
    example['image'] = fields.alike(example, 'central_crop')
    height, width = example['image'].shape[-3:-1]
    size = size or min(height, width)
    _must_hold(height, width, size)
    _crop(example, (height - size) // 2, (width - size) // 2, size, size)


def random_crop(example: Example, context: 'Context', size: Annotated[int, 1]) -> None:
    """size × size from a random place; in evaluation from the middle."""
    example['image'] = fields.alike(example, 'random_crop')
    height, width = example['image'].shape[-3:-1]
    _must_hold(height, width, size)
    if not context.train:
        return central_crop(example, context, size)
    top, left = context.rng.integers(height - size + 1), context.rng.integers(width - size + 1)
    _crop(example, int(top), int(left), size, size)


def inception_crop(
    example: Example, context: 'Context', size: Annotated[int, 1], area_min: int = 5, area_max: int = 100
) -> None:
    """A random part of area_min to area_max % of the picture, of aspect 3/4 to 4/3, resized to size × size.

    Szegedy et al. 2015 (arXiv 1409.4842, section 6). In evaluation the whole picture is resized.
    """
    if not 0 < area_min <= area_max <= 100:
        raise UserError(f'inception_crop: area_min={area_min}, area_max={area_max} must be 0 < min ≤ max ≤ 100')
    example['image'] = fields.alike(example, 'inception_crop')
    height, width = example['image'].shape[-3:-1]
    if context.train:
        for _ in range(_TRIES):
            area = context.rng.uniform(area_min, area_max) / 100 * height * width
            aspect = context.rng.uniform(3 / 4, 4 / 3)
            h, w = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
            if 0 < h <= height and 0 < w <= width:
                top, left = context.rng.integers(height - h + 1), context.rng.integers(width - w + 1)
                _crop(example, int(top), int(left), h, w)
                break
    found, contract = example['image'], context.contract
    pictures = found if found.ndim == 4 else found[None]
    resized = np.stack([images.resize(one, size, contract.resample, contract.antialias) for one in pictures])
    example['image'] = resized.reshape(*found.shape[:-3], size, size, 3)


def flip_lr(example: Example, context: 'Context') -> None:
    """Left and right exchanged, half of the time. Texts that say left or right are not: leave them to other data."""
    if not context.train:
        return
    example['image'] = fields.alike(example, 'flip_lr')
    if context.rng.random() < 0.5:
        example['image'] = np.ascontiguousarray(example['image'][..., ::-1, :])
        _move(
            example,
            lambda boxes: np.stack([boxes[:, 0], 1 - boxes[:, 3], boxes[:, 2], 1 - boxes[:, 1]], axis=1),
            lambda masks: np.ascontiguousarray(masks[:, :, ::-1]),
        )


def shuffle_channels(example: Example, context: 'Context') -> None:
    """Red, green and blue in a random order, as for tasks whose answer does not depend on colour. Training only."""
    if context.train:
        order = context.rng.permutation(3)
        example['image'] = np.ascontiguousarray(fields.alike(example, 'shuffle_channels')[..., order])


def draw_boxes(example: Example, context: 'Context') -> None:
    """The example's boxes as red lines one pixel wide, where `tf.image.draw_bounding_boxes` draws them (WidgetCap)."""
    picture = fields.picture(example, 'draw_boxes').copy()
    last = np.array(picture.shape[:2] * 2) - 1
    boxes = np.asarray(fields.get(example, 'objects')['bbox'], np.float32).reshape(-1, 4)
    for y1, x1, y2, x2 in np.trunc(boxes * last.astype(np.float32)).astype(int).tolist():
        if y1 > y2 or x1 > x2:
            continue
        rows, columns = slice(max(y1, 0), max(y2, -1) + 1), slice(max(x1, 0), max(x2, -1) + 1)
        for y in {y1, y2} & set(range(picture.shape[0])):
            picture[y, columns] = _RED
        for x in {x1, x2} & set(range(picture.shape[1])):
            picture[rows, x] = _RED
    example['image'] = picture


def random_jpeg(example: Example, context: 'Context', probability: float) -> None:
    """With this probability, what JPEG at a quality of 75 to 95 leaves of the picture."""
    if not 0 <= probability <= 1:
        raise UserError(f'random_jpeg({probability:g}): a probability, from 0 to 1')
    if not context.train or context.rng.random() >= probability:
        return
    data = io.BytesIO()
    picture = Image.fromarray(fields.picture(example, 'random_jpeg'))
    picture.save(data, 'JPEG', quality=int(context.rng.integers(75, 96)))
    example['image'] = np.array(Image.open(data).convert('RGB'))


def randaugment(
    example: Example, context: 'Context', layers: Annotated[int, 1] = 2, magnitude: Annotated[int, 0] = 10
) -> None:
    """`layers` random changes of a strength of 0 to 10, one after another (Cubuk et al. 2020, arXiv 1909.13719).

    The sixteen changes and their scales are those of the TPU code that big_vision shares; grey comes in from the edges.
    """
    if magnitude > _LEVELS:
        raise UserError(f'randaugment: magnitude {magnitude} is more than {_LEVELS}')
    if not context.train:
        return
    picture, rng = Image.fromarray(fields.picture(example, 'randaugment')), context.rng
    names = tuple(_CHANGES)
    for _ in range(layers):
        name = names[rng.integers(len(names))]
        sign = 1 if rng.random() < 0.5 else -1
        changed = _CHANGES[name](picture, magnitude / _LEVELS, sign, rng)
        if isinstance(changed, tuple):  # an affine map of positions
            warped, matrix = _warp(picture, changed)
            _move(
                example,
                lambda boxes, matrix=matrix: _hulls(boxes, matrix),
                lambda masks, size=picture.size, by=changed: np.stack([_warp_mask(mask, size, by) for mask in masks]),
            )
            picture = warped
        else:
            picture = changed
    example['image'] = np.array(picture)


def _scale(example, context, size, side, method, operation):
    height, width = fields.picture(example, operation).shape[:2]
    scale = size / side(height, width)
    shape = max(round(height * scale), 1), max(round(width * scale), 1)
    if shape[0] * shape[1] > images.MAX_PIXELS:
        raise ValueError(f'{operation}({size}) of {height}×{width} pixels makes more than {images.MAX_PIXELS:,}')
    method = method or context.contract.resample
    example['image'] = images.resize(example['image'], shape, method, context.contract.antialias)


def _must_hold(height: int, width: int, size: int) -> None:
    if size > min(height, width):
        raise ValueError(f'a crop of {size} from {height}×{width} pixels: write resize_small({size}) first, or more')


def _crop(example: Example, top: int, left: int, height: int, width: int) -> None:
    picture = example['image']
    shape = picture.shape[-3:-1]
    whole = np.array(shape * 2, np.float64)
    example['image'] = np.ascontiguousarray(picture[..., top : top + height, left : left + width, :])
    offset, size = np.array([top, left] * 2), np.array([height, width] * 2)
    _move(
        example,
        lambda boxes: (boxes * whole - offset) / size,
        lambda masks: np.ascontiguousarray(objects.sized(masks, shape)[:, top : top + height, left : left + width]),
    )


def _move(
    example: Example, mapped: Callable[[np.ndarray], np.ndarray], of_masks: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Boxes [N,4] and masks [N,H,W] of the example, moved. The record's own columns stay as they are."""
    found = example.get('objects')
    if isinstance(found, dict) and len(found.get('bbox', ())):
        moved = {'bbox': mapped(np.asarray(found['bbox'], np.float64))}
        if isinstance(found.get('mask'), np.ndarray):
            moved['mask'] = of_masks(found['mask'])
        example['objects'] = found | moved


def _warp(picture: Image.Image, matrix: tuple[float, ...], fill: Any = _GREY) -> tuple[Image.Image, np.ndarray]:
    """The picture under a linear map about its centre, and the map of relative positions, [2,3].

    matrix: (a, b, c, d, e, f) takes a position (x, y) from the centre, in pixels, to (a·x + b·y + c, d·x + e·y + f).
    """
    linear, shift = np.array([matrix[:2], matrix[3:5]]), np.array([matrix[2], matrix[5]])
    size = np.array([picture.width, picture.height], np.float64)
    inverse = np.linalg.inv(linear)
    offset = size / 2 - inverse @ (size / 2 + shift)
    pulled = (*inverse[0], offset[0], *inverse[1], offset[1])
    picture = picture.transform(picture.size, Image.Transform.AFFINE, pulled, fillcolor=fill)
    relative = linear * size[None, :] / size[:, None]
    return picture, np.concatenate([relative, (0.5 - relative @ [0.5, 0.5] + shift / size)[:, None]], axis=1)


def _warp_mask(mask: np.ndarray, size: tuple[int, int], matrix: tuple[float, ...]) -> np.ndarray:
    """bool [H,W] of a picture of (width, height) `size`, under the map of `_warp`."""
    return np.asarray(_warp(Image.fromarray(objects.sized(mask[None], size[::-1])[0]), matrix, fill=0)[0])


def _hulls(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The upright boxes around what a map of (x, y) makes of boxes y1 x1 y2 x2."""
    y1, x1, y2, x2 = boxes.T
    corners = np.array([[x1, x2, x1, x2], [y1, y1, y2, y2]])  # [2,4,N]
    x, y = np.einsum('ij,jcn->icn', matrix[:, :2], corners) + matrix[:, 2:, None]
    return np.stack([y.min(axis=0), x.min(axis=0), y.max(axis=0), x.max(axis=0)], axis=1)


def _enhanced(kind: type) -> Callable[..., Image.Image]:
    return lambda picture, level, sign, rng: kind(picture).enhance(1.8 * level + 0.1)


def _rotated(picture, level, sign, rng):
    angle = np.deg2rad(30 * level * sign)
    return np.cos(angle), -np.sin(angle), 0.0, np.sin(angle), np.cos(angle), 0.0


def _cutout(picture, level, sign, rng):
    half = round(40 * level)
    pixels = np.array(picture)
    y, x = int(rng.integers(picture.height)), int(rng.integers(picture.width))
    pixels[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = _GREY
    return Image.fromarray(pixels)


def _solarize_add(picture, level, sign, rng):
    pixels = np.array(picture)
    return Image.fromarray(np.where(pixels < 128, pixels + np.uint8(110 * level), pixels))


# Each: (picture, level in 0..1, ±1, rng) → a picture, or the six numbers of `_warp`.
_CHANGES: dict[str, Callable[..., Any]] = {
    'autocontrast': lambda picture, level, sign, rng: ImageOps.autocontrast(picture),
    'equalize': lambda picture, level, sign, rng: ImageOps.equalize(picture),
    'invert': lambda picture, level, sign, rng: ImageOps.invert(picture),
    'posterize': lambda picture, level, sign, rng: ImageOps.posterize(picture, max(int(4 * level), 1)),
    'solarize': lambda picture, level, sign, rng: ImageOps.solarize(picture, int(256 * level)),
    'solarize_add': _solarize_add,
    'color': _enhanced(ImageEnhance.Color),
    'contrast': _enhanced(ImageEnhance.Contrast),
    'brightness': _enhanced(ImageEnhance.Brightness),
    'sharpness': _enhanced(ImageEnhance.Sharpness),
    'cutout': _cutout,
    'rotate': _rotated,
    'shear_x': lambda picture, level, sign, rng: (1.0, 0.3 * level * sign, 0.0, 0.0, 1.0, 0.0),
    'shear_y': lambda picture, level, sign, rng: (1.0, 0.0, 0.0, 0.3 * level * sign, 1.0, 0.0),
    'translate_x': lambda picture, level, sign, rng: (1.0, 0.0, 100 * level * sign, 0.0, 1.0, 0.0),
    'translate_y': lambda picture, level, sign, rng: (1.0, 0.0, 0.0, 0.0, 1.0, 100 * level * sign),
}

OPERATIONS = (
    resize_small, resize_long, central_crop, random_crop, inception_crop,
    flip_lr, shuffle_channels, draw_boxes, random_jpeg, randaugment,
)  # fmt: skip
