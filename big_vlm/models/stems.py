"""What makes an image tower's tokens of an image: one product per patch, or a few small convolutions.

Axes: B batch, h w the grid of patches, p q the pixels of one, C channels, D width.
"""

from __future__ import annotations

import math

import einops
import flax.linen as nn
import jax.numpy as jnp

from big_vlm.config import UserError


class PatchEmbedding(nn.Module):
    """A VALID convolution whose stride is its kernel, written as one matrix product; pixels left over are not seen."""

    width: int
    patch_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image):
        p = self.patch_size
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (p, p, image.shape[-1], self.width))
        bias = self.param('bias', nn.initializers.zeros, (self.width,))
        x = cropped(image, p).astype(self.dtype)
        grid = x.shape[1] // p, x.shape[2] // p
        x = einops.rearrange(x, 'B (h p) (w q) C -> (B h w) (p q C)', p=p, q=p)
        x = x @ kernel.reshape(-1, self.width).astype(self.dtype) + bias.astype(self.dtype)
        return x.reshape(-1, math.prod(grid), self.width), grid

    def flops(self, image_size: int) -> float:
        """Of one square image's forward pass; biases count nothing."""
        return 2.0 * (image_size // self.patch_size * self.patch_size) ** 2 * 3 * self.width


class ConvStem(nn.Module):
    """Convolutions of 3×3 that halve the image until a token is left of every patch (arXiv 2106.14881).

    Their channels double up to `width`, each is followed by a GroupNorm (which, unlike the paper's BatchNorm, is the
    same for any batch and any mesh) and GELU, and all by one linear layer. Things that may be anywhere are learnt in
    far fewer examples than from whole patches: what convolutions see of them is the same wherever they are.
    """

    width: int
    patch_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image):
        x = cropped(image, self.patch_size).astype(self.dtype)
        for i, channels in enumerate(self.channels):
            x = nn.Conv(channels, (3, 3), strides=2, padding=1, use_bias=False, dtype=self.dtype, name=f'conv_{i}')(x)
            x = nn.GroupNorm(math.gcd(channels, 32), dtype=self.dtype, name=f'norm_{i}')(x)
            x = nn.gelu(x, approximate=True)
        grid = x.shape[1:3]
        x = nn.Dense(self.width, dtype=self.dtype, name='out')(einops.rearrange(x, 'B h w C -> (B h w) C'))
        return x.reshape(-1, math.prod(grid), self.width), grid

    @property
    def channels(self) -> list[int]:
        """After each halving. Raises UserError if halving does not lead to the patch size."""
        halvings = self.patch_size.bit_length() - 1
        if not halvings or self.patch_size != 2**halvings:
            raise UserError(
                f"stem='conv' halves the image: patches must be of 2, 4, 8, 16 … pixels, not {self.patch_size}"
            )
        return [max(self.width >> i, 1) for i in reversed(range(halvings))]

    def flops(self, image_size: int) -> float:
        """Of one square image's forward pass; norms and biases count nothing."""
        side, before, flops = image_size // self.patch_size * self.patch_size, 3, 0.0
        for channels in self.channels:
            side //= 2
            flops += 2.0 * side**2 * 9 * before * channels
            before = channels
        return flops + 2.0 * side**2 * before * self.width


STEMS = {'patch': PatchEmbedding, 'conv': ConvStem}


def cropped(image, patch_size: int):
    """Without the pixels at the right and below that fill no patch. UserError if nothing is left."""
    height, width = (n // patch_size * patch_size for n in image.shape[1:3])
    if not height or not width:
        raise UserError(
            f'an image of {image.shape[1]}x{image.shape[2]} pixels holds no patch of {patch_size}: raise '
            'contract.image_size or take a smaller patch'
        )
    return image[:, :height, :width]
