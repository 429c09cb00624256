"""What the image processor of a Hugging Face folder does to pixels, in our words, and the other way round.

Theirs low-passes whenever it shrinks. The file of a model that was trained without has the key `antialias`, false: our
own reader heeds it, transformers does not.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.interop import pretrained
from big_vlm.interop.hugging_face_keys import fixed, read_json

_RESAMPLE = {2: 'bilinear', 3: 'bicubic'}  # Pillow's numbers
_FIXED = {'do_resize': (True,), 'do_rescale': (True,), 'antialias': (True, False)}
_FIXED |= dict.fromkeys(('do_center_crop', 'do_pad'), (False, None))


def read(folder: pathlib.Path, contract: config.Contract, patch: int) -> config.Contract:
    """`contract` with what the folder's image processor does; without one, with what transformers' own does.

    `patch`: the model's, pixels a side. Raises UserError for what a contract cannot say, or a file that is damaged.
    """
    naflex = contract.max_patches > 0
    file = folder / 'preprocessor_config.json'
    if file.is_file():
        content = read_json(file)
    elif (folder / 'processor_config.json').is_file():
        file = folder / 'processor_config.json'
        content = read_json(file).get('image_processor', {})
    else:
        content = {}
    try:
        resample = int(content.get('resample', 2 if naflex else 3))
        scale = 255 * float(content.get('rescale_factor', 1 / 255))
        size = {} if naflex else content.get('size') or {}
        if size and not {'height', 'width'} <= set(size):
            raise UserError(f'{file}: size has {", ".join(size)}: only height and width are read')
        sizes = {int(size[key]) for key in ('height', 'width') if size} or {contract.image_size}
        max_patches = int(content.get('max_num_patches', pretrained.NAFLEX_PATCHES)) if naflex else 0
        patch_size = int(content.get('patch_size', patch)) if naflex else patch
        means, stds = (
            {float(x) for x in content.get(key, [0.5])} if content.get('do_normalize', True) else {default}
            for key, default in (('image_mean', 0.0), ('image_std', 1.0))
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{file}: damaged ({type(error).__name__}: {error})') from None
    fixed(content, _FIXED, str(file))
    if abs(scale - 1) > 1e-6:
        raise UserError(f'{file}: rescale_factor {scale / 255:g}: only 1/255 is read')
    if resample not in _RESAMPLE:
        raise UserError(f'{file}: resample {resample}: must be 2 (bilinear) or 3 (bicubic)')
    if sizes != {contract.image_size}:
        raise UserError(f"{file}: size {sorted(sizes)} is not the model's image_size, {contract.image_size}")
    if patch_size != patch:
        raise UserError(f"{file}: patch_size {patch_size} is not the model's, {patch}")
    if naflex and max_patches < 1:
        raise UserError(f'{file}: max_num_patches {max_patches}: must be at least 1')
    if len(means) > 1 or len(stds) > 1 or not min(stds):
        raise UserError(f'{file}: image_mean {sorted(means)}, image_std {sorted(stds)}: colours must share one range')
    [mean], [std] = means, stds
    return dataclasses.replace(
        contract,
        max_patches=max_patches,
        resample=_RESAMPLE[resample],
        antialias=bool(content.get('antialias', True)),
        value_range=(-mean / std, (1.0 - mean) / std),
    )


def describe(settings: config.Contract, name: str, patch: int) -> dict[str, Any]:
    """The content of preprocessor_config.json; `name` of the class that holds processor and tokenizer."""
    low, high = settings.value_range
    [resample] = [number for number, method in _RESAMPLE.items() if method == settings.resample]
    if settings.max_patches:
        kind, pictures = 'Siglip2ImageProcessor', {'max_num_patches': settings.max_patches, 'patch_size': patch}
    else:
        size = {'height': settings.image_size, 'width': settings.image_size}
        kind, pictures = 'SiglipImageProcessor', {'size': size}
    return {
        'image_processor_type': kind,
        'processor_class': name,
        'do_resize': True,
        **pictures,
        'resample': resample,
        **({} if settings.antialias else {'antialias': False}),
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': [-low / (high - low)] * 3,
        'image_std': [1 / (high - low)] * 3,
    }
