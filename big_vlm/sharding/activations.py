"""Where activations live: on the devices that hold their rows of the batch."""

import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from big_vlm.sharding.mesh import BATCH_AXES


def by_rows(x: jax.Array) -> jax.Array:
    """`x` [B, ...], of which each device is to hold its rows of the batch; other dimensions are split as XLA likes.

    Said at the entry of every layer: with weights split along fsdp, XLA otherwise follows the weights as well as the
    batch, holds other rows too and sends them around (measured: six times the memory in a scan of four layers of S/8,
    and all-to-all transfers in each). Without a mesh (`jax.set_mesh`), or where B does not divide, `x` as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names) or set(mesh.axis_types) != {AxisType.Auto}:
        return x
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if parts == 1 or x.shape[0] % parts:
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES, *[P.UNCONSTRAINED] * (x.ndim - 1)))
