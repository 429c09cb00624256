"""Cross-entropy of the supervised tokens alone, a few at a time: the logits of all of them never exist.

Every device puts its supervised tokens first and takes `chunk` of them at a time to logits, loss and gradients, which
one walk gives together: of a sum over tokens, a token's gradient is known as soon as its logits are. So the work is
that of the supervised tokens, however many slots the rows have, and the memory that of one chunk's logits.

On several devices the tokens travel and the vocabulary stays: where the table is split, the devices that share it
gather their chunks, and each computes the logits of its own words. A chunk is far smaller than the table, or than its
gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from big_vlm.sharding.mesh import BATCH_AXES

TABLE = ('fsdp', 'model')  # mesh axes, in its order, that the table may be split over


@dataclasses.dataclass(frozen=True)
class _Settings:
    """`words`: mesh axes that the vocabulary is split over; `rows`: those that the tokens are."""

    softcap: float
    smoothing: float
    chunk: int
    words: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


def gathered_loss(
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    softcap: float = 0.0,
    smoothing: float = 0.0,
    chunk: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """Sum of weight times divergence over the tokens, of the logits softcap(x tableᵀ).

    `token_loss.token_loss` with the weights of `token_loss.weights`, the same to rounding, gradients too. Call it under
    `jax.jit`; the mesh is that of the surrounding `jax.set_mesh`.

    Args:
      x: float [B, T, D].
      table: [V, D], cast to the dtype of `x`, in which the matrix products are, added up in float32.
      targets: int32 [B, T]; anything where the weight is 0.
      weights: float32 [B, T], at least 0. Nothing is computed of tokens without.
      softcap: bounds the logits by its tanh; 0: none.
      smoothing: as in `token_loss`.
      chunk: tokens of a device whose logits exist at once.

    Returns:
      (float32 scalar, how many tokens with a weight have their target as the most probable one, float32 scalar).
    """
    targets, weights = jnp.asarray(targets, jnp.int32), jax.lax.stop_gradient(jnp.asarray(weights, jnp.float32))
    settings = _Settings(float(softcap), float(smoothing), chunk)
    return _differentiable(settings)(x, table, targets, weights)


@functools.cache
def _differentiable(settings: _Settings) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(x, table, targets, weights) → (loss, right); the forward pass makes the gradients that are asked for."""

    @jax.custom_vjp
    def loss(x, table, *others):
        return _walk(settings, (False, False), x, table.astype(x.dtype), *others)[:2]

    def forward(x, table, *others):
        arrays = x.value, table.value.astype(x.value.dtype), *(a.value for a in others)
        *results, dx, dtable = _walk(settings, (x.perturbed, table.perturbed), *arrays)
        return tuple(results), (dx, None if dtable is None else dtable.astype(table.value.dtype))

    def backward(gradients, cotangents):
        g = cotangents[0]
        if isinstance(g, jax.custom_derivatives.SymbolicZero):
            return None, None, None, None
        return *(None if d is None else (g * d).astype(d.dtype) for d in gradients), None, None

    loss.defvjp(forward, backward, symbolic_zeros=True)
    return loss


