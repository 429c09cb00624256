"""Pictures as NaFlex reads them: rows of patches, at their own aspect ratio (arXiv 2502.14786, section 2.4.2)."""

from typing import Any

import einops
import numpy as np

from big_vlm.config import UserError
from big_vlm.data import images
from big_vlm.data.contract import Contract


def grid_of(height: int, width: int, max_patches: int) -> tuple[int, int]:
    """(rows, columns) of patches that a picture is resized to, with at most `max_patches` in all.

    The picture is scaled as far as they allow; a patch that it only begins to fill counts, and its sides are then
    stretched to whole patches. The size of a patch makes no difference. With 4 patches, 10×10 → 2×2, 10×30 → 1×3.
    """
    # A larger scale adds a row or a column where it fills one: the only places to look.
    grids = [(n, -(-n * width // height)) for n in range(1, max_patches + 1)]
    grids += [(-(-n * height // width), n) for n in range(1, max_patches + 1)]
    return max((grid for grid in grids if grid[0] * grid[1] <= max_patches), key=lambda grid: grid[0] * grid[1])


def rows(picture: np.ndarray, contract: Contract, length: int = 0) -> dict[str, np.ndarray]:
    """What a batch has of a picture uint8 [H,W,3], for N = `contract.max_patches` patches of p pixels.

    Args:
      picture, contract: see above.
      length: of how many patches at most the picture is made; 0: N.

    Returns:
      patches: uint8 [N,p·p·3], row by row, the picture's first, then zeros; a patch is its pixels row by row.
      patch_mask: bool [N], True for the picture's.
      patch_grid: int32 [2], its rows and columns.
    """
    p, count = contract.patch_size, contract.max_patches
    grid = grid_of(*picture.shape[:2], length or count)
    picture = images.resize(picture, (grid[0] * p, grid[1] * p), contract.resample, contract.antialias)
    patches = np.zeros((count, p * p * 3), np.uint8)
    patches[: grid[0] * grid[1]] = einops.rearrange(picture, '(h p) (w q) C -> (h w) (p q C)', p=p, q=p)
    mask = np.arange(count) < grid[0] * grid[1]
    return {'patches': patches, 'patch_mask': mask, 'patch_grid': np.array(grid, np.int32)}


def picture(patches: np.ndarray, patch_grid: np.ndarray) -> np.ndarray:
    """The resized picture, uint8 [H,W,3], that one row of a batch shows."""
    height, width = (int(n) for n in patch_grid)
    p = round((patches.shape[-1] / 3) ** 0.5)
    return einops.rearrange(patches[: height * width], '(h w) (p q C) -> (h p) (w q) C', h=height, p=p, q=p)


def check(contract: Any, max_patches: int, *lengths: int) -> None:
    """Refuses another number of patches than the contract's, and lengths beyond it: UserError."""
    if max_patches != contract.max_patches:
        raise UserError(
            f'naflex({max_patches}), but contract.max_patches is {contract.max_patches}: make them the same'
        )
    if lengths and max(lengths) > max_patches:
        raise UserError(f'naflex({max_patches}, … {max(lengths)}): a row has no more than {max_patches} patches')
