"""Keys and values of the tokens seen so far. A token's slot is its own position; padding is never written.

A layer that sees a window of W tokens keeps the last W of each row, the token at position p in slot p mod W. A row's
first token has position 0 and each next one the position after, so `length`, the number of its tokens, tells which
slots of a layer are filled, ring or not.

Axes: B batch, T prompt, S slots, K kv heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LayerCache:
    """One layer's keys (already rotated) and values, each [B, S, K, H]; `ring`: slots are positions mod S."""

    k: jax.Array
    v: jax.Array
    ring: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class KVCache:
    """All layers, and how many real tokens each row holds: `length` int32 [B]. Safe to donate."""

    layers: tuple[LayerCache, ...]
    length: jax.Array


def empty(
    num_layers: int,
    batch: int,
    size: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    windows: Sequence[int] = (),
) -> KVCache:
    """A cache of `size` slots a row that holds nothing. Every layer has its own buffers, so it can be donated.

    `windows` has each layer's window, 0 for none; a layer whose window is below `size` is a ring of that many slots.
    """

    def layer(window):
        ring = 0 < window < size
        shape = (batch, window if ring else size, kv_heads, head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), ring)

    layers = tuple(layer(window) for window in windows or (0,) * num_layers)
    return KVCache(layers, jnp.zeros((batch,), jnp.int32))


def write_prefill(layer: LayerCache, k: jax.Array, v: jax.Array, position: jax.Array, real: jax.Array) -> LayerCache:
    """Writes a prompt's keys and values, each [B, T, K, H], to the slots that `position` int32 [B, T] names.

    `real` bool [B, T] is False for padding, which is not written. A position beyond the last slot is dropped; a ring
    takes each row's last S real tokens.
    """
    size = layer.k.shape[1]
    row = jnp.arange(k.shape[0])[:, None]
    if layer.ring:
        real = real & (position >= jnp.sum(real, axis=1, keepdims=True) - size)
        position = position % size
    slot = jnp.where(real, position, size)

    def put(cache, new):
        return cache.at[row, slot].set(new.astype(cache.dtype), mode='drop')

    return layer.replace(k=put(layer.k, k), v=put(layer.v, v))


def write_step(layer: LayerCache, k: jax.Array, v: jax.Array, length: jax.Array) -> LayerCache:
    """Writes one new token a row, k and v [B, 1, K, H], at position `length` int32 [B] of its row.

    A row that is full keeps what it has; in a ring the oldest token makes room.
    """
    row = jnp.arange(k.shape[0])
    slot = length % layer.k.shape[1] if layer.ring else length

    def put(cache, new):
        return cache.at[row, slot].set(new[:, 0].astype(cache.dtype), mode='drop', unique_indices=True)

    return layer.replace(k=put(layer.k, k), v=put(layer.v, v))


def visible(length: jax.Array, size: int) -> jax.Array:
    """Which of a layer's `size` slots hold a real token: bool [B, size], from `length` int32 [B].

    In a ring these are, once the newest token is written, the tokens of its window.
    """
    return jnp.arange(size, dtype=jnp.int32)[None, :] < length[:, None]
