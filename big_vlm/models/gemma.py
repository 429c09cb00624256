"""Gemma 1, 2 and 3 under their published parameter names: embedded tokens in, logits out.

Axes: B batch, T query, S key, N query heads, K kv heads, H head dim, D width, F mlp width, L layers, V vocabulary.
`gemma_variants` has sizes, generations and papers. Layers are alike in their parameters; a local one sees a window of
tokens and a global one all, and where Gemma 3 rotates them differently, which one it is travels beside its weights.
Training runs the layers as one scan over stacked parameters; decoding runs the same `Block` layer by layer over
parameters unstacked once by `unstack_layers` (measured: a third less time per token, and no copy of the cache).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from big_vlm.config import UserError
from big_vlm.models import lora, matrices, quantised, remat
from big_vlm.models.gemma_variants import SIZES, Generation, decode_variant, generation
from big_vlm.ops import kv_cache, masks
from big_vlm.ops.attention import attention
from big_vlm.ops.rope import frequencies, rotate
from big_vlm.sharding.activations import by_rows


def _fan_in(in_axis, out_axis):
    return nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal', in_axis=in_axis, out_axis=out_axis)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + scale), in float32."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        scale = self.param('scale', nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return (x * (1.0 + scale.astype(jnp.float32))).astype(self.dtype)


class Einsum(lora.Adapted):
    """One weight `w`, no bias."""

    shape: tuple[int, ...]
    in_axis: tuple[int, ...]
    out_axis: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, equation, x):
        w = self.param('w', _fan_in(self.in_axis, self.out_axis), self.shape)
        return quantised.einsum(equation, x.astype(self.dtype), w)


class Attention(nn.Module):
    """Rotary, grouped-query attention over the tokens themselves and, given a cache, what it holds; see `Block`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    generation: Generation
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, local, position, mask, cache, length, weights):
        n, k, d, h = self.num_heads, self.num_kv_heads, x.shape[-1], self.head_dim
        rows, split = x.reshape(-1, d), (*x.shape[:2], -1, h)
        if k == n:
            qkv = Einsum((3, n, d, h), (2,), (0, 1, 3), self.dtype, name='qkv_einsum')
            query, key, value = qkv('RD,CNDH->CRNH', rows)
        else:
            query = Einsum((n, d, h), (1,), (0, 2), self.dtype, name='q_einsum')('RD,NDH->RNH', rows)
            key, value = Einsum((2, k, d, h), (2,), (0, 1, 3), self.dtype, name='kv_einsum')('RD,CKDH->CRKH', rows)
        query, key, value = query.reshape(split), key.reshape(split), value.reshape(split)
        if self.generation.qk_norm:
            query = RMSNorm(self.dtype, name='_query_norm')(query)
            key = RMSNorm(self.dtype, name='_key_norm')(key)
        frequency = frequencies(h)
        if self.generation.global_rope is not None:
            frequency = jnp.where(local, frequency, frequencies(h, *self.generation.global_rope))
        query, key = rotate(query, position, frequency), rotate(key, position, frequency)
        if length is not None:
            cache = kv_cache.write_step(cache, key, value, length)
            mask = kv_cache.visible(cache, length, x.shape[1])
        elif cache is not None:
            cache = kv_cache.LayerCache(jnp.concatenate([cache.k, key], 1), jnp.concatenate([cache.v, value], 1))
        else:
            cache = kv_cache.LayerCache(key, value)
        scale = (d / n if self.generation.scale_by_width else h) ** -0.5
        softcap = self.generation.softcap
        z, probs = attention(query, cache.k, cache.v, mask, scale=scale, softcap=softcap, weights=weights)
        rows = z.astype(self.dtype).reshape(-1, n, h)
        rows = Einsum((n, h, d), (0, 1), (2,), self.dtype, name='attn_vec_einsum')('RNH,NHD->RD', rows)
        return rows.reshape(x.shape), cache, probs


class FeedForward(lora.Adapted):
    """GeGLU with the tanh GELU."""

    mlp_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        gating = self.param('gating_einsum', _fan_in((1,), (0, 2)), (2, x.shape[-1], self.mlp_dim))
        linear = self.param('linear', _fan_in((0,), (1,)), (self.mlp_dim, x.shape[-1]))
        rows = x.reshape(-1, x.shape[-1])
        if isinstance(gating, quantised.StandIn):
            gate, up = quantised.einsum('RD,CDF->CRF', rows, gating)
        else:
            gating = gating.astype(self.dtype)
            gate, up = rows @ gating[0], rows @ gating[1]
        rows = quantised.einsum('RF,FD->RD', nn.gelu(gate, approximate=True) * up, linear)
        return rows.reshape(x.shape)


