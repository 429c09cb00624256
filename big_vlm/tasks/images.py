"""A batch's images as an image tower reads them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from big_vlm.config import UserError
from big_vlm.data.contract import Contract
from big_vlm.ops import pixels


def of(
    batch: dict[str, jax.Array], contract: Contract, dtype: jnp.dtype
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """`image` uint8 [..., H,W,3] in the model's value range; for a NaFlex tower `(patches, patch_mask, patch_grid)`.

    Raises UserError where the pipeline made no patches for one.
    """
    if not contract.max_patches:
        return pixels.to_model_range(batch['image'], contract.value_range, dtype)
    if 'patches' not in batch:
        raise UserError(f'the pipeline makes no patches: add naflex({contract.max_patches})')
    patches = pixels.to_model_range(batch['patches'], contract.value_range, dtype)
    return patches, batch['patch_mask'], batch['patch_grid']
