"""A bundle's functions as StableHLO, for programs that have JAX and none of big_vlm.

    NAME.stablehlo     one function each: embed_image and embed_text, or prefill and decode_step
    weights/           safetensors, what every function takes first
    tokenizer.model    SentencePiece
    manifest.json      inputs and outputs of each function, and how pixels and text become its inputs

A function takes two flat dicts, weights and inputs, and returns one; the batch may have any size:

    function = jax.export.deserialize(bytearray(pathlib.Path('embed_image.stablehlo').read_bytes()))
    function.call(weights, {'image': image})['embedding']
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_vlm.bundle.model import Bundle
from big_vlm.checkpoints import trees
from big_vlm.config import UserError, unknown
from big_vlm.interop import safetensors_files
from big_vlm.interop.lazy import LazyWeights
from big_vlm.ops import kv_cache

PLATFORMS = ('cpu', 'cuda', 'tpu')

_Arrays = dict[str, Any]
_Function = Callable[[_Arrays, _Arrays], _Arrays]


def export(
    model: Bundle,
    destination: str | os.PathLike,
    *,
    max_new_tokens: int = 64,
    text_length: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
    say: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Writes the folder described above; it appears under its name when it is whole.

    Args:
      model: the bundle.
      destination: a name that is free.
      max_new_tokens: generative: tokens that fit into the cache after the longest prompt.
      text_length: generative: text slots of a prompt, all of which `prefill` reads; None: the contract's.
      platforms: to compile for, of PLATFORMS.
      say: called with the name of each function that is done.

    Returns:
      The functions' names.

    Raises:
      UserError: a destination that exists or cannot be written, an unknown platform, no token to generate, more text
        slots than the contract has.
    """
    destination = pathlib.Path(destination).expanduser()
    if destination.exists():
        raise UserError(f'{destination} exists: choose another name, or remove it')
    for platform in platforms:
        if platform not in PLATFORMS:
            raise unknown('platform', platform, PLATFORMS)
    if not platforms:
        raise UserError(f'no platform to export for: name some of {", ".join(PLATFORMS)}')
    if max_new_tokens < 1:
        raise UserError(f'max_new_tokens {max_new_tokens}: must be at least 1')
    if text_length is None or model.stage.task != 'generative':
        text_length = model.contract.text_length
    if not 0 < text_length <= model.contract.text_length:
        raise UserError(f"text_length {text_length}: must be in 1 … {model.contract.text_length}, the contract's")
    if model.stage.task == 'mask_autoencoder':
        raise UserError('a mask autoencoder is not exported: its masks.npz holds all of it')
    weights, functions = _functions(model, max_new_tokens, text_length)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    temporary = destination.with_name(f'.{destination.name}.saving')
    listing = {}
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, (function, inputs) in functions.items():
            made = jax.export.export(jax.jit(function), platforms=tuple(platforms))(shapes, inputs)
            (temporary / f'{name}.stablehlo').write_bytes(made.serialize())
            outputs = jax.tree.unflatten(made.out_tree, made.out_avals)
            listing[name] = {'inputs': _listed(inputs), 'outputs': _listed(outputs)}
            say(name)
        (temporary / 'weights').mkdir()
        read = LazyWeights(shapes, lambda name: np.asarray(jax.device_get(weights[name])), 'bundle')
        safetensors_files.write(temporary / 'weights', read)
        model.tokenizer.save(temporary / 'tokenizer.model')
        manifest = {
            'task': model.stage.task,
            'platforms': list(platforms),
            'jax': jax.__version__,
            'functions': listing,
            'weights': sorted(str(file.relative_to(temporary)) for file in temporary.glob('weights/*.safetensors')),
            'contract': dataclasses.replace(model.contract, text_length=text_length).to_dict(),
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + '\n'
        (temporary / 'manifest.json').write_text(text, encoding='utf-8')
        temporary.rename(destination)
    except OSError as error:
        raise UserError(f'{destination}: not written: {trees.one_line(error)}') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return list(listing)


def _functions(
    model: Bundle, max_new_tokens: int, text_length: int
) -> tuple[_Arrays, dict[str, tuple[_Function, _Arrays]]]:
    """(the weights by name, {function's name: (it, its inputs' shapes)})."""
    contract, predict = model.contract, model.task.predict
    [batch] = jax.export.symbolic_shape('batch')

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    side = contract.image_size
    image = {'image': array(jnp.uint8, side, side, 3)}
    if count := contract.max_patches:
        image = {'patches': array(jnp.uint8, count, 3 * contract.patch_size**2)}
        image |= {'patch_mask': array(jnp.bool_, count), 'patch_grid': array(jnp.int32, 2)}
    if model.stage.task == 'contrastive':
        structure = model.params

        def embed_image(weights, inputs):
            return {'embedding': predict['embed_image'](trees.like(structure, weights), inputs)}

        def embed_text(weights, inputs):
            return {'embedding': predict['embed_text'](trees.like(structure, weights), inputs)}

        text = {'text': array(jnp.int32, contract.text_length), 'text_mask': array(jnp.bool_, contract.text_length)}
        return trees.flat(structure), {
            'embed_image': (embed_image, image),
            'embed_text': (embed_text, text),
        }

    structure = model.decode_params()
    length = contract.image_tokens + text_length
    cache_size = length + max_new_tokens

    def prefill(weights, inputs):
        logits, cache = predict['prefill'](trees.like(structure, weights), inputs, cache_size)
        return {'logits': logits} | _flat_cache(cache)

    def decode_step(weights, inputs):
        cache = kv_cache.KVCache(
            tuple(kv_cache.LayerCache(inputs[f'k_{i}'], inputs[f'v_{i}'], window) for i, window in enumerate(windows)),
            inputs['length'],
        )
        logits, cache = predict['decode_step'](trees.like(structure, weights), cache, inputs['token'])
        return {'logits': logits} | _flat_cache(cache)

    if not contract.image_tokens:
        image = {}
    elif not contract.max_patches:
        count = contract.images
        image = {'image': array(jnp.uint8, count, side, side, 3), 'image_mask': array(jnp.bool_, count)}
    prompt = image | {name: array(jnp.int32, length) for name in ('text', 'segment', 'position', 'mask_ar')}
    _, cache = jax.eval_shape(lambda *inputs: predict['prefill'](*inputs, cache_size), structure, prompt)
    windows = [layer.window for layer in cache.layers]
    return trees.flat(structure), {
        'prefill': (prefill, prompt),
        'decode_step': (decode_step, {'token': array(jnp.int32)} | _flat_cache(cache)),
    }


def _flat_cache(cache: kv_cache.KVCache) -> _Arrays:
    layers = {f'{name}_{i}': getattr(layer, name) for i, layer in enumerate(cache.layers) for name in ('k', 'v')}
    return {'length': cache.length} | layers


def _listed(arrays: _Arrays) -> dict[str, str]:
    """'image': 'uint8[batch, 48, 48, 3]'."""
    return {name: f'{x.dtype}[{", ".join(map(str, x.shape))}]' for name, x in arrays.items()}
