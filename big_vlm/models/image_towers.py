"""Which network a config's `model.image` names: a ViT, or BiT's ResNet.

Both are Linen modules, image float [B,H,W,3] -> (x, out), with `sizes` (width and patch_size among them), `pool`,
`tokens(image_size)` and `flops(image_size)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.models import resnet, vit

ImageTower = vit.ViT | resnet.ResNet
_OF_RESNETS = ('variant', 'width', 'pool', 'head_bias', 'norm')


def from_config(image: config.ImageTower, *, head: int = 0, **shared: Any) -> ImageTower:
    """The tower, its names and sizes checked.

    Args:
      image: the validated section.
      head: width it is projected to; 0: not at all.
      shared: of dtype, remat and scan what is not the tower's default.

    Raises:
      UserError: an unknown variant, sizes that do not divide, a setting that the tower does not have.
    """
    settings = dataclasses.asdict(image) | shared | {'head': head}
    if resnet.is_variant(image.variant):
        for field in dataclasses.fields(image):
            value = getattr(image, field.name)
            if field.name not in _OF_RESNETS and value != field.default:
                raise UserError(f'model.image.{field.name}={value!r}: {image.variant!r}, a ResNet, has none')
        of_resnets = (*_OF_RESNETS, 'head', 'dtype', 'remat')
        tower = resnet.ResNet(**{name: value for name, value in settings.items() if name in of_resnets})
    else:
        if settings.pop('norm') != config.ImageTower.norm:
            raise UserError(f'model.image.norm={image.norm!r}: {image.variant!r}, a transformer, has LayerNorm')
        tower = vit.ViT(**settings)
    _ = tower.sizes
    return tower


def check_head(tower: ImageTower, why: str) -> None:
    """Refuses `head_bias` of a tower without a head: UserError, which says `why` there is none."""
    if not (tower.head or tower.head_bias):
        raise UserError(f'model.image.head_bias=False: there is no head, {why}: leave it at True')
