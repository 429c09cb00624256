"""Everything that a training run must remember."""

from typing import Any

import jax
from flax import struct

from big_vlm.checkpoints import trees


@struct.dataclass
class TrainState:
    """A pytree; saved and restored whole.

    Random keys are `fold_in(seed, step)` and the data position is `step`, so neither is stored.
    """

    step: jax.Array  # int32 [], global batches consumed
    params: Any  # nested dicts of float arrays
    stats: Any  # nested dicts; {} without BatchNorm or codebooks
    opt_state: Any  # optax
    ema: Any = None  # nested dicts of the averages of what is trained, or None

    @property
    def averaged(self) -> Any:
        """The parameters, with averages in the place of those that have one: what is frozen is its own."""
        return trees.like(self.params, trees.flat(self.params) | trees.flat(self.ema))
