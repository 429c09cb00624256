"""Contrastive losses over image and text embeddings: sigmoid (SigLIP) and softmax (CLIP), in three forms.

The dense form is the definition: it builds the matrix of all pairs. The checkpointed form does that a tile of images at
a time, and once more in the backward pass. The rings of `sigmoid_ring` and `softmax_ring` hold the pairs of one tile of
images and one chunk of texts. All give the same value and gradients.

Letters: B global batch, E embedding width, R images of a tile.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from big_vlm.config import UserError, unknown
from big_vlm.ops.chunks import over_positions
from big_vlm.ops.pair_logits import matmul
from big_vlm.ops.ring import Mesh, Ring
from big_vlm.ops.sigmoid_ring import sigmoid_ring
from big_vlm.ops.softmax_ring import softmax_ring
from big_vlm.sharding.mesh import BATCH_AXES

FORMS = ('auto', 'dense', 'checkpoint', 'ring')
# Bytes that 'auto' gives to the logits of all pairs on a device.
DENSE_BYTES = 2**24
# direction → weights of image → text and of text → image
DIRECTIONS = {'both': (0.5, 0.5), 'image_to_text': (1.0, 0.0), 'text_to_image': (0.0, 1.0)}


def sigmoid_loss(
    zimg: jax.Array,
    ztxt: jax.Array,
    t: jax.Array,
    b: jax.Array,
    *,
    form: str = 'dense',
    mesh: Mesh | None = None,
    axes: Sequence[str] = BATCH_AXES,
    tile: int = 0,
    chunk: int = 0,
    ways: int = 1,
) -> jax.Array:
    """Pairwise sigmoid loss: the sum of −log σ(±logit) over all B² pairs, divided by B.

    logits = zimg · ztxtᵀ · exp(t) + b; row i of the images belongs to row i of the texts, every other pair is a
    negative. All forms give the same value and the same four gradients. Logits of ±1e4 stay finite.

    Args:
      zimg: [B, E] image embeddings, normally of unit length. float32 is multiplied as float32 on every backend;
        bfloat16 runs at full matmul speed with float32 accumulation.
      ztxt: [B, E] text embeddings.
      t: scalar or [1], the log of the logit scale.
      b: scalar or [1], the logit bias.
      form: 'dense' builds the [B, B] logits; 'checkpoint' a tile at a time, and again in the backward pass; 'ring' has
        texts travel around the devices of `axes`, of which there may be one. 'auto' is dense where a device's logits
        are few, else a ring where there is a mesh whose devices divide the batch, else checkpointed.
      mesh: ring only; None takes the mesh of the surrounding `jax.set_mesh`.
      axes: ring only; mesh axes the batch is sharded over, walked as one ring. Other axes repeat the computation.
      tile: images whose logits a device holds at once; it need not divide B. 0: the default.
      chunk: ring only; texts that travel at once: the nearest number that divides a device's share. 0: the default.
      ways: ring only; 1, or 2: texts travel both ways at once, for links that are slow beside the devices.

    Returns:
      float32 scalar.

    Raises:
      UserError: shapes disagree, the form is unknown, there is no mesh, or B does not divide over the ring's devices.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2, algorithm 1, and section 3.3
    for the chunks.
    """
    zimg, ztxt = check_pairs(zimg, ztxt)
    t, b = (jnp.asarray(x, jnp.float32).reshape(()) for x in (t, b))
    form, mesh = _form(form, zimg, mesh, axes)
    if form == 'ring':
        return sigmoid_ring(zimg, ztxt, t, b, _ring(zimg, mesh, axes, tile, chunk, ways))

    def losses(images, index):
        logits = matmul('RE,BE->RB', images, ztxt) * jnp.exp(t) + b
        positive = index[:, None] == jnp.arange(ztxt.shape[0])
        return -jnp.sum(jax.nn.log_sigmoid(jnp.where(positive, logits, -logits)), axis=1)

    if form == 'dense':
        return jnp.mean(losses(zimg, jnp.arange(zimg.shape[0])))
    return jnp.mean(_over_tiles(losses, tile, zimg))


def softmax_loss(
    zimg: jax.Array,
    ztxt: jax.Array,
    t: jax.Array,
    *,
    direction: str = 'both',
    form: str = 'dense',
    mesh: Mesh | None = None,
    axes: Sequence[str] = BATCH_AXES,
    tile: int = 0,
    chunk: int = 0,
    ways: int = 1,
) -> jax.Array:
    """Softmax loss (InfoNCE): the mean cross-entropy of finding each image's text, each text's image, or both.

    logits = zimg · ztxtᵀ · exp(t). Arguments, where not named here, as in `sigmoid_loss`.

    Args:
      direction: 'both' is CLIP's symmetric loss, the average of 'image_to_text' (a softmax over the texts of each
        image) and 'text_to_image'.

    Returns:
      float32 scalar.

    Raises:
      UserError: as `sigmoid_loss`, and for an unknown direction.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3; van
    den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", equation 4, for one direction.
    """
    zimg, ztxt = check_pairs(zimg, ztxt)
    t = jnp.asarray(t, jnp.float32).reshape(())
    if direction not in DIRECTIONS:
        raise unknown('direction of the softmax loss', direction, DIRECTIONS)
    weights = DIRECTIONS[direction]
    form, mesh = _form(form, zimg, mesh, axes)
    if form == 'ring':
        return softmax_ring(zimg, ztxt, t, weights, _ring(zimg, mesh, axes, tile, chunk, ways))

    if form == 'dense':
        logits = matmul('BE,CE->BC', zimg, ztxt) * jnp.exp(t)
        right = [jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=axis))) for axis in (1, 0)]
        return -sum(weight * x for weight, x in zip(weights, right, strict=True))

    def loss(rows, candidates):
        """Of finding each row's own candidate."""

        def losses(rows, index):
            log_probs = jax.nn.log_softmax(matmul('RE,BE->RB', rows, candidates) * jnp.exp(t), axis=1)
            return -jnp.take_along_axis(log_probs, index[:, None], axis=1)[:, 0]

        return jnp.mean(_over_tiles(losses, tile, rows))

    return sum(weight * loss(*z) for weight, z in zip(weights, ((zimg, ztxt), (ztxt, zimg)), strict=True) if weight)