def _walk(settings: _Settings, wanted: tuple[bool, bool], x, table, targets, weights) -> tuple[Any, ...]:
    """(loss, right, gradient by x and by the table where `wanted`), on the devices of the mesh if there are any."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    rows = tuple(axis for axis in BATCH_AXES if axis in axes)
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
        return _on_device(settings, wanted, x, table, targets, weights)
    splits = [tuple(axis for axis in TABLE[i:] if axis in axes) for i in range(len(TABLE) + 1)]
    words = next(split for split in splits if table.shape[0] % math.prod(mesh.shape[axis] for axis in split) == 0)
    return jax.shard_map(
        functools.partial(_on_device, dataclasses.replace(settings, words=words, rows=rows), wanted),
        in_specs=(P(rows), P(words), P(rows), P(rows)),
        out_specs=(P(), P(), P(rows) if wanted[0] else None, P(words) if wanted[1] else None),
        check_vma=False,
    )(x, table, targets, weights)


def _on_device(settings: _Settings, wanted: tuple[bool, bool], x, table, targets, weights) -> tuple[Any, ...]:
    shape = x.shape
    x, targets, weights = x.reshape(-1, shape[-1]), targets.reshape(-1), weights.reshape(-1)
    chunk, words, rows = min(settings.chunk, len(x)), settings.words, settings.rows
    # Behind the tokens stands a number that none has: reading there gives zeros, writing does nothing.
    order = jnp.argsort(weights <= 0, stable=True)
    order = jnp.pad(order, (0, -len(x) % chunk), constant_values=len(x))
    trips = -(-jnp.sum(weights > 0) // chunk)
    trips = jax.lax.pmax(trips, rows) if rows else trips
    shared, apart = (tuple(axis for axis in rows if (axis in words) == there) for there in (True, False))
    others = tuple(axis for axis in words if axis not in rows)

    def body(i, carry):
        loss, right, dx, dtable = carry
        index = jax.lax.dynamic_slice(order, (i * chunk,), (chunk,))
        some = [a.at[index].get(mode='fill', fill_value=0) for a in (x, targets, weights)]
        some[0] = jnp.where(some[2][:, None] > 0, some[0], 0)  # what has no weight may hold anything
        if shared:
            some = [jax.lax.all_gather(a, shared, tiled=True) for a in some]
        losses, is_right, du = _of_logits(settings, table, *some)
        loss, right = loss + losses, right + is_right
        du = du.astype(x.dtype)
        if wanted[0]:
            new = jnp.einsum('RV,VD->RD', du, table, preferred_element_type=jnp.float32)
            if shared:
                new = jax.lax.psum_scatter(new, shared, scatter_dimension=0, tiled=True)
            if others:
                new = jax.lax.psum(new, others)
            dx = dx.at[index].set(new.astype(dx.dtype), mode='drop')
        if wanted[1]:
            dtable = dtable + jnp.einsum('RV,RD->VD', du, some[0], preferred_element_type=jnp.float32)
        return loss, right, dx, dtable

    nothing = jnp.zeros((), jnp.float32)
    dx = jnp.zeros_like(x) if wanted[0] else None
    dtable = jnp.zeros(table.shape, jnp.float32) if wanted[1] else None
    loss, right, dx, dtable = jax.lax.fori_loop(0, trips, body, (nothing, nothing, dx, dtable))
    if apart:
        loss, right, dtable = jax.lax.psum((loss, right, dtable), apart)
    return loss, right, None if dx is None else dx.reshape(shape), dtable


def _of_logits(settings: _Settings, table, x, targets, weights):
    """Of some tokens [R, D] and this device's words [V, D]: (loss, how many are right, gradient by x tableᵀ)."""

    def over_words(reduce, a):
        return reduce(a, settings.words) if settings.words else a

    size, first = len(table), 0
    if settings.words:
        first = size * jax.lax.axis_index(settings.words)
        size = size * jax.lax.axis_size(settings.words)
    u = jnp.einsum('RD,VD->RV', x, table, preferred_element_type=jnp.float32)
    logits = settings.softcap * jnp.tanh(u / settings.softcap) if settings.softcap else u
    best = jnp.max(logits, axis=-1)
    top = over_words(jax.lax.pmax, best)
    guess = over_words(jax.lax.pmin, jnp.where(best == top, first + jnp.argmax(logits, axis=-1), size))
    powers = jnp.exp(logits - top[:, None])
    total = over_words(jax.lax.psum, jnp.sum(powers, axis=-1))
    # Less the top: what is left is small, and float32 loses nothing of it.
    logits = logits - top[:, None]
    hit = targets[:, None] == first + jnp.arange(len(table))
    log_total = jnp.log(total)
    losses = log_total - over_words(jax.lax.psum, jnp.sum(jnp.where(hit, logits, 0.0), axis=-1))
    right, wrong = 1 - settings.smoothing, 0.0
    if settings.smoothing:
        wrong = settings.smoothing / (size - 1)
        every = over_words(jax.lax.psum, jnp.sum(logits, axis=-1)) - size * log_total
        entropy = -right * math.log(right) - settings.smoothing * math.log(wrong)
        losses = (right - wrong) * losses - wrong * every - entropy
    du = weights[:, None] * (powers / total[:, None] - jnp.where(hit, right, wrong))
    if settings.softcap:
        du = du * (1 - jnp.square((logits + top[:, None]) / settings.softcap))
    is_right = jnp.sum(((guess == targets) & (weights > 0)).astype(jnp.float32))
    return jnp.sum(weights * losses), is_right, du
