"""Which network a config's `model.image` names: a ViT, BiT's ResNet, or for images as rows of patches a NaFlex ViT.

The first two are Linen modules, image float [B,H,W,3] -> (x, out), with `sizes` (width and patch_size among them),
`pool`, `tokens(image_size)` and `flops(image_size)`; `naflex_vit` says what is different there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.models import naflex_vit, resnet, vit

ImageTower = vit.ViT | resnet.ResNet | naflex_vit.NaFlexViT
_NOT_OF_NAFLEX = ('stem', 'position', 'norm', 'patch_dropout')
_OF_RESNETS = ('variant', 'width', 'pool', 'head_bias', 'norm')


def from_config(image: config.ImageTower, *, head: int = 0, naflex: bool = False, **shared: Any) -> ImageTower:
    """The tower, its names and sizes checked.

    Args:
      image: the validated section.
      head: width it is projected to; 0: not at all.
      naflex: images come as rows of patches.
      shared: of dtype, remat and scan what is not the tower's default.

    Raises:
      UserError: an unknown variant, sizes that do not divide, a setting that the tower does not have.
    """
    settings = dataclasses.asdict(image) | shared | {'head': head}
    if naflex:
        for name in _NOT_OF_NAFLEX:
            if settings.pop(name) != getattr(config.ImageTower, name):
                raise UserError(f'model.image.{name}={getattr(image, name)!r}: with contract.max_patches there is none')
        tower = naflex_vit.NaFlexViT(**settings)
    elif resnet.is_variant(image.variant):
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


def naflex_patch_size(model: config.Model, contract: config.Contract) -> int:
    """Pixels of a side of NaFlex's patches; 0 where images are squares. Raises UserError for an unknown variant."""
    return from_config(model.image, naflex=True).sizes['patch_size'] if contract.max_patches else 0


def check_head(tower: ImageTower, why: str) -> None:
    """Refuses `head_bias` of a tower without a head: UserError, which says `why` there is none."""
    if not (tower.head or tower.head_bias):
        raise UserError(f'model.image.head_bias=False: there is no head, {why}: leave it at True')
