"""Contrastive losses over image and text embeddings: sigmoid (dense and ring) and symmetric softmax (dense).

The sigmoid loss is a sum over (image, text) pairs, so it splits into blocks, and each block's gradient is known as soon
as its logits are. The ring uses both facts: every device keeps its own images, the text chunks travel from device to
device, and the gradients are computed in the forward pass. A device holds the logits of one tile of images and one
chunk of texts at a time.

Letters: B global batch, b = B / devices, E embedding width.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from big_vlm.config import UserError, unknown


def sigmoid_loss(
    zimg: jax.Array,
    ztxt: jax.Array,
    t: jax.Array,
    b: jax.Array,
    *,
    form: str = 'dense',
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    axes: Sequence[str] = ('data', 'fsdp'),
    tile: int = 0,
) -> jax.Array:
    """Pairwise sigmoid loss: the sum of −log σ(±logit) over all B² pairs, divided by B.

    logits = zimg · ztxtᵀ · exp(t) + b; row i of the images belongs to row i of the texts, every other pair is a
    negative. Both forms give the same value and the same four gradients. Logits of ±1e4 stay finite.

    Args:
      zimg: [B, E] image embeddings, normally of unit length. float32 is multiplied as float32 on every backend;
        bfloat16 runs at full matmul speed with float32 accumulation.
      ztxt: [B, E] text embeddings.
      t: scalar or [1], the log of the logit scale.
      b: scalar or [1], the logit bias.
      form: 'dense' builds the [B, B] logits; 'ring' exchanges text chunks between the devices of `axes`.
      mesh: ring only; None takes the mesh of the surrounding `jax.set_mesh`.
      axes: ring only; mesh axes the batch is sharded over, walked as one ring. Other axes repeat the computation.
      tile: ring only; images whose logits a device holds at once. 0: as many as make those logits no larger than the
        text gradients that travel, E rounded down to a multiple of 128. It need not divide B.

    Returns:
      float32 scalar.

    Raises:
      UserError: shapes disagree, the form is unknown, there is no mesh, or B is not divisible by the ring's devices.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2, algorithm 1, and section 3.3
    for the chunks.
    """
    zimg, ztxt = _check_pairs(zimg, ztxt)
    t, b = (jnp.asarray(x, jnp.float32).reshape(()) for x in (t, b))
    if form == 'dense':
        return _dense(zimg, ztxt, t, b)
    if form == 'ring':
        mesh, axes = _check_ring(zimg.shape[0], mesh, tuple(axes))
        return _ring(zimg, ztxt, t, b, mesh, axes, tile or _default_tile(zimg.shape[1]))
    raise unknown('form of the sigmoid loss', form, ('dense', 'ring'))


def softmax_loss(zimg: jax.Array, ztxt: jax.Array, t: jax.Array) -> jax.Array:
    """Symmetric softmax loss: the mean cross-entropy of image → text and text → image, averaged.

    Args:
      zimg: [B, E] image embeddings.
      ztxt: [B, E] text embeddings.
      t: scalar or [1], the log of the logit scale.

    Returns:
      float32 scalar.

    Raises:
      UserError: shapes disagree.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
    """
    zimg, ztxt = _check_pairs(zimg, ztxt)
    logits = _matmul('BE,CE->BC', zimg, ztxt) * jnp.exp(jnp.asarray(t, jnp.float32).reshape(()))
    image_to_text = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    text_to_image = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    return -0.5 * jnp.mean(image_to_text + text_to_image)


def _dense(zimg, ztxt, t, b):
    logits = _matmul('BE,CE->BC', zimg, ztxt) * jnp.exp(t) + b
    positive = jnp.eye(zimg.shape[0], dtype=bool)
    return -jnp.sum(jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))) / zimg.shape[0]


# The custom_vjp stands outside the shard_map: the backward pass is then plain scaling of global arrays.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _ring(zimg, ztxt, t, b, mesh, axes, tile):
    walk = functools.partial(_walk_value, axes=axes, ring=_size(mesh, axes), tile=tile)
    return _on_ring(walk, mesh, axes, P())(zimg, ztxt, t, b)


def _ring_forward(zimg, ztxt, t, b, mesh, axes, tile):
    walk = functools.partial(_walk_value_and_grads, axes=axes, ring=_size(mesh, axes), tile=tile)
    return _on_ring(walk, mesh, axes, (P(), (P(axes), P(axes), P(), P())))(zimg, ztxt, t, b)


def _ring_backward(mesh, axes, tile, grads, cotangent):
    return tuple((cotangent * g.astype(jnp.float32)).astype(g.dtype) for g in grads)


_ring.defvjp(_ring_forward, _ring_backward)


def _on_ring(walk, mesh, axes, out_specs):
    return jax.shard_map(walk, mesh=mesh, in_specs=(P(axes), P(axes), P(), P()), out_specs=out_specs)


def _walk_value(zimg, ztxt, t, b, *, axes, ring, tile):
    """The loss alone, for evaluation: one matmul a tile. zimg, ztxt: this device's [b, E]."""
    scale = jnp.exp(t)
    loss, _ = _positives(zimg, ztxt, scale, b)
    for_next = _send(ztxt, axes, ring)
    loss += _block_loss(zimg, ztxt, scale, b, axes, tile, home=True)

    def hop(_, carry):
        loss, text = carry
        for_next = _send(text, axes, ring)
        return loss + _block_loss(zimg, text, scale, b, axes, tile, home=False), for_next

    loss, _ = jax.lax.fori_loop(1, ring, hop, (loss, for_next))
    return jax.lax.psum(loss, axes) / (zimg.shape[0] * ring)


