"""The softmax loss as a ring with an online log-sum-exp: no device ever holds the matrix of all pairs.

A pair's gradient needs its image's and its text's sums over all pairs, so there are two walks: the forward pass gathers
the sums (one matrix product a block), the backward pass computes the gradients from them (three).

With the positives apart, a row's loss is softplus(margin), margin = log Σ exp(negatives − positive): exact where a
learned model leaves only the smallest of losses, and where logits are so large that a log-sum-exp would round them.

Letters: B global batch, b = B / devices, R images of a tile, C = b texts, E embedding width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from big_vlm.ops import pair_logits
from big_vlm.ops.ring import Ring, add, walk


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def softmax_ring(zimg: jax.Array, ztxt: jax.Array, t: jax.Array, weights: tuple[float, float], ring: Ring) -> jax.Array:
    """`contrastive.softmax_loss`, float32 scalar, of checked arguments.

    Args:
      zimg, ztxt: [B, E] of one dtype; B is divisible by the ring's devices.
      t: float32 scalar.
      weights: of image → text and of text → image; they sum to 1.
      ring: around which the texts travel.
    """
    return _forward(zimg, ztxt, t, weights, ring)[0]


def _forward(zimg, ztxt, t, weights, ring):
    rows = P(ring.axes)
    specs = dict(in_specs=(rows, rows, P()), out_specs=(P(), (rows, rows)))
    loss, margins = jax.shard_map(functools.partial(_value, ring, weights), mesh=ring.mesh, **specs)(zimg, ztxt, t)
    return loss, (zimg, ztxt, t, margins)


def _backward(weights, ring, saved, cotangent):
    rows = P(ring.axes)
    specs = dict(in_specs=(rows, rows, P(), (rows, rows), P()), out_specs=(rows, rows, P()))
    return jax.shard_map(functools.partial(_grads, ring, weights), mesh=ring.mesh, **specs)(*saved, cotangent)


softmax_ring.defvjp(_forward, _backward)


def _value(ring, weights, zimg, ztxt, t):
    """(loss, margins of each image and of each text, float32 [b]). zimg, ztxt: this device's [b, E]."""
    scale = jnp.exp(t)

    def visit(images, texts, first):
        logits = pair_logits.negatives(images, texts, scale, 0.0, first)
        return _largest_and_sum(logits, axis=1), _largest_and_sum(logits, axis=0)

    empty = jnp.full(len(zimg), pair_logits.NO_PAIR, jnp.float32), jnp.zeros(len(zimg), jnp.float32)
    sums = walk(ring, visit, _merge, zimg, ztxt, (empty, empty))
    positives = pair_logits.positives(zimg, ztxt, scale, 0.0)
    margins = tuple((largest - positives) + jnp.log(total) for largest, total in sums)
    losses = sum(weight * jax.nn.softplus(margin) for weight, margin in zip(weights, margins, strict=True))
    return jax.lax.pmean(jnp.mean(losses), ring.axes), margins


def _largest_and_sum(logits, axis):
    largest = jnp.max(logits, axis=axis)
    return largest, jnp.sum(jnp.exp(logits - jnp.expand_dims(largest, axis)), axis=axis)


def _merge(x, y):
    """Of two (largest, Σ exp(logit − largest)), or of a pair of those. The largest is exact, so only sums round."""
    if isinstance(x[0], tuple):
        return tuple(map(_merge, x, y))
    largest = jnp.maximum(x[0], y[0])
    return largest, sum(total * jnp.exp(own - largest) for own, total in (x, y))


def _grads(ring, weights, zimg, ztxt, t, margins, cotangent):
    """Gradients by zimg, ztxt, t, times the cotangent. margins: as `_value` returns them."""
    scale = jnp.exp(t)
    positives = pair_logits.positives(zimg, ztxt, scale, 0.0)
    # A negative's probability is exp(logit − positive − loss).
    image_loss, text_loss = (jax.nn.softplus(margin) for margin in margins)
    image_weight, text_weight = weights

    def visit(images, texts, first):
        (images, image_positives, image_loss), (texts, text_positives, text_loss) = images, texts
        logits = pair_logits.negatives(images, texts, scale, 0.0, first)
        from_image = jnp.exp((logits - image_positives[:, None]) - image_loss[:, None])
        from_text = jnp.exp((logits - text_positives) - text_loss)
        weight = (image_weight * from_image + text_weight * from_text).astype(images.dtype)
        return pair_logits.matmul('RC,CE->RE', weight, texts), pair_logits.matmul('RC,RE->CE', weight, images)

    own = -sum(share * jax.nn.sigmoid(margin) for share, margin in zip(weights, margins, strict=True))
    batch_scale = scale * cotangent / (zimg.shape[0] * jax.lax.axis_size(ring.axes))

    def finish(take, dtxt):
        return ((dtxt + take(own)[:, None] * take(zimg)) * batch_scale).astype(ztxt.dtype)

    zeros = jnp.zeros(zimg.shape, jnp.float32)
    images, texts = (zimg, positives, image_loss), (ztxt, positives, text_loss)
    dimg, dtxt = walk(ring, visit, add, images, texts, (zeros, zeros), finish)
    dimg += own[:, None] * ztxt
    dt = jax.lax.pmean(jnp.mean(pair_logits.rowwise_dot(zimg, dimg)), ring.axes) * scale * cotangent
    return (dimg * batch_scale).astype(zimg.dtype), dtxt, dt
