"""Contrastive losses over image and text embeddings: sigmoid (SigLIP) and softmax (CLIP), dense or as a ring.

The dense forms below are the definition: they build the matrix of all pairs. The rings of `sigmoid_ring` and
`softmax_ring` give the same value and gradients, and hold the pairs of one tile of images and one device's texts.

Letters: B global batch, E embedding width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from big_vlm.config import UserError, unknown
from big_vlm.ops import ring
from big_vlm.ops.pair_logits import matmul
from big_vlm.ops.sigmoid_ring import sigmoid_ring
from big_vlm.ops.softmax_ring import softmax_ring

FORMS = ('dense', 'ring')
# direction → weights of image → text and of text → image
DIRECTIONS = {'both': (0.5, 0.5), 'image_to_text': (1.0, 0.0), 'text_to_image': (0.0, 1.0)}


def sigmoid_loss(
    zimg: jax.Array,
    ztxt: jax.Array,
    t: jax.Array,
    b: jax.Array,
    *,
    form: str = 'dense',
    mesh: ring.Mesh | None = None,
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
      form: 'dense' builds the [B, B] logits; 'ring' sends text chunks around the devices of `axes`, of which there may
        be one.
      mesh: ring only; None takes the mesh of the surrounding `jax.set_mesh`.
      axes: ring only; mesh axes the batch is sharded over, walked as one ring. Other axes repeat the computation.
      tile: ring only; images whose logits a device holds at once; it need not divide B. 0: `default_tile`.

    Returns:
      float32 scalar.

    Raises:
      UserError: shapes disagree, the form is unknown, there is no mesh, or B is not divisible by the ring's devices.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2, algorithm 1, and section 3.3
    for the chunks.
    """
    zimg, ztxt = _check_pairs(zimg, ztxt)
    t, b = (jnp.asarray(x, jnp.float32).reshape(()) for x in (t, b))
    if form == 'ring':
        return sigmoid_ring(zimg, ztxt, t, b, *_check_ring(zimg, mesh, axes, tile))
    _check_form(form)
    logits = matmul('BE,CE->BC', zimg, ztxt) * jnp.exp(t) + b
    positive = jnp.eye(zimg.shape[0], dtype=bool)
    return -jnp.sum(jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))) / zimg.shape[0]


def softmax_loss(
    zimg: jax.Array,
    ztxt: jax.Array,
    t: jax.Array,
    *,
    direction: str = 'both',
    form: str = 'dense',
    mesh: ring.Mesh | None = None,
    axes: Sequence[str] = ('data', 'fsdp'),
    tile: int = 0,
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
    zimg, ztxt = _check_pairs(zimg, ztxt)
    t = jnp.asarray(t, jnp.float32).reshape(())
    if direction not in DIRECTIONS:
        raise unknown('direction of the softmax loss', direction, DIRECTIONS)
    weights = DIRECTIONS[direction]
    if form == 'ring':
        return softmax_ring(zimg, ztxt, t, weights, *_check_ring(zimg, mesh, axes, tile))
    _check_form(form)
    logits = matmul('BE,CE->BC', zimg, ztxt) * jnp.exp(t)
    right = (jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=axis))) for axis in (1, 0))
    return -sum(weight * x for weight, x in zip(weights, right, strict=True))


def default_tile(width: int) -> int:
    """Images whose logits a device holds at once: the largest power of two up to the embedding width, at least 128.

    From width 128 on, a tile's logits are then no larger than the text gradients that travel.
    """
    return max(1 << (width.bit_length() - 1), 128)


def _check_form(form):
    if form not in FORMS:
        raise unknown('form of the contrastive loss', form, FORMS)


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


def _check_ring(zimg, mesh, axes, tile):
    """(mesh, axes, tile), all of them there."""
    mesh, axes = jax.sharding.get_abstract_mesh() if mesh is None else mesh, tuple(axes)
    if mesh.empty:
        raise UserError("contrastive loss: form 'ring' needs a mesh: pass mesh=, or call it inside jax.set_mesh(mesh)")
    for axis in axes:
        if axis not in mesh.shape:
            raise unknown('mesh axis', axis, mesh.axis_names, where='axes of the contrastive loss')
    devices = ring.size(mesh, axes)
    if zimg.shape[0] % devices:
        raise UserError(
            f'contrastive loss: a batch of {zimg.shape[0]} does not divide over the {devices} devices of mesh axes '
            f'{axes}: use a multiple of {devices}'
        )
    if tile < 0:
        raise UserError(f'contrastive loss: tile={tile}: give a number of images, or 0 for the default')
    return mesh, axes, tile or default_tile(zimg.shape[1])
