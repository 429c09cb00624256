"""Text encoders for contrastive models: token ids in, one vector out. Axes as in `vit`, E joint embedding width.

Any of them goes with any image tower: text int32 [B,T] and its mask bool [B,T] -> (z [B,E], out), where `out` holds
'encoded' [B,T,D] and 'pooled' [B,D].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_vlm import config
from big_vlm.config import UserError, unknown
from big_vlm.models import gemma, lora, remat, vit
from big_vlm.ops import masks

POOLS = ('last', 'first', 'mean', 'max', 'map', 'tok')


class TextTransformer(nn.Module):
    """A transformer. As SigLIP's it is bidirectional and reads padding (arXiv 2303.15343, section 4), CLIP's is causal.

    `out` holds 'blocks' [L,B,T,D] besides. T is fixed by the position embedding: pad to it.

    Attributes:
      embed_dim: E; 0 leaves the pooled vector as it is.
      pool: 'last', 'first', 'mean', 'max', 'map' (attention) or 'tok', a class token behind the text.
      mask: False: padding is attended and pooled like text, as SigLIP was trained ('last' is then the last *position*).
        True: only tokens that the mask argument marks as real are.
      causal: a token sees those before it and itself alone.
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
    causal: bool = False
    embed_init: float = 0.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: str = 'none'
    scan: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        """width, depth, mlp_dim, num_heads. Raises UserError for names and sizes that cannot be."""
        _check_pool(self.pool, POOLS)
        remat.check(self.remat)
        return vit.resolve(
            _no_patch(self.variant), width=self.width, depth=self.depth, mlp_dim=self.mlp_dim, num_heads=self.num_heads
        )

    @nn.compact
    def __call__(
        self, text: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`mask` is needed if the tower masks and not looked at otherwise."""
        sizes = self.sizes
        width = sizes['width']
        mask = _seen(self, mask)
        x = _embedding(self, width)(text)
        posemb = self.param('pos_embedding', nn.initializers.normal(width**-0.5), (1, text.shape[1], width))
        x = x + posemb.astype(self.dtype)
        if self.pool == 'tok':
            cls = self.param('cls', nn.initializers.zeros, (1, 1, width))
            x = jnp.concatenate([x, jnp.broadcast_to(cls.astype(self.dtype), (x.shape[0], 1, width))], axis=1)
            mask = None if mask is None else jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
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
        )(x, attended(keys, x.shape[1], self.causal), train=train)
        out = {'blocks': blocks, 'encoded': x[:, : text.shape[1]]}
        if self.pool == 'map':
            x = vit.MAPHead(sizes['mlp_dim'], sizes['num_heads'], self.dtype, name='MAPHead_0')(x, keys)
        else:
            x = _pool(x, mask, self.pool)
        return _head(self, x), out | {'pooled': x}

    @nn.nowrap
    def flops(self, text_length: int) -> float:
        """Model FLOPs of one text's forward pass; lookups and norms count nothing."""
        s = self.sizes
        flops = vit.encoder_flops(s['depth'], s['width'], s['mlp_dim'], text_length + (self.pool == 'tok'))
        if self.pool == 'map':
            flops += vit.map_head_flops(s['width'], s['mlp_dim'], text_length)
        return flops + 2.0 * s['width'] * self.embed_dim


class TextLSTM(nn.Module):
    """Layers of LSTM from the first token to the last. Attributes as `TextTransformer`'s; a variant gives D and L."""

    vocab_size: int
    variant: str = 'B'
    width: int = 0
    depth: int = 0
    embed_dim: int = 0
    pool: str = 'last'
    mask: bool = False
    embed_init: float = 0.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @property
    def sizes(self) -> dict[str, int]:
        """width, depth. Raises UserError for names that cannot be."""
        _check_pool(self.pool, ('last', 'first', 'mean', 'max'))
        sizes = vit.decode_variant(_no_patch(self.variant))
        return {'width': self.width or sizes['width'], 'depth': self.depth or sizes['depth']}

    @nn.compact
    def __call__(
        self, text: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`mask` is needed if the tower masks and not looked at otherwise."""
        sizes = self.sizes
        mask = _seen(self, mask)
        x = _embedding(self, sizes['width'])(text)
        for i in range(sizes['depth']):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.RNN(nn.OptimizedLSTMCell(sizes['width'], dtype=self.dtype, name=f'lstm_{i}'))(x)
        pooled = _pool(x, mask, self.pool)
        return _head(self, pooled), {'encoded': x, 'pooled': pooled}

    @nn.nowrap
    def flops(self, text_length: int) -> float:
        """As `TextTransformer.flops`: four gates of the token and of the state."""
        s = self.sizes
        return 16.0 * s['depth'] * text_length * s['width'] ** 2 + 2.0 * s['width'] * self.embed_dim


class BagOfWords(nn.Module):
    """The tokens' embeddings, averaged or their largest numbers. Attributes as `TextTransformer`'s."""

    vocab_size: int
    variant: str = 'B'
    width: int = 0
    embed_dim: int = 0
    pool: str = 'mean'
    mask: bool = False
    embed_init: float = 0.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @property
    def sizes(self) -> dict[str, int]:
        """width. Raises UserError for names that cannot be."""
        _check_pool(self.pool, ('mean', 'max'))
        return {'width': self.width or vit.decode_variant(_no_patch(self.variant))['width']}

    @nn.compact
    def __call__(
        self, text: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`mask` is needed if the tower masks and not looked at otherwise."""
        mask = _seen(self, mask)
        x = _embedding(self, self.sizes['width'])(text)
        pooled = _pool(nn.Dropout(self.dropout, deterministic=not train)(x), mask, self.pool)
        return _head(self, pooled), {'encoded': x, 'pooled': pooled}

    @nn.nowrap
    def flops(self, text_length: int) -> float:
        """As `TextTransformer.flops`: the head's alone."""
        del text_length
        return 2.0 * self.sizes['width'] * self.embed_dim


class TextGemma(nn.Module):
    """A language model as text encoder: a Gemma's states after its final norm, pooled.

    Parameters: the decoder's under 'llm', as in a PaliGemma, so that its weights load by
    `init_from.parts={'txt/llm': 'llm'}`. Frozen or trained as the optimizer's rules say.

    Attributes:
      llm: the decoder; its token table is the vocabulary.
      causal: as the decoder was trained; False lets every token see all.
      embed_dim, pool, mask, dtype: as `TextTransformer`'s.
    """

    llm: gemma.Gemma
    embed_dim: int = 0
    pool: str = 'last'
    mask: bool = False
    causal: bool = True
    dtype: jnp.dtype = jnp.float32

    @property
    def sizes(self) -> dict[str, int]:
        """The decoder's. Raises UserError for names and sizes that cannot be."""
        _check_pool(self.pool, ('last', 'first', 'mean', 'max'))
        return self.llm.sizes

    @nn.compact
    def __call__(
        self, text: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`mask` is needed if the tower masks and not looked at otherwise."""
        mask = _seen(self, mask)
        real = jnp.ones(text.shape, bool) if mask is None else mask
        position = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        visible = masks.attention_mask(real.astype(jnp.int32), jnp.full(text.shape, self.causal))
        x, out = self.llm(self.llm.embed(text), position, visible, train=train)
        x = self.llm.final_norm(x)
        pooled = _pool(x, mask, self.pool)
        return _head(self, pooled), {'blocks': out['blocks'], 'encoded': x, 'pooled': pooled}

    @nn.nowrap
    def flops(self, text_length: int) -> float:
        """As `TextTransformer.flops`."""
        return gemma.forward_flops(self.llm, text_length, 0) + 2.0 * self.sizes['width'] * self.embed_dim


# kind → (module, the settings of `config.TextTower` that it has none of)
TOWERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    'transformer': (TextTransformer, ()),
    'lstm': (TextLSTM, ('mlp_dim', 'num_heads', 'causal')),
    'bag': (BagOfWords, ('depth', 'mlp_dim', 'num_heads', 'causal')),
    'gemma': (TextGemma, ('variant', 'width', 'depth', 'mlp_dim', 'num_heads', 'embed_init', 'dropout')),
}


def from_config(
    text: config.TextTower, decoder: config.Decoder, *, vocab_size: int, embed_dim: int, **shared: Any
) -> nn.Module:
    """The tower that a config's `model.text` (and, for a Gemma, `model.decoder`) describes.

    Args:
      text, decoder: validated.
      vocab_size: of the tokenizer.
      embed_dim: E.
      shared: dtype, remat and scan.

    Raises:
      UserError: an unknown kind or variant, a pool or setting that this kind does not have.
    """
    if text.kind not in TOWERS:
        raise unknown('text tower', text.kind, TOWERS, 'model.text.kind')
    module, without = TOWERS[text.kind]
    for name in without:
        value, default = getattr(text, name), getattr(config.TextTower(), name)
        if value != default:
            hint = '; its settings are those of model.decoder' if text.kind == 'gemma' else ''
            raise UserError(f'model.text.{name}={value!r}: a text tower of kind {text.kind!r} has none{hint}')
    settings = {k: v for k, v in dataclasses.asdict(text).items() if k != 'kind' and k not in without}
    if text.kind == 'gemma':
        llm = gemma.Gemma(vocab_size=vocab_size, **dataclasses.asdict(decoder), **shared)
        tower = TextGemma(llm, embed_dim, dtype=shared['dtype'], **settings)
    else:
        if text.kind != 'transformer':  # nothing in it to recompute or to scan
            shared = {'dtype': shared['dtype']}
        tower = module(vocab_size=vocab_size, embed_dim=embed_dim, **settings, **shared)
    _ = tower.sizes
    return tower


def _check_pool(pool, valid):
    if pool not in valid:
        raise unknown('pool', pool, valid, 'text tower')


def _no_patch(variant):
    if '/' in variant:
        raise UserError(f'text tower variant {variant!r}: a text tower has no patch size')
    return variant


def attended(keys: jax.Array | None, length: int, causal: bool) -> jax.Array | None:
    """Who sees whom in a `TextTransformer`: bool [B or 1, T or 1, T], None where everyone sees all.

    `keys`: bool [B,1,T], what may be seen at all; None: everything.
    """
    if not causal:
        return keys
    earlier = jnp.tril(jnp.ones((1, length, length), bool))
    return earlier if keys is None else earlier & keys


def _seen(tower, mask):
    """The mask of a tower that masks, None for one that does not."""
    if tower.mask and mask is None:
        raise ValueError('this text tower attends to real tokens only: it needs the text mask')
    return mask.astype(bool) if tower.mask else None


def _embedding(tower, width):
    init = nn.initializers.normal(tower.embed_init or width**-0.5)
    return nn.Embed(tower.vocab_size, width, dtype=tower.dtype, embedding_init=init, name='Embed_0')


def _head(tower, x):
    return lora.Dense(tower.embed_dim, dtype=tower.dtype, name='head')(x) if tower.embed_dim else x


def _pool(x, mask, kind):
    """[B,T,D] -> [B,D]; without a mask every position counts. 'tok' is the last of all.

    Of a text without a real token, 'mean' and 'max' are 0, and 'last' is what stands at the first position.
    """
    if kind == 'first':
        return x[:, 0]
    if kind == 'tok':
        return x[:, -1]
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
    largest = jnp.max(jnp.where(real, x, jnp.finfo(x.dtype).min), axis=1)
    return jnp.where(jnp.any(real, axis=1), largest, 0)
