"""Running statistics of a BatchNorm beside the parameters: what training updates and evaluation normalises with."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

_COLLECTION = 'batch_stats'


def init(module: nn.Module, rng: jax.Array, *inputs: Any) -> tuple[dict, dict]:
    """Fresh (params, stats); stats are {} without BatchNorm."""
    variables = module.init(rng, *inputs)
    return variables['params'], variables.get(_COLLECTION, {})


def apply(
    module: nn.Module, params: dict, stats: dict | None, *inputs: Any, train: bool, rngs: dict | None
) -> tuple[jax.Array, dict]:
    """`module`'s (x, out). In training with `stats`, `out['stats']` has those after this batch if there are any.

    `stats` None: they are among `params`, as in a bundle's weights; then `train` must be False if there are any.
    """
    updates = train and stats is not None
    # What a collection holds beyond what the module asks for does no harm.
    variables = {'params': params, _COLLECTION: params if stats is None else stats}
    if not updates:
        return module.apply(variables, *inputs, train=train, rngs=rngs)
    (x, out), new = module.apply(variables, *inputs, train=train, rngs=rngs, mutable=[_COLLECTION])
    return x, out | ({'stats': new[_COLLECTION]} if new.get(_COLLECTION) else {})
