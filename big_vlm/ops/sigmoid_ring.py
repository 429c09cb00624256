"""The sigmoid loss as a ring that computes its gradients in the forward pass.

The loss is a sum over (image, text) pairs, so a block's gradient is known as soon as its logits are: one walk of three
matrix products a block gives the loss and all gradients, and the backward pass only scales them.

Letters: B global batch, b = B / devices, R images of a tile, C = b texts, E embedding width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from big_vlm.ops import pair_logits, ring


# The custom_vjp stands outside the shard_map: the backward pass is then plain scaling of global arrays.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def sigmoid_ring(
    zimg: jax.Array, ztxt: jax.Array, t: jax.Array, b: jax.Array, mesh: ring.Mesh, axes: tuple[str, ...], tile: int
) -> jax.Array:
    """`contrastive.sigmoid_loss`, float32 scalar, of checked arguments.

    Args:
      zimg, ztxt: [B, E] of one dtype; B is divisible by the devices of `axes`.
      t, b: float32 scalars.
      mesh, axes: the devices around which texts travel.
      tile: images whose logits a device holds at once.
    """
    return _on_ring(_value, mesh, axes, tile, P())(zimg, ztxt, t, b)


def _forward(zimg, ztxt, t, b, mesh, axes, tile):
    return _on_ring(_value_and_grads, mesh, axes, tile, (P(), (P(axes), P(axes), P(), P())))(zimg, ztxt, t, b)


def _backward(mesh, axes, tile, grads, cotangent):
    return tuple((cotangent * g.astype(jnp.float32)).astype(g.dtype) for g in grads)


sigmoid_ring.defvjp(_forward, _backward)


def _on_ring(function, mesh, axes, tile, out_specs):
    walk = functools.partial(ring.walk, merge=ring.add, axes=axes, devices=ring.size(mesh, axes), tile=tile)
    in_specs = (P(axes), P(axes), P(), P())
    return jax.shard_map(functools.partial(function, walk, axes), mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def _value(walk, axes, zimg, ztxt, t, b):
    """The loss alone, for evaluation: one matrix product a block. zimg, ztxt: this device's [b, E]."""
    scale = jnp.exp(t)

    def visit(images, texts, first):
        # Row sums first: float32 error then grows with the width of a block, not with its area.
        return jnp.sum(jax.nn.softplus(pair_logits.negatives(images, texts, scale, b, first)), axis=1), ()

    start = jnp.zeros(zimg.shape[0]), ()
    losses, _ = walk(visit, images=zimg, texts=ztxt, start=start)
    losses += jax.nn.softplus(-pair_logits.positives(zimg, ztxt, scale, b))
    return jax.lax.pmean(jnp.mean(losses), axes)


def _value_and_grads(walk, axes, zimg, ztxt, t, b):
    """The loss and its gradients by zimg, ztxt, t, b. zimg, ztxt: this device's [b, E]."""
    scale = jnp.exp(t)

    def visit(images, texts, first):
        logits = pair_logits.negatives(images, texts, scale, b, first)
        wrong = jax.nn.sigmoid(logits)  # the probability that a negative is taken for a positive
        rounded = wrong.astype(images.dtype)
        dimg, dtxt = pair_logits.matmul('RC,CE->RE', rounded, texts), pair_logits.matmul('RC,RE->CE', rounded, images)
        return (jnp.sum(jax.nn.softplus(logits), axis=1), jnp.sum(wrong, axis=1), dimg), dtxt

    none, zeros = jnp.zeros(zimg.shape[0]), jnp.zeros(zimg.shape)
    (losses, dbias, dimg), dtxt = walk(visit, images=zimg, texts=ztxt, start=((none, none, zeros), zeros))

    logits = pair_logits.positives(zimg, ztxt, scale, b)
    weight = -jax.nn.sigmoid(-logits)
    losses += jax.nn.softplus(-logits)
    dimg += weight[:, None] * ztxt.astype(jnp.float32)
    dtxt += weight[:, None] * zimg.astype(jnp.float32)
    dt = pair_logits.rowwise_dot(zimg, dimg)  # Σ dlogit · cosine, without another pass over the blocks
    loss, dt, dbias = jax.lax.pmean((jnp.mean(losses), jnp.mean(dt), jnp.mean(dbias + weight)), axes)
    # Scaled last: σ(−80) times an embedding's entry times 1/B is near the smallest float32.
    batch_scale = scale / (zimg.shape[0] * jax.lax.axis_size(axes))
    return loss, ((dimg * batch_scale).astype(zimg.dtype), (dtxt * batch_scale).astype(ztxt.dtype), dt * scale, dbias)
