"""The TPU compiler without a TPU: `jax[tpu]` compiles for a described topology, and tells memory and schedule."""

import importlib.util
from typing import Any

TOPOLOGY = 'v5e:2x4'


def devices() -> list[Any]:
    """The eight chips of a described, absent TPU v5e; to be called before jax starts. Empty without a TPU compiler."""
    if importlib.util.find_spec('libtpu') is None:
        return []
    from big_vlm.checks import topologies

    return topologies.describe(TOPOLOGY).devices


def compile_loss(loss: str, form: str, batch: int, width: int, tile: int, devices: list[Any]) -> Any:
    """The compiled loss with its gradients by embeddings and scalars, bfloat16 embeddings sharded over all devices.

    Args:
      loss: 'sigmoid' or 'softmax'.
      form: 'dense' or 'ring'.
      batch, width: of the embeddings.
      tile: images of a tile; 0: the default.
      devices: real or described.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from big_vlm.ops import contrastive

    grid = np.array(devices).reshape(len(devices), 1, 1)
    mesh = Mesh(grid, ('data', 'fsdp', 'model'), axis_types=(AxisType.Auto,) * 3)
    rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((('data', 'fsdp'),), ()))
    z = jax.ShapeDtypeStruct((batch, width), jnp.bfloat16, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    function, args = (
        (contrastive.sigmoid_loss, (z, z, scalar, scalar))
        if loss == 'sigmoid'
        else (contrastive.softmax_loss, (z, z, scalar))
    )
    gradients = jax.value_and_grad(
        lambda *args: function(*args, form=form, mesh=mesh, tile=tile), argnums=tuple(range(len(args)))
    )
    outputs = whole, (rows, rows, *(whole,) * (len(args) - 2))
    return jax.jit(gradients, out_shardings=outputs).lower(*args).compile()
