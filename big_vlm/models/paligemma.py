"""PaliGemma (arXiv 2407.07726): a ViT's tokens, projected, fill the image slots of a Gemma's input.

Of an image the decoder gets either every patch (PaliGemma), or the grid of patches averaged down to fewer (Gemma 3,
arXiv 2503.19786, section 2.1), or one vector. Parameters: {'img': ..., 'llm': ...}; `img/head` projects, for Gemma 3
`llm/embedder/mm_*`. Axes: B batch, I images, P tokens per image, T image and text slots, D decoder width, V
vocabulary, L layers, S cache slots.
"""

from __future__ import annotations

import dataclasses
import math

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from big_vlm import config
from big_vlm.models import gemma, image_towers, running_stats
from big_vlm.ops import kv_cache, masks


@dataclasses.dataclass(frozen=True)
class PaliGemma:
    """The model's modules and the image size it reads.

    Attributes:
      img: a Linen module, image float [B,H,W,3] -> (patches [B,P,D] or one vector [B,D], out). With `pooled_tokens`,
        patches of the width that the decoder's projector takes. None: a decoder alone, which sees no images.
      llm: the decoder.
      image_size: pixels per side, for `init`, `image_tokens` and FLOPs.
      max_patches: of an image, if `img` is a `naflex_vit.NaFlexViT`, instead of `image_size`; else 0.
      pooled_tokens: P if the decoder projects averages over squares of the patch grid (Gemma 3: 256); 0 if `img`
        projects what it returns.
    """

    img: nn.Module | None
    llm: gemma.Gemma
    image_size: int
    pooled_tokens: int = 0
    max_patches: int = 0

    @property
    def image_tokens(self) -> int:
        """P, the slots one image takes."""
        if self.img is None:
            return 0
        if self.img.pool != 'none':
            return 1
        return self.max_patches or self.pooled_tokens or self.img.tokens(self.image_size)

    def init(self, rng: jax.Array) -> dict:
        """Fresh float32 parameters. Use under `jax.jit` or `jax.eval_shape`."""
        return self.init_with_stats(rng)[0]

    def init_with_stats(self, rng: jax.Array) -> tuple[dict, dict]:
        """(`init`, running statistics {'img': …}, {} without BatchNorm)."""
        img_rng, llm_rng = jax.random.split(rng)
        if self.img is None:
            return {'llm': gemma.init(self.llm, llm_rng)}, {}
        image = (jnp.zeros((1, self.image_size, self.image_size, 3), jnp.float32),)
        if self.max_patches:
            image = self.img.example(self.max_patches)
        img, stats = running_stats.init(self.img, img_rng, *image)
        return {'img': img, 'llm': gemma.init(self.llm, llm_rng)}, {'img': stats} if stats else {}

    def image_features(
        self,
        params: dict,
        image: jax.Array | tuple[jax.Array, jax.Array, jax.Array],
        *,
        stats: dict | None = None,
        train: bool = False,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """What the decoder is given of the images: ([B,I·P,D], the image tower's `out`). Arguments as in `apply`."""
        images, inputs = 1, image
        if not self.max_patches:
            chex.assert_shape(image, (None, None, self.image_size, self.image_size, 3))
            images, inputs = image.shape[1], (image.reshape(-1, *image.shape[2:]),)
        rngs = None if rng is None else {'dropout': rng}
        of_tower = None if stats is None else stats.get('img', {})
        z, out = running_stats.apply(self.img, params['img'], of_tower, *inputs, train=train, rngs=rngs)
        if self.pooled_tokens:
            z = gemma.embed_image(self.llm, params['llm'], pool(z, self.pooled_tokens))
        # Not len(): an exported function's batch has no number.
        batch = image[0].shape[0] if self.max_patches else image.shape[0]
        return z.reshape(batch, images * self.image_tokens, -1), out

    def embed(self, params: dict, features: jax.Array | None, image_mask: jax.Array | None, text: jax.Array):
        """The decoder's input [B,T,D]: text embeddings times sqrt D, and image features, unscaled, where `text` is -1.

        The k-th such slot of a row takes the k-th of the `features` [B,I·P,D] of the row's real images; None: no image.
        """
        x = gemma.embed(self.llm, params['llm'], text)
        chex.assert_rank(text, 2)
        if features is None:
            return x
        patches, hole = self.image_tokens, text < 0
        images = features.shape[1] // patches
        slot = jnp.cumsum(hole, axis=1) - 1
        if image_mask is not None:
            chex.assert_shape(image_mask, (text.shape[0], images))
            # Real images first, each kind in its order: the k-th slot belongs to the k-th *real* feature.
            order = jnp.argsort(~image_mask.astype(bool), axis=1, stable=True)
            which = jnp.take_along_axis(order, jnp.clip(slot // patches, 0, images - 1), axis=1)
            slot = which * patches + slot % patches
        filled = jnp.take_along_axis(features, jnp.clip(slot, 0, images * patches - 1)[..., None], axis=1)
        return jnp.where(hole[..., None], filled.astype(x.dtype), x)

    def apply(
        self,
        params: dict,
        image: jax.Array | tuple[jax.Array, jax.Array, jax.Array] | None,
        image_mask: jax.Array | None,
        text: jax.Array,
        segment: jax.Array,
        position: jax.Array,
        mask_ar: jax.Array,
        *,
        logits_from: int | None = 0,
        stats: dict | None = None,
        train: bool = False,
        rng: jax.Array | None = None,
        attention: bool = False,
    ) -> tuple[jax.Array | None, dict]:
        """The whole sequence at once, for training and scoring.

        Args:
          params: as `init` returns them (layers stacked), or from `unstack_layers`, where they are not trained.
          image: float [B,I,H,W,3] in the model's value range, or None for text alone; to a NaFlex tower, of one image,
            (patches, mask, grid), whose slots beyond its patches are padding in `segment`.
          image_mask: bool [B,I], False for images that are only padding; None: all real.
          text: int32 [B,T], -1 at image slots.
          segment: int32 [B,T], 0 for padding, else the packed example.
          position: int32 [B,T], from 0.
          mask_ar: [B,T]; see `ops.masks.attention_mask`.
          logits_from: compute logits from this slot on, None: none at all. PaliGemma's image slots need none: the
            vocabulary is the widest matrix of all.
          stats: running statistics; None: they are among `params`, as in a bundle's weights.
          train: dropout on (then `rng` is needed if there is any), and BatchNorm over the batch (then `stats` are).
          rng: key for the dropout.
          attention: also return every layer's attention weights.

        Returns:
          (logits float32 [B, T - logits_from, V], where logits[:, i] predict slot logits_from + i + 1, out). `out` has
          'decoded' [B,T,D] (before the final norm: `gemma.logits` on a gather of it gives logits at chosen slots), the
          image tower's under 'img/...' (in training with a BatchNorm 'img/stats'), and of stacked layers 'blocks'
          [L,B,T,D] and if asked 'attention' float32 [L,B,N,T,T].
        """
        chex.assert_equal_shape([text, segment, position, mask_ar])
        rngs = (None, None) if rng is None else tuple(jax.random.split(rng))
        features, out = None, {}
        if image is not None:
            features, out = self.image_features(params, image, stats=stats, train=train, rng=rngs[0])
            out = {f'img/{k}': v for k, v in out.items()}
        x = self.embed(params, features, image_mask, text)
        mask = masks.attention_mask(segment, mask_ar)
        if isinstance(params['llm']['layers'], tuple):
            (x, _), llm_out = gemma.run_layers(self.llm, params['llm'], x, position, mask), {}
        else:
            llm_rngs = None if rng is None else {'dropout': rngs[1]}
            llm_params = {'params': params['llm']}
            x, llm_out = self.llm.apply(llm_params, x, position, mask, train=train, weights=attention, rngs=llm_rngs)
        logits = None if logits_from is None else gemma.logits(self.llm, params['llm'], x[:, logits_from:])
        return logits, out | llm_out | {'decoded': x}

    def encode(
        self,
        params: dict,
        image: jax.Array | tuple[jax.Array, jax.Array, jax.Array],
        image_mask: jax.Array | None,
        text: jax.Array,
        segment: jax.Array,
        position: jax.Array,
        mask_ar: jax.Array,
        *,
        alone: bool,
    ) -> jax.Array | tuple[kv_cache.LayerCache, ...]:
        """What `prefill` would compute of a row's images whatever its prompt: make it once for many prompts.

        The images' features [B,I·P,D]; or, if the images see no prompt (`alone`) and their slots come first, keys and
        values of those slots in all layers. `params` from `unstack_layers`, the rest as in `apply`.
        """
        features, _ = self.image_features(params, image)
        if not alone:
            return features
        first = features.shape[1]
        text, segment, position, mask_ar = (a[:, :first] for a in (text, segment, position, mask_ar))
        x = self.embed(params, features, image_mask, text)
        return gemma.run_layers(self.llm, params['llm'], x, position, masks.attention_mask(segment, mask_ar))[1]

    def prefill(
        self,
        params: dict,
        image: jax.Array | tuple[jax.Array, jax.Array, jax.Array] | None,
        image_mask: jax.Array | None,
        text: jax.Array,
        segment: jax.Array,
        position: jax.Array,
        mask_ar: jax.Array,
        *,
        cache_size: int,
        ahead: int = 0,
        encoded: jax.Array | tuple[kv_cache.LayerCache, ...] | None = None,
    ) -> tuple[jax.Array, kv_cache.KVCache]:
        """Reads the prompts. `params` from `unstack_layers`; rows may differ in length, padding anywhere.

        Args:
          image, image_mask, text, segment, position, mask_ar: as in `apply`.
          cache_size: S.
          ahead: what `extend` may be given beyond one token, and `kv_cache.rewind` take back.
          encoded: what `encode` made of the images, instead of `image`.

        Returns:
          (logits float32 [B,V] at each row's last real token, the cache of `cache_size` slots in the model's dtype).

        Raises:
          ValueError: `cache_size` is below T.
        """
        chex.assert_equal_shape([text, segment, position, mask_ar])
        batch, length = text.shape
        if cache_size < length:
            raise ValueError(f'a cache of {cache_size} slots cannot hold prompts of {length}')
        before = encoded if isinstance(encoded, tuple) else None
        first = before[0].k.shape[1] if before else 0
        features = None if before else encoded
        if image is not None:
            features, _ = self.image_features(params, image)
        x = self.embed(params, features, image_mask, text[:, first:])
        mask, real = masks.attention_mask(segment, mask_ar), segment > 0
        x, keys_values = gemma.run_layers(self.llm, params['llm'], x, position, mask, before)
        sizes = self.llm.sizes
        shape = (sizes['depth'], batch, cache_size, sizes['num_kv_heads'], sizes['head_dim'])
        cache = kv_cache.empty(*shape, self.llm.dtype, self.llm.windows, ahead)
        layers = tuple(
            kv_cache.write_prefill(layer, new.k, new.v, position, real)
            for layer, new in zip(cache.layers, keys_values, strict=True)
        )
        last = jnp.max(jnp.where(real, jnp.arange(length), 0), axis=1) - first
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        cache = kv_cache.KVCache(layers, jnp.sum(real, axis=1, dtype=jnp.int32))
        return gemma.logits(self.llm, params['llm'], x), cache

    def decode_step(
        self, params: dict, token: jax.Array, cache: kv_cache.KVCache
    ) -> tuple[jax.Array, kv_cache.KVCache]:
        """Appends `token` int32 [B] to each row and returns (logits float32 [B,V] of the next one, cache).

        `params` from `unstack_layers`. The logits of a row whose cache was full mean nothing.
        """
        chex.assert_equal_shape([token, cache.length])
        logits, cache = self.extend(params, token[:, None], cache)
        return logits[:, 0], cache

    def extend(self, params: dict, tokens: jax.Array, cache: kv_cache.KVCache) -> tuple[jax.Array, kv_cache.KVCache]:
        """`decode_step` of `tokens` int32 [B,T] at once: (logits float32 [B,T,V] after each, cache)."""
        x = gemma.embed(self.llm, params['llm'], tokens)
        position = cache.length[:, None] + jnp.arange(tokens.shape[1])
        x, layers = gemma.run_layers(self.llm, params['llm'], x, position, cache=cache.layers, length=cache.length)
        return gemma.logits(self.llm, params['llm'], x), kv_cache.KVCache(layers, cache.length + tokens.shape[1])

    def forward_flops(self, text_length: int, num_images: int = 1) -> float:
        """Model FLOPs of one example's forward pass: its images, the whole sequence, logits on the text slots."""
        if self.img is None:
            return gemma.forward_flops(self.llm, text_length, text_length)
        length = num_images * self.image_tokens + text_length
        per_image = self.img.flops(self.max_patches or self.image_size)
        per_image += 2.0 * self.image_tokens * self.llm.vision_width * self.llm.sizes['width']
        return num_images * per_image + gemma.forward_flops(self.llm, length, text_length)


def pool(patches: jax.Array, tokens: int) -> jax.Array:
    """A square grid of patches [B,P,D], row by row, averaged over squares down to [B,tokens,D]."""
    side, grid = math.isqrt(tokens), math.isqrt(patches.shape[1])
    names = dict(h=side, w=side, y=grid // side, x=grid // side)
    return einops.reduce(patches, 'B (h y w x) D -> B (h w) D', 'mean', **names)


def unstack_layers(params: dict, dtype: jnp.dtype = jnp.float32) -> dict:
    """Parameters for `prefill` and `decode_step`: the decoder's layers one by one, as they may be already, see
    `gemma.unstack_layers`."""
    if isinstance(params['llm']['layers'], tuple):
        return params
    return {**params, 'llm': gemma.unstack_layers(params['llm'], dtype)}


def stack_layers(params: dict) -> dict:
    """What `unstack_layers` was given, but for adapters. Copies the layers, and nothing else."""
    return {**params, 'llm': {**params['llm'], 'layers': _stacked(params['llm'])}}


_stacked = jax.jit(lambda llm: gemma.stack_layers(llm)['layers'])


def from_config(model: config.Model, *, image_size: int, vocab_size: int, max_patches: int = 0) -> PaliGemma:
    """The model of a validated `config.Model`. Its projector decides how the image tower pools, not `image.pool`.

    Raises UserError for unknown variants and sizes that do not divide.
    """
    shared = dict(dtype=jnp.dtype(model.dtype), remat=model.remat, scan=model.scan)
    decoder = gemma.Gemma(vocab_size=vocab_size, **dataclasses.asdict(model.decoder), **shared)
    tower = dataclasses.replace(model.image, pool='tok' if model.projector == 'cls' else 'none')
    if model.projector == 'none' and max_patches:
        raise config.UserError("model.projector 'none': there are no images, leave contract.max_patches at 0")
    if model.projector != 'pooled':
        if model.image_tokens:
            raise config.UserError(
                f'model.image_tokens {model.image_tokens}: projector {model.projector!r} does not average patches; '
                "leave it at 0, or take projector 'pooled'"
            )
        if model.projector == 'none':
            return PaliGemma(None, decoder, image_size)
        naflex = max_patches > 0
        if naflex and model.projector == 'cls':
            raise config.UserError("model.projector 'cls': with contract.max_patches there is no class token")
        image = image_towers.from_config(tower, head=decoder.sizes['width'], naflex=naflex, **shared)
        return PaliGemma(image, decoder, image_size, max_patches=max_patches)
    if max_patches:
        raise config.UserError("model.projector 'pooled': with contract.max_patches there is no square to average")
    image = image_towers.from_config(tower, **shared)
    image_towers.check_head(image, "projector 'pooled' belongs to the decoder")
    tokens = model.image_tokens or 256
    grid, side = math.isqrt(image.tokens(image_size)), math.isqrt(tokens)
    if side**2 != tokens or grid % side or not grid:
        raise config.UserError(
            f'model.image_tokens {tokens}: a grid of {grid}x{grid} patches ({image_size} px, '
            f'{model.image.variant}) does not average down to so many: take a square whose side divides {grid}'
        )
    return PaliGemma(image, decoder.clone(vision_width=image.sizes['width']), image_size, tokens)
