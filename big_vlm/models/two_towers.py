"""SigLIP's two towers: images and texts into one space, and the temperature and bias of their pair logits.

Parameters: {'img': ..., 'txt': ..., 't': [1], 'b': [1]}; `t` is stored as a log (arXiv 2303.15343, Algorithm 1).
"""

from __future__ import annotations

import dataclasses
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from big_vlm import config
from big_vlm.models import image_towers, running_stats, text_towers, vit


@dataclasses.dataclass(frozen=True)
class TwoTowers:
    """An image tower and a text tower that end in vectors of the same width E.

    Attributes:
      img: a Linen module, image float [B,H,W,3] -> (z [B,E], out).
      txt: a Linen module, (text int32 [B,T], mask) -> (z [B,E], out).
      image_size: pixels per side, for `init` and FLOPs.
      text_length: T.
      init_t: log of the initial temperature.
      init_b: initial bias.
      max_patches: of an image, if `img` is a `naflex_vit.NaFlexViT`, instead of `image_size`; else 0.
    """

    img: nn.Module
    txt: nn.Module
    image_size: int
    text_length: int
    init_t: float = math.log(10.0)
    init_b: float = -10.0
    max_patches: int = 0

    def init(self, rng: jax.Array) -> dict:
        """Fresh float32 parameters. Use under `jax.jit` or `jax.eval_shape`."""
        return self.init_with_stats(rng)[0]

    def init_with_stats(self, rng: jax.Array) -> tuple[dict, dict]:
        """(`init`, running statistics {'img': …}, {} without BatchNorm)."""
        img_rng, txt_rng = jax.random.split(rng)
        if self.max_patches:
            image = self.img.example(self.max_patches)
        else:
            image = (jnp.zeros((1, self.image_size, self.image_size, 3), jnp.float32),)
        text = jnp.zeros((1, self.text_length), jnp.int32)
        img, stats = running_stats.init(self.img, img_rng, *image)
        params = {
            'img': img,
            'txt': self.txt.init(txt_rng, text, jnp.ones(text.shape, bool))['params'],
            # The dtype is explicit: a weakly typed scalar would make every jitted step compile twice.
            't': jnp.full((1,), self.init_t, jnp.float32),
            'b': jnp.full((1,), self.init_b, jnp.float32),
        }
        return params, {'img': stats} if stats else {}

    def apply(
        self,
        params: dict,
        image: jax.Array | tuple[jax.Array, jax.Array, jax.Array] | None = None,
        text: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        *,
        stats: dict | None = None,
        train: bool = False,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array | None, jax.Array | None, dict]:
        """Embeds what is given.

        Args:
          params: only the subtrees of the given inputs are needed (and 't', 'b' if present are passed on).
          image: float [B,H,W,3] in the model's value range, or None; to a NaFlex tower (patches, mask, grid).
          text: int32 [B,T], or None.
          text_mask: bool [B,T], for a text tower that masks.
          stats: running statistics; None: they are among `params`, as in a bundle's weights.
          train: dropout on (then `rng` is needed if there is any), and BatchNorm over the batch (then `stats` are).
          rng: key for the dropout.

        Returns:
          (zimg float32 [B,E] or None, ztxt float32 [B,E] or None, out), each row of length 1. `out` has 't' and 'b' as
          stored (logits are zimg ztxt^T exp(t) + b), the towers' own intermediates under 'img/...' and 'txt/...', and
          the lengths before normalisation, 'img/norm' and 'txt/norm' [B,1]; in training with a BatchNorm 'img/stats'.
        """
        if image is not None and not self.max_patches:
            chex.assert_shape(image, (None, self.image_size, self.image_size, 3))
        if text is not None:
            chex.assert_shape(text, (None, self.text_length))
        out = {name: params[name] for name in ('t', 'b') if name in params}
        rngs = {'img': None, 'txt': None}
        if rng is not None:
            rngs = {'img': {'dropout': jax.random.fold_in(rng, 0)}, 'txt': {'dropout': jax.random.fold_in(rng, 1)}}
        z = {'img': None, 'txt': None}
        images = image if isinstance(image, tuple) else (image,)
        for name, tower, inputs in (('img', self.img, images), ('txt', self.txt, (text, text_mask))):
            if inputs[0] is None:
                continue
            of_tower = None if stats is None else stats.get(name, {})
            z[name], tower_out = running_stats.apply(
                tower, params[name], of_tower, *inputs, train=train, rngs=rngs[name]
            )
            z[name] = z[name].astype(jnp.float32)
            out |= {f'{name}/{key}': value for key, value in tower_out.items()}
            out[f'{name}/norm'] = _length(z[name])
            z[name] = z[name] / (out[f'{name}/norm'] + 1e-8)
        return z['img'], z['txt'], out

    def forward_flops(self) -> float:
        """Model FLOPs of one image-text pair's forward pass; pair logits are not counted, they depend on the batch."""
        return self.img.flops(self.max_patches or self.image_size) + self.txt.flops(self.text_length)


def _length(x):
    """[B,E] → [B,1]. Of zeros, as a bag of no words gives, it has a gradient: 0, where that of a norm is no number."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def from_config(
    model: config.Model, *, image_size: int, text_length: int, vocab_size: int, max_patches: int = 0
) -> TwoTowers:
    """The model of a validated `config.Model`. An image tower as wide as E gets no head, as SigLIP's.

    Raises UserError for unknown variants, pools, positions, and sizes that do not divide.
    """
    shared = dict(dtype=jnp.dtype(model.dtype), remat=model.remat, scan=model.scan)
    image = image_towers.from_config(model.image, naflex=max_patches > 0, **shared)
    width = image.sizes['width']
    embed_dim = model.embed_dim or width
    if image.pool == 'none':
        raise config.UserError(f'the image tower of a contrastive model needs a pool: {", ".join(vit.POOLS[:-1])}')
    if embed_dim != width:
        image = image.clone(head=embed_dim)
    image_towers.check_head(image, f'the image tower is as wide as the joint space, {width}')
    text = text_towers.from_config(model.text, model.decoder, vocab_size=vocab_size, embed_dim=embed_dim, **shared)
    return TwoTowers(image, text, image_size, text_length, model.init_t, model.init_b, max_patches)