def _walk_value_and_grads(zimg, ztxt, t, b, *, axes, ring, tile):
    """The loss and its gradients. zimg, ztxt: this device's [b, E].

    The next text chunk is requested before the current block is computed, and the gradient of a text chunk follows one
    hop behind the chunk, so that both transfers run beside the matmuls. Half of the home block waits until the end: it
    is computed while the text gradients travel the last hop home.
    """
    scale = jnp.exp(t)
    half = -(-zimg.shape[0] // 2) if ring > 1 else zimg.shape[0]
    block = functools.partial(_block, scale=scale, b=b, axes=axes, tile=tile)

    loss, weight = _positives(zimg, ztxt, scale, b)
    text = _send(ztxt, axes, ring)
    block_loss, dimg_top, dtxt, dbias = block(zimg[:half], ztxt, first=0)
    loss += block_loss
    dimg = weight[:, None] * ztxt.astype(jnp.float32)
    dtxt += weight[:, None] * zimg.astype(jnp.float32)
    dbias += jnp.sum(weight)

    def hop(text, loss, dimg, dtxt, dbias):
        arrived = _send(dtxt, axes, ring)
        block_loss, block_dimg, block_dtxt, block_dbias = block(zimg, text)
        return loss + block_loss, dimg + block_dimg, arrived + block_dtxt, dbias + block_dbias

    def hop_and_request(_, carry):
        text, *sums = carry
        for_next = _send(text, axes, ring)
        return for_next, *hop(text, *sums)

    if ring > 1:
        carry = (text, loss, dimg, dtxt, dbias)
        loss, dimg, dtxt, dbias = hop(*jax.lax.fori_loop(1, ring - 1, hop_and_request, carry))
        dtxt = _send(dtxt, axes, ring)
    if half < zimg.shape[0]:
        block_loss, dimg_bottom, block_dtxt, block_dbias = block(zimg[half:], ztxt, first=half)
        loss, dtxt, dbias = loss + block_loss, dtxt + block_dtxt, dbias + block_dbias
        dimg += jnp.concatenate([dimg_top, dimg_bottom])
    else:
        dimg += dimg_top

    # Scaled last: σ(−80) times an embedding's entry times 1/B is near the smallest float32.
    batch = zimg.shape[0] * ring
    dt = jnp.sum(zimg.astype(jnp.float32) * dimg)  # Σ dlogit · cosine, without another pass over the blocks
    loss, dt, dbias = jax.lax.psum((loss, dt, dbias), axes)
    dimg, dtxt = ((g * (scale / batch)).astype(z.dtype) for g, z in ((dimg, zimg), (dtxt, ztxt)))
    return loss / batch, (dimg, dtxt, dt * (scale / batch), dbias / batch)


def _positives(zimg, ztxt, scale, b):
    """Loss of the matching pairs and its derivative by each logit [b], from a row-wise float32 dot.

    Taken apart because a learned model's positives are tiny numbers beside their own softplus: summing all pairs as
    negatives and subtracting the logit would lose them.
    """
    logits = jnp.sum(zimg.astype(jnp.float32) * ztxt.astype(jnp.float32), axis=1) * scale + b
    return jnp.sum(jax.nn.softplus(-logits)), -jax.nn.sigmoid(-logits)


def _block(zimg, ztxt, *, scale, b, axes, tile, first=None):
    """Loss and unscaled gradients of the negatives among R images and C texts, all float32, `tile` images at a time.

    `first`: of the home block, the text that image 0 belongs to; None where all pairs are negatives.
    """

    def step(sums, images, start):
        loss, dtxt, dbias = sums
        logits = _negatives(images, ztxt, scale, b, None if first is None else first + start)
        weight = jax.nn.sigmoid(logits)
        rounded = weight.astype(zimg.dtype)
        dimg = _matmul('RC,CE->RE', rounded, ztxt)
        dtxt += _matmul('RC,RE->CE', rounded, images)
        return (loss + jnp.sum(_softplus_rows(logits)), dtxt, dbias + jnp.sum(jnp.sum(weight, axis=1))), dimg

    zero = jnp.float32(0), jnp.zeros(ztxt.shape, jnp.float32), jnp.float32(0)
    (loss, dtxt, dbias), dimg = _tiled(step, zero, zimg, axes, tile)
    return loss, dimg, dtxt, dbias


def _block_loss(zimg, ztxt, scale, b, axes, tile, *, home):
    def step(loss, images, start):
        return loss + jnp.sum(_softplus_rows(_negatives(images, ztxt, scale, b, start if home else None))), None

    return _tiled(step, jnp.float32(0), zimg, axes, tile)[0]


def _tiled(step, sums, rows, axes, tile):
    """Folds `step(sums, rows[start : start + tile], start) -> (sums, out)` over the rows; the last tile may be shorter.

    Returns (sums, the outs one below the other).
    """
    whole = rows.shape[0] // tile * tile
    outs = []
    if whole > tile:
        starts = jnp.arange(0, whole, tile)
        tiles = rows[:whole].reshape(-1, tile, rows.shape[1])
        # What a device adds up is its own, and a loop's carry has to say so from the start.
        sums = jax.lax.pcast(sums, axes, to='varying')
        sums, out = jax.lax.scan(lambda sums, x: step(sums, *x), sums, (tiles, starts))
        outs.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out))
    else:
        whole = 0
    for start in range(whole, rows.shape[0], tile):
        sums, out = step(sums, rows[start : start + tile], start)
        outs.append(out)
    return sums, jax.tree.map(lambda *x: jnp.concatenate(x) if len(x) > 1 else x[0], *outs)


