"""A walk around a ring of devices that brings every image together with every text.

Each device keeps its own images; the texts travel, a device's whole chunk at a time. What a pair contributes to its
image stays, what it contributes to its text travels behind the text and arrives home with it. A device holds the pairs
of one tile of images and one chunk of texts at a time, so memory grows with the batch per device, never with the batch.

Every transfer runs beside a matrix product: the next chunk of texts is requested before the current one is used, what
follows a text lags one hop behind it, and half of a device's own pairs wait until the end, when the last transfer home
needs company. One direction is enough where a hop computes longer than it transfers: with gradients, 6·b²·E FLOPs
against 6·b·E bytes in bfloat16, whence b ≥ FLOP/s ÷ link bytes/s (4,400 on TPU v5e, some 2,200 on NVLink).

Letters: b images and texts per device.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def size(mesh: Mesh, axes: Sequence[str]) -> int:
    """Devices of the ring that walks `axes` of the mesh."""
    return math.prod(mesh.shape[axis] for axis in axes)


def walk(
    visit: Callable[[Any, Any, jax.Array | None], tuple[Any, Any]],
    merge: Callable[[Any, Any], Any],
    images: Any,
    texts: Any,
    start: tuple[Any, Any],
    *,
    axes: tuple[str, ...],
    devices: int,
    tile: int,
) -> tuple[Any, Any]:
    """What all pairs contribute to this device's images and to its texts. Call it inside a `jax.shard_map`.

    Args:
      visit: (tile of images, chunk of texts, first) → (contribution to each image [R, …], to each text [b, …]).
        `first` is None where the pairs are all negatives, else the text that image 0 of the tile belongs to.
      merge: joins two contributions; associative and commutative.
      images, texts: pytrees of [b, …], this device's own.
      start: (for the images, for the texts): the neutral elements of `merge`, [b, …].
      axes: mesh axes that form the ring.
      devices: their number.
      tile: images that are visited at once; it need not divide b.

    Returns:
      (for the images, for the texts), like `start`.
    """
    # What a device adds up is its own, and a loop's carry has to say so from the start.
    kept, nothing = jax.lax.pcast(start, axes, to='varying')
    rows = jax.tree.leaves(images)[0].shape[0]

    def fold(kept, texts, begin, end, home):
        """Visits the images from `begin` to `end`. → (kept with them merged in, contribution to the texts)."""

        def step(count, offset, sums):
            kept, carried = sums
            part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, offset, count), (images, kept))
            of_images, of_texts = visit(part[0], texts, offset if home else None)
            of_images = merge(part[1], of_images)
            # In place: a tile's rows are read once and written once, and no second buffer is needed.
            kept = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, offset, 0), kept, of_images)
            return kept, merge(carried, of_texts)

        sums, tiles = (kept, nothing), (end - begin) // tile
        if tiles:
            sums = jax.lax.fori_loop(0, tiles, lambda i, sums: step(tile, begin + i * tile, sums), sums)
        rest = (end - begin) % tile
        return step(rest, end - rest, sums) if rest else sums

    if devices == 1:
        return fold(kept, texts, 0, rows, True)

    def transfer(x):
        return jax.lax.ppermute(x, axes, [(i, (i + 1) % devices) for i in range(devices)])

    def send(tree):
        together = functools.partial(_as_one_array, transfer)
        return jax.lax.platform_dependent(tree, cpu=together, default=functools.partial(jax.tree.map, transfer))

    def hop(_, state):
        # What the last hop requests nobody uses. It travels beside products; a last hop of its own would be compiled,
        # and its buffers held, a second time.
        current, kept, carried = state
        following, arrived = send((current, carried))
        kept, carried = fold(kept, current, 0, rows, False)
        return following, kept, merge(arrived, carried)

    half = rows // tile // 2 * tile or rows // 2
    following = send(texts)
    kept, carried = fold(kept, texts, 0, half, True)
    _, kept, carried = jax.lax.fori_loop(1, devices, hop, (following, kept, carried))
    arrived = send(carried)
    kept, carried = fold(kept, texts, half, rows, True)
    return kept, merge(arrived, carried)


def add(x: Any, y: Any) -> Any:
    """The `merge` of sums."""
    return jax.tree.map(jnp.add, x, y)


def _as_one_array(transfer: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """`jax.tree.map(transfer, tree)` with all leaves in one transfer, as bytes.

    An XLA program for CPUs that comes out of jax's persistent compilation cache has lost the order of its transfers:
    two that do not wait for each other take each other's data, or hang (jaxlib 0.10.2).
    """
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        return tree
    raw = [jax.lax.bitcast_convert_type(x, jnp.uint8) for x in leaves]
    ends = itertools.accumulate(x.size for x in raw)
    parts = jnp.split(transfer(jnp.concatenate([x.ravel() for x in raw])), list(ends)[:-1])
    parts = [part.reshape(x.shape) for part, x in zip(parts, raw, strict=True)]
    parts = [jax.lax.bitcast_convert_type(part, x.dtype) for part, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, parts)
