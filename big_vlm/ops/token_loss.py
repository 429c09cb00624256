"""Cross-entropy of the next token, averaged over each example or over all tokens."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def log_prob(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log softmax(logits)[target] in float32: [..., V], int [...] -> [...]. A target outside 0..V-1 has logit 0."""
    logits, targets = logits.astype(jnp.float32), jnp.asarray(targets, jnp.int32)
    # A masked sum rather than a gather: it stays local when the vocabulary is sharded, and its gradient is no scatter.
    hit = targets[..., None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def token_loss(
    logits: jax.Array, targets: jax.Array, mask: jax.Array, average: str = 'example', smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Mean negative log-likelihood, in nats, of the supervised tokens.

    Args:
      logits: float [B, T, V]; logits[:, i] predict targets[:, i], so the caller shifts.
      targets: int32 [B, T]; anything where the mask is 0.
      mask: [B, T], 1 where the token is supervised.
      average: 'example': the mean over each example, then over the examples that have any supervised token
        (big_vision); 'token': the mean over all supervised tokens of the batch (Hugging Face).
      smoothing: share of a target's probability that is spread over the other V-1 tokens, in 0..1 (Szegedy et al.
        2016, arXiv 1512.00567, section 7). The loss is then the divergence from that distribution, 0 at best.

    Returns:
      (loss float32 scalar, each example's mean float32 [B], 0 where it has no supervised token).

    Raises:
      ValueError: another `average`.
    """
    mask = mask.astype(jnp.float32)
    # where, not a product: a masked position may hold anything, infinities too.
    losses = jnp.where(mask > 0, _divergence(logits, targets, smoothing), 0.0)
    per_example = jnp.sum(losses * mask, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1.0)
    return jnp.sum(losses * weights(mask, average)), per_example


def weights(mask: jax.Array, average: str = 'example') -> jax.Array:
    """float32 [B, T]: of each token in the mean of `token_loss`; 0 where it is not supervised. Raises as it does."""
    if average not in ('example', 'token'):
        raise ValueError(f"token_loss: average must be 'example' or 'token', got {average!r}")
    if average == 'token':  # every one counts the same, whatever it weighs within its example
        mask = mask > 0
        return mask / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    mask = mask.astype(jnp.float32)
    count = jnp.sum(mask, axis=-1, keepdims=True)
    return mask / jnp.maximum(count, 1.0) / jnp.maximum(jnp.sum(count > 0), 1).astype(jnp.float32)


def _divergence(logits: jax.Array, targets: jax.Array, smoothing: float) -> jax.Array:
    """[..., V], int [...] → [...]: from the smoothed distribution of each target to the logits' one, nats."""
    right = log_prob(logits, targets)
    if not smoothing:
        return -right
    size = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    every = jnp.sum(logits, axis=-1) - size * jax.nn.logsumexp(logits, axis=-1)
    entropy = -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(smoothing / (size - 1))
    return -(1 - smoothing) * right - smoothing / (size - 1) * (every - right) - entropy