def _negatives(zimg, ztxt, scale, b, first):
    """Logits [R, C]; where image i belongs to text `first` + i, the pair is −inf: no loss and no gradient."""
    logits = _matmul('RE,CE->RC', zimg, ztxt) * scale + b
    if first is not None:
        image, text = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
        logits = jnp.where(text == first + image, -jnp.inf, logits)
    return logits


def _softplus_rows(logits):
    # Row sums first: float32 error then grows with the width of a block, not with its area.
    return jnp.sum(jax.nn.softplus(logits), axis=1)


def _send(x, axes, ring):
    """To the next device; what returns came from the one before."""
    if ring == 1:
        return x
    return jax.lax.ppermute(x, axes, [(i, (i + 1) % ring) for i in range(ring)])


def _matmul(equation, x, y):
    # HIGHEST concerns float32 only, which TPUs and GPUs would otherwise round to bfloat16 or TF32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def _default_tile(width):
    return max(width // 128 * 128, 128)


def _size(mesh, axes):
    return math.prod(mesh.shape[axis] for axis in axes)


def _check_pairs(zimg, ztxt):
    if zimg.ndim != 2 or ztxt.ndim != 2 or zimg.shape[0] != ztxt.shape[0]:
        raise UserError(
            f'contrastive loss: image embeddings {zimg.shape} and text embeddings {ztxt.shape} must both be '
            '[batch, width] with the same batch'
        )
    if zimg.shape[1] != ztxt.shape[1]:
        raise UserError(
            f'contrastive loss: image embeddings have width {zimg.shape[1]}, text embeddings {ztxt.shape[1]}: '
            'give both towers the same embedding width (config.model.embed_dim)'
        )
    dtype = jnp.result_type(zimg, ztxt)
    return zimg.astype(dtype), ztxt.astype(dtype)


def _check_ring(batch, mesh, axes):
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        raise UserError("sigmoid_loss: form 'ring' needs a mesh: pass mesh=, or call it inside jax.set_mesh(mesh)")
    for axis in axes:
        if axis not in mesh.shape:
            raise unknown('mesh axis', axis, mesh.axis_names, where='sigmoid_loss axes')
    ring = _size(mesh, axes)
    if batch % ring:
        raise UserError(
            f'sigmoid_loss: a batch of {batch} does not divide over the {ring} devices of mesh axes {axes}: '
            f'use a multiple of {ring}'
        )
    return mesh, axes