def default_tile(embeddings: jax.Array) -> int:
    """Images that are visited at once: the largest power of two up to the width of [B, E], at least 128.

    The texts' gradients are read and written once a tile, which then is little beside its products, and a tile's logits
    are no larger than those gradients.
    """
    return max(_power_of_two(embeddings.shape[1]), 128)


def default_chunk(embeddings: jax.Array) -> int:
    """Texts that travel at once: the largest power of two of which [B, E] and float32 gradients take at most 6 MiB.

    The few copies that a hop needs then are a small part of a TPU's fast memory, and a hop is still long.
    """
    return _power_of_two(6 * 2**20 // (embeddings.shape[1] * (embeddings.dtype.itemsize + 4)))


def _power_of_two(n):
    """The largest up to n."""
    return 1 << max(n.bit_length() - 1, 0)


def _over_tiles(losses, tile, rows):
    """float32 [B], `losses(rows [R, E], their index [R])` a tile of [B, E] at a time, and again for the gradients."""
    index = jnp.arange(rows.shape[0])
    return over_positions(lambda x, i: losses(x[0], i[0])[None], tile or default_tile(rows), rows[None], index[None])[0]


def check_pairs(zimg: jax.Array, ztxt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype. Raises UserError unless they are [B, E] of one shape."""
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


def _form(form, zimg, mesh, axes):
    """(the form that is taken, the mesh that is there or None)."""
    if form not in FORMS:
        raise unknown('form of the contrastive loss', form, FORMS)
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    for axis in axes if form in ('auto', 'ring') and not mesh.empty else ():
        if axis not in mesh.shape:
            raise unknown('mesh axis', axis, mesh.axis_names, where='axes of the contrastive loss')
    if form == 'auto':
        batch, devices = zimg.shape[0], 1 if mesh.empty else Ring(mesh, tuple(axes), 0, 0).devices
        divides = not mesh.empty and batch % devices == 0
        form = 'dense' if 4 * batch**2 // devices <= DENSE_BYTES else 'ring' if divides else 'checkpoint'
    return form, mesh


def _ring(zimg, mesh, axes, tile, chunk, ways):
    """The ring that was asked for, with defaults filled in."""
    axes = tuple(axes)
    if mesh.empty:
        raise UserError("contrastive loss: form 'ring' needs a mesh: pass mesh=, or call it inside jax.set_mesh(mesh)")
    for name, value in (('tile', tile), ('chunk', chunk)):
        if value < 0:
            raise UserError(f'contrastive loss: {name}={value}: give a number of rows, or 0 for the default')
    batch, devices = zimg.shape[0], Ring(mesh, axes, 0, 0).devices
    if batch % devices:
        raise UserError(
            f'contrastive loss: a batch of {batch} does not divide over the {devices} devices of mesh axes '
            f'{axes}: use a multiple of {devices}'
        )
    if ways not in (1, 2) or batch // devices % ways:
        raise UserError(f'contrastive loss: ways={ways}: 1, or 2 where each device has an even number of texts')
    chunk = _divisor(batch // devices // ways, chunk or default_chunk(zimg))
    return Ring(mesh, axes, tile or default_tile(zimg), chunk, ways)


def _divisor(rows, wanted):
    """The divisor of `rows` that is nearest to `wanted`, by ratio."""
    return min((n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: abs(math.log(n / wanted)))
