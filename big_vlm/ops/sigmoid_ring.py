"""The sigmoid loss as a ring that computes its gradients in the forward pass.

The loss is a sum over (image, text) pairs, so a block's gradient is known as soon as its logits are: one walk of three
matrix products a block gives the loss and all gradients, and the backward pass only scales them.

Letters: B global batch, b = B / devices, R images of a tile, C = b texts, E embedding width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from big_vlm.ops import pair_logits
from big_vlm.ops.ring import Ring, add, walk


# The custom_vjp stands outside the shard_map: the backward pass is then plain scaling of global arrays.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def sigmoid_ring(zimg: jax.Array, ztxt: jax.Array, t: jax.Array, b: jax.Array, ring: Ring) -> jax.Array:
    """`contrastive.sigmoid_loss`, float32 scalar, of checked arguments.

    Args:
      zimg, ztxt: [B, E] of one dtype; B is divisible by the ring's devices.
      t, b: float32 scalars.
      ring: around which the texts travel.
    """
    return _on(ring, _value, P())(zimg, ztxt, t, b)


def _forward(zimg, ztxt, t, b, ring):
    rows = P(ring.axes)
    return _on(ring, _value_and_grads, (P(), (rows, rows, P(), P())))(zimg, ztxt, t, b)


def _backward(ring, grads, cotangent):
    del ring
    return tuple((cotangent * g.astype(jnp.float32)).astype(g.dtype) for g in grads)


sigmoid_ring.defvjp(_forward, _backward)


def _on(ring, function, out_specs):
    in_specs = (P(ring.axes), P(ring.axes), P(), P())
    return jax.shard_map(functools.partial(function, ring), mesh=ring.mesh, in_specs=in_specs, out_specs=out_specs)


def _value(ring, zimg, ztxt, t, b):
    """The loss alone, for evaluation: one matrix product a block. zimg, ztxt: this device's [b, E]."""
    scale = jnp.exp(t)

    def visit(images, texts, first):
        # Row sums first: float32 error then grows with the width of a block, not with its area.
        return jnp.sum(jax.nn.softplus(pair_logits.negatives(images, texts, scale, b, first)), axis=1), ()

    start = jnp.zeros(len(zimg), jnp.float32), ()
    losses, _ = walk(ring, visit, add, zimg, ztxt, start)
    losses += jax.nn.softplus(-pair_logits.positives(zimg, ztxt, scale, b))
    return jax.lax.pmean(jnp.mean(losses), ring.axes)


def _value_and_grads(ring, zimg, ztxt, t, b):
    """The loss and its gradients by zimg, ztxt, t, b. zimg, ztxt: this device's [b, E]."""
    scale = jnp.exp(t)

    def visit(images, texts, first):
        logits = pair_logits.negatives(images, texts, scale, b, first)
        # `wrong` is the probability that a negative is taken for a positive.
        losses, wrong = pair_logits.softplus_and_sigmoid(logits)
        rounded = wrong.astype(images.dtype)
        dimg, dtxt = pair_logits.matmul('RC,CE->RE', rounded, texts), pair_logits.matmul('RC,RE->CE', rounded, images)
        return (jnp.sum(losses, axis=1), jnp.sum(wrong, axis=1), dimg), dtxt

    logits = pair_logits.positives(zimg, ztxt, scale, b)
    weight = -jax.nn.sigmoid(-logits)
    # Scaled last: σ(−80) times an embedding's entry times 1/B is near the smallest float32.
    batch_scale = scale / (zimg.shape[0] * jax.lax.axis_size(ring.axes))

    def finish(take, dtxt):
        return ((dtxt + take(weight)[:, None] * take(zimg)) * batch_scale).astype(ztxt.dtype)

    none, zeros = (jnp.zeros(shape, jnp.float32) for shape in (len(zimg), zimg.shape))
    start = (none, none, zeros), zeros
    (losses, dbias, dimg), dtxt = walk(ring, visit, add, zimg, ztxt, start, finish)
    losses += jax.nn.softplus(-logits)
    dimg += weight[:, None] * ztxt
    dt = pair_logits.rowwise_dot(zimg, dimg)  # Σ dlogit · cosine, without another pass over the blocks
    loss, dt, dbias = jax.lax.pmean((jnp.mean(losses), jnp.mean(dt), jnp.mean(dbias + weight)), ring.axes)
    return loss, ((dimg * batch_scale).astype(zimg.dtype), dtxt, dt * scale, dbias)
