"""Vectors rounded to the rows of a codebook, which follows what it stands for (VQ-VAE: van den Oord et al. 2017).

The codebook has no gradients: its rows are moving averages of the vectors that were nearest to them (arXiv 1711.00937,
appendix A.1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from big_vlm.ops.pair_logits import matmul

Codebook = dict[str, jax.Array]  # embedding float32 [K,D]; ema_w [K,D] and ema_cluster_size [K], whose ratio it is
_EPSILON = 1e-5  # of the smoothed sizes


def nearest(vectors: jax.Array, embedding: jax.Array) -> jax.Array:
    """[…,D] and rows [K,D] → int32 […], the row of the least distance."""
    products = matmul('...d,kd->...k', vectors, embedding)
    return jnp.argmin(jnp.sum(embedding**2, axis=1) - 2 * products, axis=-1).astype(jnp.int32)


def straight_through(vectors: jax.Array, quantized: jax.Array) -> jax.Array:
    """The values of `quantized`, with gradients as if they were `vectors`."""
    return vectors + jax.lax.stop_gradient(quantized - vectors)


def perplexity(codes: jax.Array, count: int) -> jax.Array:
    """exp of the entropy of how often each of `count` codes is used: 1, one for all, to `count`, all alike."""
    shares = jnp.mean(jax.nn.one_hot(codes.reshape(-1), count), axis=0)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(shares)))


def updated(
    codebook: Codebook, vectors: jax.Array, codes: jax.Array, decay: float, revive: float, rng: jax.Array
) -> Codebook:
    """The codebook after a step.

    Args:
      codebook: before it.
      vectors: float32 [N,D].
      codes: int32 [N], what `nearest` made of them.
      decay: of the moving averages.
      revive: a row that stands for less than this share of its part of the vectors becomes one of them, at random:
        it would never be the nearest again (Dhariwal et al. 2020, Jukebox, section 3.1).
      rng: which.
    """
    count, n = len(codebook['embedding']), len(vectors)
    hot = jax.nn.one_hot(codes, count, dtype=vectors.dtype)
    size = decay * codebook['ema_cluster_size'] + (1 - decay) * jnp.sum(hot, axis=0)
    total = jnp.sum(size)
    size = (size + _EPSILON) / (total + count * _EPSILON) * total
    sums = decay * codebook['ema_w'] + (1 - decay) * jnp.einsum('nk,nd->kd', hot, vectors)
    fair = total / count
    dead = size < revive * fair
    others = jnp.take(vectors, jax.random.randint(rng, (count,), 0, n), axis=0)
    size = jnp.where(dead, fair, size)
    sums = jnp.where(dead[:, None], fair * others, sums)
    return {'embedding': sums / size[:, None], 'ema_w': sums, 'ema_cluster_size': size}