class Block(nn.Module):
    """One layer, the same for training, prefill and decoding.

    Without `length`, `x` [B,T,D] attends under `mask` [B,T,S] to the S - T tokens of `cache`, if there is one, and to
    itself after them; the returned cache holds the keys and values of all S. With it, `x` [B,T,D] is written to its row
    as tokens number `length` and following, each of which attends to itself and what came before. `local` is a bool or,
    in a scan, a bool []: which rotary positions the layer uses.
    """

    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    generation: Generation
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, local, position, mask, cache=None, length=None, *, train=False, weights=False):
        drop = nn.Dropout(self.dropout, deterministic=not train)
        post_norms = self.generation.post_norms
        x = by_rows(x)
        y = RMSNorm(self.dtype, name='pre_attention_norm')(x)
        attn = Attention(self.num_heads, self.num_kv_heads, self.head_dim, self.generation, self.dtype, name='attn')
        y, cache, probs = attn(y, local, position, mask, cache, length, weights)
        x = x + drop(RMSNorm(self.dtype, name='post_attention_norm')(y) if post_norms else y)
        y = RMSNorm(self.dtype, name='pre_ffw_norm')(x)
        y = FeedForward(self.mlp_dim, self.dtype, name='mlp')(y)
        x = x + drop(RMSNorm(self.dtype, name='post_ffw_norm')(y) if post_norms else y)
        return x, cache, probs


class Embedder(lora.Adapted):
    """The token table, used on the way in (times sqrt D) and, transposed, on the way out; and Gemma 3's projector."""

    vocab_size: int
    width: int
    vision_width: int
    dtype: jnp.dtype

    def setup(self):
        init = nn.initializers.normal(self.width**-0.5)
        self.input_embedding = self.param('input_embedding', init, (self.vocab_size, self.width))
        if self.vision_width:
            self.mm_soft_embedding_norm = RMSNorm(self.dtype)
            self.mm_input_projection = Einsum((self.vision_width, self.width), (0,), (1,), self.dtype)

    def encode_vision(self, x):
        return self.mm_input_projection('...M,MD->...D', self.mm_soft_embedding_norm(x))

    def encode(self, tokens):
        table, tokens = self.input_embedding, jnp.maximum(tokens, 0)
        x = table.take(tokens) if isinstance(table, quantised.Quantised) else table[tokens]
        # sqrt(D) is rounded to the weights' dtype, as published.
        return (x * jnp.sqrt(jnp.float32(self.width)).astype(x.dtype)).astype(self.dtype)

    def decode(self, x):
        table, rows = self.input_embedding, x.reshape(-1, self.width)
        if isinstance(table, quantised.Quantised):
            rows = table.product(rows)
        else:
            rows = jnp.einsum('RD,VD->RV', rows, table.astype(self.dtype), preferred_element_type=jnp.float32)
        return rows.reshape(*x.shape[:-1], self.vocab_size)


