"""The trained mask VQ-VAE as an `.npz` under the published names."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np

from big_vlm.checkpoints import trees
from big_vlm.config import whole_file
from big_vlm.data import mask_codes


def to_published(weights: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Parameters and codebook under our names, nested → published name → array."""
    return {_published(path): _turned(path, leaf) for path, leaf in trees.flat(weights).items()}


def write(path: str | os.PathLike, weights: Mapping[str, object]) -> None:
    """Writes parameters and codebook as an .npz that `mask_codes.read` and big_vision read; whole or not at all."""
    path = pathlib.Path(path)
    published = to_published(weights)
    mask_codes.check(published, str(path))
    with whole_file.writing(path) as part, open(part, 'wb') as stream:
        np.savez(stream, **published)


def _published(path: str) -> str:
    part, _, rest = path.partition('/')
    if part == 'codebook':
        return f'_vq_vae._{rest}'
    layer, _, kind = rest.partition('/')
    return f'{part}.{layer.replace("_", ".")}.{"weight" if kind == "kernel" else kind}'


def _turned(path: str, leaf: object) -> np.ndarray:
    """Of a kernel, Flax's [k,k,in,out], [k,k,out,in] of a transposed one: torch's."""
    array = np.asarray(leaf)
    return array.transpose(3, 2, 0, 1) if path.endswith('/kernel') else array
