"""Learning rates that fall from the last layer to the first (ULMFiT, arXiv 1801.06146, section 3.2; BEiT, 2106.08254).

The layers of a tower are stacked: their rates are a vector along the first axis.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from big_vlm.config import UserError

_STACK = re.compile(r'(.*?)(?:Transformer/encoderblock|Encoder_0/encoderblock|layers)/.*')
_BELOW = re.compile(r'(embedding/.*|embedding|pos_embedding|cls|Embed_\d+/embedding|embedder/.*)')


def factors(decays: Mapping[str, float], shapes: Any, where: str) -> dict[str, np.ndarray]:
    """Path → what multiplies the learning rate of a parameter, broadcastable to it; those of factor 1 are left out.

    With decay d, layer i of L has d^(L-i), what comes before the layers (embeddings) d^(L+1), what comes after them 1.

    Args:
      decays: path → d.
      shapes: pytree of arrays or ShapeDtypeStructs.
      where: the optimizer's dotted key, for errors.

    Raises:
      UserError: a d of 0 or above 1, or a parameter of no tower with stacked layers.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    towers = {found[1]: leaves[path].shape[0] for path in leaves if (found := _STACK.fullmatch(path))}
    result = {}
    for path, decay in decays.items():
        if decay == 1:
            continue
        if not 0 < decay < 1:
            raise UserError(f'{where}.rules: layer_decay {decay} of {path}: must be above 0 and at most 1')
        tower = max((tower for tower in towers if path.startswith(tower)), key=len, default=None)
        if tower is None:
            raise UserError(f'{where}.rules: layer_decay of {path}: it belongs to no stack of layers')
        depth = towers[tower]
        if _STACK.fullmatch(path):
            rates = decay ** np.arange(depth, 0, -1, dtype=np.float32)
            result[path] = rates.reshape(-1, *[1] * (len(leaves[path].shape) - 1))
        elif _BELOW.fullmatch(path.removeprefix(tower)):
            result[path] = np.float32(decay ** (depth + 1))
    return result