class Gemma(nn.Module):
    """The decoder. Sizes of 0 are the variant's.

    Attributes:
      vocab_size: V, the rows of the tied embedding.
      window: tokens a local layer sees, the query included.
      vision_width: of the image features that `embed_image` projects (Gemma 3); 0: it has no projector.
      attn_softcap: bounds the attention logits; 0 for none, None for the variant's.
      final_softcap: bounds the logits; 0 for none (Gemma 2: 30, but not in big_vision's training).
      dropout: on each sublayer's output.
      dtype, remat, scan: as in `vit.ViT`.
    """

    vocab_size: int = 257_152
    variant: str = 'gemma_2b'
    width: int = 0
    depth: int = 0
    mlp_dim: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    window: int = 0
    vision_width: int = 0
    attn_softcap: float | None = None
    final_softcap: float = 0.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: str = 'none'
    scan: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        """width, depth, mlp_dim, num_heads, num_kv_heads, head_dim, window. Raises UserError for what cannot be."""
        remat.check(self.remat)
        sizes = decode_variant(self.variant) | {name: getattr(self, name) for name in SIZES if getattr(self, name)}
        if sizes['num_heads'] % sizes['num_kv_heads']:
            raise UserError(
                f'decoder {self.variant!r}: num_heads {sizes["num_heads"]} is not a multiple of '
                f'num_kv_heads {sizes["num_kv_heads"]}'
            )
        if sizes['head_dim'] % 2:
            raise UserError(
                f'decoder {self.variant!r}: head_dim {sizes["head_dim"]} is odd; rotary positions need pairs'
            )
        if self.window and generation(self.variant).period == 1:
            raise UserError(
                f'decoder {self.variant!r}: window {self.window} has no layer to apply to, as all of them are global; '
                'leave it at 0'
            )
        return sizes

    @property
    def generation(self) -> Generation:
        """What a layer consists of. Raises UserError for an unknown variant."""
        published = generation(self.variant)
        return published if self.attn_softcap is None else dataclasses.replace(published, softcap=self.attn_softcap)

    @property
    def windows(self) -> tuple[int, ...]:
        """Of each layer, how many tokens a query sees, itself included; 0 for a global layer, where it sees all."""
        sizes, period = self.sizes, generation(self.variant).period
        return tuple(0 if i % period == period - 1 else sizes['window'] for i in range(sizes['depth']))

    def block(self) -> dict[str, Any]:
        """What one `Block` of this model is built with."""
        sizes = self.sizes
        names = ('mlp_dim', 'num_heads', 'num_kv_heads', 'head_dim')
        made = dict(generation=self.generation, dropout=self.dropout, dtype=self.dtype)
        return {name: sizes[name] for name in names} | made

    def windowed(self, mask: jax.Array, position: jax.Array) -> jax.Array | None:
        """The mask of local layers, from that of global ones; None if there are none."""
        window = self.sizes['window']
        return masks.sliding_window(mask, position, window) if window else None

    def setup(self):
        self.embedder = Embedder(self.vocab_size, self.sizes['width'], self.vision_width, self.dtype)
        self.layers = Block(**self.block())
        self.final_norm = RMSNorm(self.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [..., T] -> [..., T, D], times sqrt D; a negative id reads as 0 (image slots, filled by the caller)."""
        return self.embedder.encode(tokens)

    def embed_image(self, features: jax.Array) -> jax.Array:
        """[..., vision_width] -> RMSNorm -> projection without bias -> [..., D]."""
        return self.embedder.encode_vision(features)

    def normed(self, x: jax.Array) -> jax.Array:
        """The final norm, [..., D] -> [..., D]: what the token table is multiplied with."""
        return self.final_norm(x)

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., D] after the last layer -> final norm -> float32 [..., V]."""
        logits = self.embedder.decode(self.normed(x))
        return self.final_softcap * jnp.tanh(logits / self.final_softcap) if self.final_softcap else logits

    def __call__(
        self, x: jax.Array, position: jax.Array, mask: jax.Array, *, train: bool = False, weights: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """All layers: x [B,T,D], position int32 [B,T], mask bool [B,T,T] -> (x [B,T,D] before the final norm, out).

        `mask` is that of a global layer (`ops.masks.attention_mask`); local layers see their window of it. `out` holds
        'blocks' [L,B,T,D] and, if `weights`, 'attention' float32 [L,B,N,T,T].
        """

        def layer(block, x, local, position, mask, windowed):
            if windowed is not None:
                mask = jnp.where(local, windowed, mask)
            x, _, probs = block(x, local, position, mask, train=train, weights=weights)
            return x, (x, probs)

        depth = self.sizes['depth']
        x, (blocks, probs) = nn.scan(
            remat.remat(layer, self.remat, scan=self.scan),
            variable_axes={'params': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=depth,
            unroll=1 if self.scan else depth,
        )(self.layers, x, jnp.array(self.windows) > 0, position, mask, self.windowed(mask, position))
        return x, {'blocks': blocks} | ({'attention': probs} if weights else {})

    def init_everything(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter once; for `init`."""
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = jnp.ones((*tokens.shape, tokens.shape[1]), bool)
        if self.vision_width:
            self.embed_image(jnp.zeros((1, self.vision_width), self.dtype))
        return self.logits(self(self.embed(tokens), position, mask)[0])


def init(model: Gemma, rng: jax.Array) -> dict:
    """Fresh float32 parameters: truncated normal by fan-in, norm scales 0, token table of standard deviation D^-0.5."""
    return model.init(rng, jnp.zeros((1, 2), jnp.int32), method='init_everything')['params']


def unstack_layers(params: dict, dtype: jnp.dtype = jnp.float32) -> dict:
    """The parameters with 'layers' as a tuple of L single layers, for `run_layers`, their matrices `OutputsFirst`.

    What LoRA put beside a matrix is added to it. The sum is of `dtype`, to be that of activations, to which a product
    rounds it anyway: in float32 all layers would be twice to eight times their base. Copies the layers: do it once, and
    outside of a `jax.jit`, which would copy all else too.
    """
    return {**params, 'layers': _single_layers(params['layers'], jnp.dtype(dtype))}


@functools.partial(jax.jit, static_argnums=1)
def _single_layers(layers: dict, dtype: jnp.dtype) -> tuple[dict, ...]:
    stacked = traverse_util.flatten_dict(layers, sep='/')

    def single(path, layer):
        weight, found = lora.matrix(layer, path), matrices.axes(f'layers/{path}')
        if not found or isinstance(weight, quantised.Quantised):
            return weight
        adapted = any(path + end in layer for end in lora.BESIDE)
        return matrices.OutputsFirst.of(weight.astype(dtype) if adapted else weight, found)

    def unstacked(i):
        layer = {path: jax.tree.map(lambda w: w[i], stack) for path, stack in stacked.items()}
        return {path: single(path, layer) for path in layer if not lora.is_beside(path)}

    depth = len(layers['pre_ffw_norm']['scale'])
    return tuple(traverse_util.unflatten_dict(unstacked(i), sep='/') for i in range(depth))


def stack_layers(params: dict) -> dict:
    """What `unstack_layers` was given, bit for bit, but for adapters."""
    layers = [traverse_util.flatten_dict(layer, sep='/') for layer in params['layers']]

    def stacked(path):
        weights = [layer[path] for layer in layers]
        weights = [w.published() if isinstance(w, matrices.OutputsFirst) else w for w in weights]
        return jax.tree.map(lambda *w: jnp.stack(w), *weights)

    return {**params, 'layers': traverse_util.unflatten_dict({path: stacked(path) for path in layers[0]}, sep='/')}


def run_layers(model: Gemma, params: dict, x, position, mask=None, cache=None, length=None):
    """The layers of unstacked `params`, one after another: (x, tuple of LayerCache).

    Either a step: `x` [B,T,D], `position` [B,T], `cache` (a LayerCache per layer) and `length`, as `Block`'s. Or whole
    rows of S tokens: `position` [B,S], `mask` bool [B,S,S], that of a global layer, and of `x` the last T tokens, whose
    S - T first ones `cache` holds as an earlier call returned them.
    """
    block = Block(**model.block())
    windowed = None if mask is None else model.windowed(mask, position)
    position, mask, windowed = (a if a is None else a[:, -x.shape[1] :] for a in (position, mask, windowed))
    caches = []
    for i, (layer, window) in enumerate(zip(params['layers'], model.windows, strict=True)):
        seen = windowed if window else mask
        x, kv, _ = block.apply({'params': layer}, x, window > 0, position, seen, cache and cache[i], length)
        caches.append(kv)
    return x, tuple(caches)


def embed(model: Gemma, params: dict, tokens: jax.Array) -> jax.Array:
    """`Gemma.embed` on stacked or unstacked parameters."""
    return model.apply({'params': {'embedder': params['embedder']}}, tokens, method='embed')


def embed_image(model: Gemma, params: dict, features: jax.Array) -> jax.Array:
    """`Gemma.embed_image` on stacked or unstacked parameters."""
    return model.apply({'params': {'embedder': params['embedder']}}, features, method='embed_image')


def logits(model: Gemma, params: dict, x: jax.Array) -> jax.Array:
    """`Gemma.logits` on stacked or unstacked parameters."""
    ends = {name: params[name] for name in ('embedder', 'final_norm')}
    return model.apply({'params': ends}, x, method='logits')


def normed(model: Gemma, params: dict, x: jax.Array) -> jax.Array:
    """`Gemma.normed` on stacked or unstacked parameters."""
    return model.apply({'params': {'final_norm': params['final_norm']}}, x, method='normed')


def forward_flops(model: Gemma, length: int, logits_length: int) -> float:
    """Model FLOPs of one row of `length` tokens with logits at `logits_length` of them; every query-key pair counts."""
    s = model.sizes
    projections = s['width'] * s['head_dim'] * (2 * s['num_heads'] + 2 * s['num_kv_heads'])
    per_token = 2 * (projections + 3 * s['width'] * s['mlp_dim']) + 4 * length * s['num_heads'] * s['head_dim']
    return float(s['depth'] * length * per_token + 2 * logits_length * s['width'] * model.vocab_size)
