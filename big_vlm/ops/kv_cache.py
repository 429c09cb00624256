"""Keys and values of the tokens seen so far. A token's slot is its own position; padding is never written.

Axes: B batch, T prompt, S slots, K kv heads, H head dim.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LayerCache:
    """One layer's keys (already rotated) and values, each [B, S, K, H]."""

    k: jax.Array
    v: jax.Array


@flax.struct.dataclass
class KVCache:
    """All layers, and how many real tokens each row holds: `length` int32 [B]. Safe to donate."""

    layers: tuple[LayerCache, ...]
    length: jax.Array


def empty(num_layers: int, batch: int, size: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache:
    """A cache of `size` slots a row that holds nothing. Every layer has its own buffers, so it can be donated."""
    shape = (batch, size, kv_heads, head_dim)
    layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(num_layers))
    return KVCache(layers, jnp.zeros((batch,), jnp.int32))


def write_prefill(layer: LayerCache, k: jax.Array, v: jax.Array, position: jax.Array, real: jax.Array) -> LayerCache:
    """Writes a prompt's keys and values, each [B, T, K, H], to the slots that `position` int32 [B, T] names.

    `real` bool [B, T] is False for padding, which is not written. A position beyond the last slot is dropped.
    """
    size = layer.k.shape[1]
    row = jnp.arange(k.shape[0])[:, None]
    slot = jnp.where(real, position, size)

    def put(cache, new):
        return cache.at[row, slot].set(new.astype(cache.dtype), mode='drop')

    return LayerCache(put(layer.k, k), put(layer.v, v))


def write_step(layer: LayerCache, k: jax.Array, v: jax.Array, length: jax.Array) -> LayerCache:
    """Writes one new token a row, k and v [B, 1, K, H], to slot `length` int32 [B] of its row."""
    row = jnp.arange(k.shape[0])

    def put(cache, new):
        return cache.at[row, length].set(new[:, 0].astype(cache.dtype), mode='drop', unique_indices=True)

    return LayerCache(put(layer.k, k), put(layer.v, v))


def visible(length: jax.Array, size: int) -> jax.Array:
    """Which of `size` slots hold a real token: bool [B, size], from `length` int32 [B]."""
    return jnp.arange(size, dtype=jnp.int32)[None, :] < length[:, None]
