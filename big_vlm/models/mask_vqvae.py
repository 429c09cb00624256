"""The mask VQ-VAE of PaliGemma's segmentation tokens: 64×64 masks as 16 of 128 codes (`data/mask_codes.py` has more).

B batch, h w height and width, C channels. A layer's path is its published name with the dots of a block as underscores:
`encoder/8_net_0/kernel` is `encoder.8.net.0.weight`. The codebook is no parameter, as it has no gradients.
"""

from __future__ import annotations

import dataclasses
import math

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from big_vlm.data import mask_codes
from big_vlm.ops import vector_quantization


class _Doubling(nn.Module):
    """A transposed convolution of 4×4 with stride 2 and padding 1, [B,h,w,C] → [B,2h,2w,O], as one matrix product.

    Every 2×2 pixels of it are made of 2×2 of what comes in, half a pixel off. The decoder's gradients take a quarter of
    the time on CPUs that they took with the convolution.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (4, 4, self.features, x.shape[-1]))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = jnp.concatenate([x[:, :-1], x[:, 1:]], axis=-1)
        x = jnp.concatenate([x[:, :, :-1], x[:, :, 1:]], axis=-1)
        kernel = einops.rearrange(kernel, '(a p) (b q) O C -> b a C p q O', a=2, b=2)[::-1, ::-1]
        x = x @ kernel.reshape(x.shape[-1], -1) + jnp.tile(bias, 4)
        return einops.rearrange(x, 'B h w (p q O) -> B (h p) (w q) O', p=2, q=2)[:, 1:-1, 1:-1]


class _Layers(nn.Module):
    """Convolutions by their published names."""

    def conv(self, name: str, x: jax.Array) -> jax.Array:
        """[B,h,w,C] → [B,h,w,O], halved or doubled if the layer does that."""
        part, _, layer = name.partition('.')
        shape, how = mask_codes.LAYERS[name], dict(name=layer.replace('.', '_'))
        if name in mask_codes.DOUBLING:
            return _Doubling(shape[1], **how)(x)
        halves = name in mask_codes.HALVING
        return nn.Conv(shape[0], shape[2:], 2 if halves else 1, padding=(shape[2] - 1) // 2, **how)(x)

    def block(self, name: str, x: jax.Array) -> jax.Array:
        y = x
        for i in mask_codes.BLOCK:
            y = self.conv(f'{name}.{i}', nn.relu(y) if i != '0' else y)
        return x + y


class Encoder(_Layers):
    """Masks [B,64,64,1] in −1..1 → vectors [B,4,4,512]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name in mask_codes.HALVING:
            x = nn.relu(self.conv(name, x))
        for name in mask_codes.ENCODER_BLOCKS:
            x = self.block(name, x)
        return self.conv('encoder.10', x)


class Decoder(_Layers):
    """Vectors [B,4,4,512] → masks [B,64,64,1], about −1 to 1."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(self.conv('decoder.0', x))
        for name in mask_codes.DECODER_BLOCKS:
            x = self.block(name, x)
        for name in mask_codes.DOUBLING:
            x = nn.relu(self.conv(name, x))
        return self.conv('decoder.12', x)


@dataclasses.dataclass(frozen=True)
class MaskVQVAE:
    """The network as pure functions of its parameters, {'encoder', 'decoder'}, and its codebook (`ops`)."""

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        """(parameters, {'codebook': …}); its rows are normal, as in the published code."""
        encoder, decoder, book = jax.random.split(rng, 3)
        shape = (mask_codes.CODES, mask_codes.CODE_DIM)
        params = {
            'encoder': Encoder().init(encoder, jnp.zeros((1, mask_codes.SIDE, mask_codes.SIDE, 1)))['params'],
            'decoder': Decoder().init(decoder, jnp.zeros((1, mask_codes.GRID, mask_codes.GRID, shape[1])))['params'],
        }
        rows = jax.random.normal(book, shape)
        # A copy: two leaves of a donated state must not share a buffer.
        codebook = {'embedding': rows, 'ema_w': jnp.copy(rows), 'ema_cluster_size': jnp.zeros(shape[0])}
        return params, {'codebook': codebook}

    def vectors(self, params: dict, masks: jax.Array) -> jax.Array:
        """Masks [B,64,64] in −1..1 → [B,16,512], in reading order."""
        x = Encoder().apply({'params': params['encoder']}, masks[..., None])
        return x.reshape(len(x), mask_codes.GRID**2, mask_codes.CODE_DIM)

    def from_vectors(self, params: dict, vectors: jax.Array) -> jax.Array:
        """[B,16,512] → masks [B,64,64], about −1 outside to 1 inside."""
        x = vectors.reshape(-1, mask_codes.GRID, mask_codes.GRID, mask_codes.CODE_DIM)
        return Decoder().apply({'params': params['decoder']}, x)[..., 0]

    def encode(self, weights: dict, masks: jax.Array) -> jax.Array:
        """Masks [B,64,64] in −1..1 → codes int32 [B,16]. `weights`: parameters and codebook."""
        return vector_quantization.nearest(self.vectors(weights, masks), weights['codebook']['embedding'])

    def decode(self, weights: dict, codes: jax.Array) -> jax.Array:
        """Codes int32 [B,16] → masks [B,64,64]: above 0 is the object."""
        return self.from_vectors(weights, weights['codebook']['embedding'][codes])

    def forward_flops(self) -> float:
        """Of one mask: two for every product of a convolution, and of the distances from the codebook."""
        flops, side = 2.0 * mask_codes.GRID**2 * mask_codes.CODES * mask_codes.CODE_DIM, mask_codes.SIDE
        for name in mask_codes.HALVING:
            side //= 2
            flops += 2 * side**2 * math.prod(mask_codes.LAYERS[name])
        for name in mask_codes.DOUBLING:
            flops += 2 * side**2 * math.prod(mask_codes.LAYERS[name])
            side *= 2
        for name in mask_codes.LAYERS.keys() - mask_codes.HALVING.keys() - mask_codes.DOUBLING.keys():
            pixels = mask_codes.SIDE**2 if name == 'decoder.12' else mask_codes.GRID**2
            flops += 2 * pixels * math.prod(mask_codes.LAYERS[name])
        return flops
