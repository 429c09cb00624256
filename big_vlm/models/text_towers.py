"""Text encoders for contrastive models: token ids in, one vector out. Axes as in `vit`, E joint embedding width."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_vlm.config import UserError, unknown
from big_vlm.models import vit

POOLS = ('last', 'first', 'mean', 'max', 'map')


class TextTransformer(nn.Module):
    """SigLIP's text tower (arXiv 2303.15343, section 4; bidirectional). text int32 [B,T] -> (z [B,E], out).

    `out` holds 'blocks' [L,B,T,D], 'encoded' [B,T,D] (after the final norm), 'pooled' [B,D]. T is fixed by the position
    embedding: pad to it.

    Attributes:
      embed_dim: E; 0 leaves the pooled vector as it is.
      pool: 'last', 'first', 'mean', 'max' or 'map'.
      mask: False: padding is attended and pooled like text, as SigLIP was trained ('last' is then the last *position*).
        True: only tokens that the mask argument marks as real are.
      embed_init: standard deviation of the token embeddings; 0 is D^-0.5.
      dtype, remat, scan: as in `vit.ViT`.
    """

    vocab_size: int
    variant: str = 'B'
    width: int = 0
    depth: int = 0
    mlp_dim: int = 0
    num_heads: int = 0
    embed_dim: int = 0
    pool: str = 'last'
    mask: bool = False
    embed_init: float = 0.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: str = 'none'
    scan: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        """width, depth, mlp_dim, num_heads. Raises UserError for names and sizes that cannot be."""
        if self.pool not in POOLS:
            raise unknown('pool', self.pool, POOLS, 'text tower')
        if self.remat not in vit.REMATS:
            raise unknown('remat', self.remat, vit.REMATS)
        if '/' in self.variant:
            raise UserError(f'text tower variant {self.variant!r}: a text tower has no patch size')
        return vit.resolve(
            self.variant, width=self.width, depth=self.depth, mlp_dim=self.mlp_dim, num_heads=self.num_heads
        )

    @nn.compact
    def __call__(
        self, text: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`mask` bool [B,T], True for real tokens, is needed if the tower masks and not looked at otherwise."""
        sizes = self.sizes
        width = sizes['width']
        if self.mask and mask is None:
            raise ValueError('this text tower attends to real tokens only: it needs the text mask')
        mask = mask.astype(bool) if self.mask else None
        x = nn.Embed(
            self.vocab_size,
            width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(self.embed_init or width**-0.5),
            name='Embed_0',
        )(text)
        posemb = self.param('pos_embedding', nn.initializers.normal(width**-0.5), (1, text.shape[1], width))
        x = nn.Dropout(self.dropout, deterministic=not train)(x + posemb.astype(self.dtype))
        keys = None if mask is None else mask[:, None, :]
        x, blocks = vit.Encoder(
            sizes['depth'],
            sizes['mlp_dim'],
            sizes['num_heads'],
            self.dropout,
            self.dtype,
            self.remat,
            self.scan,
            name='Encoder_0',
        )(x, keys, train=train)
        out = {'blocks': blocks, 'encoded': x}
        if self.pool == 'map':
            x = vit.MAPHead(sizes['mlp_dim'], sizes['num_heads'], self.dtype, name='MAPHead_0')(x, keys)
        else:
            x = _pool(x, mask, self.pool)
        out['pooled'] = x
        if self.embed_dim:
            x = nn.Dense(self.embed_dim, dtype=self.dtype, name='head')(x)
        return x, out


def _pool(x, mask, kind):
    """[B,T,D] -> [B,D]; without a mask every position counts."""
    if kind == 'first':
        return x[:, 0]
    if mask is None:
        return {'last': lambda: x[:, -1], 'mean': lambda: jnp.mean(x, axis=1), 'max': lambda: jnp.max(x, axis=1)}[
            kind
        ]()
    if kind == 'last':
        last = jnp.max(jnp.where(mask, jnp.arange(x.shape[1]), 0), axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    real = mask[..., None]
    if kind == 'mean':
        return jnp.sum(jnp.where(real, x, 0), axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1).astype(x.dtype)
    return jnp.max(jnp.where(real, x, jnp.finfo(x.dtype).min), axis=1)


def forward_flops(model: TextTransformer, text_length: int) -> float:
    """Model FLOPs of one text's forward pass; the embedding lookup counts nothing."""
    s = model.sizes
    flops = vit.encoder_flops(s['depth'], s['width'], s['mlp_dim'], text_length)
    if model.pool == 'map':
        flops += vit.map_head_flops(s['width'], s['mlp_dim'], text_length)
    return flops + 2.0 * s['width'] * model.embed_dim
