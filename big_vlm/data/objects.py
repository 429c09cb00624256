"""The objects of an example, columns of `objects`: names, boxes and masks.

Names are the column `label`, or `color` and `digit`; boxes are `bbox`, y1 x1 y2 x2 in parts of the picture. Masks are a
column `mask` of pictures as large as the picture, where whatever is not black is the object, or one picture `instances`
whose value n (of a palette, its index) is object n, from 1; `decoded_masks` makes arrays of them.
"""

from typing import Any

import cv2
import numpy as np

from big_vlm.config import UserError
from big_vlm.data import fields, images
from big_vlm.data.builders import scene_language

Example = dict[str, Any]


def names(objects: dict) -> list[str]:
    """What each is called. Raises ValueError for what is no list of texts."""
    if 'label' in objects:
        return fields.texts(objects['label'], 'objects/label')
    return [
        scene_language.name({'color': color, 'digit': int(digit)})
        for color, digit in zip(fields.texts(objects['color'], 'objects/color'), objects['digit'], strict=True)
    ]


def inside(objects: dict) -> tuple[list[str], np.ndarray]:
    """Names, and boxes float [N,4] cut at the picture's edge, of the objects of which something is left."""
    kept, boxes = _cut(objects)
    every = names(objects)
    return [every[i] for i in kept], boxes


def segments(example: Example, operation: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """`inside` and masks bool [N,H,W], of the objects that have a pixel. Raises UserError without `masks` before."""
    objects = fields.get(example, 'objects')
    if not isinstance(objects.get('mask'), np.ndarray):
        raise UserError(f'{operation} before masks: write decode | masks | … | {operation}(…)')
    kept, boxes = _cut(objects)
    every, masks = names(objects), objects['mask'][kept]
    seen = masks.any(axis=(1, 2))
    return [every[i] for i, there in zip(kept, seen, strict=True) if there], boxes[seen], masks[seen]


def decoded_masks(example: Example) -> np.ndarray:
    """bool [N,H,W], one for each box. Raises ValueError for none, another number of them, several sizes, or one whose
    sides are not as those of the picture, where that is decoded."""
    objects = fields.get(example, 'objects')
    count = len(objects['bbox'])
    if 'mask' in objects:
        masks = [images.levels(images.of_record(mask, 'objects/mask')) > 0 for mask in objects['mask']]
    elif 'instances' in example:
        numbers = images.levels(images.of_record(example['instances'], 'instances'), indices=True)
        masks = [numbers == i + 1 for i in range(count)]
    else:
        raise ValueError('masks: the record has neither objects/mask nor instances')
    if len(masks) != count:
        raise ValueError(f'{len(masks)} masks for {count} boxes')
    if len(sizes := sorted({mask.shape for mask in masks})) > 1:
        raise ValueError(f'masks of one picture have {" and ".join(f"{h}×{w}" for h, w in sizes)} pixels')
    if not masks:
        return np.zeros((0, 1, 1), bool)
    [shape] = sizes
    picture = example.get('decoded_size', shape)
    # Masks may be smaller or larger than their picture, and rounded then: by a pixel of the smaller.
    apart = abs(picture[0] * shape[1] - picture[1] * shape[0])
    if apart > max(sum(picture), sum(shape)) or picture != shape == picture[::-1]:
        raise ValueError(
            f'the masks have {shape[0]}×{shape[1]} pixels and the picture, turned as its EXIF data say, '
            f'{picture[0]}×{picture[1]}: masks have its aspect ratio'
        )
    return np.stack(masks)


def sized(masks: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """bool [N,H,W] → bool [N,*shape], the nearest pixel of each."""
    height, width = shape
    if masks.shape[1:] == shape:
        return masks
    resized = [
        cv2.resize(mask.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT) for mask in masks
    ]
    return np.array(resized, bool).reshape(len(masks), *shape)


def _cut(objects: dict) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the objects of which something is left, and their boxes float [N,4] cut at the picture's edge."""
    boxes = np.clip(np.asarray(objects['bbox'], np.float64).reshape(-1, 4), 0.0, 1.0)
    kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    return kept, boxes[kept]
