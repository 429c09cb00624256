"""From any format of a model to any other: a bundle, big_vision's `.npz`, a Hugging Face folder, a GGUF file."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from big_vlm import config, interop, tasks
from big_vlm.bundle import adapters, folder
from big_vlm.bundle.model import Bundle
from big_vlm.checkpoints import trees, weights
from big_vlm.config import UserError, unknown
from big_vlm.data.contract import Contract
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import big_vision, gguf_gemma, hugging_face
from big_vlm.interop.lazy import LazyWeights
from big_vlm.interop.pretrained import DECODERS, POSITION, Pretrained, family_of
from big_vlm.models import vit
from big_vlm.ops import position_resize
from big_vlm.sharding import mesh as meshes
from big_vlm.sharding import rules

FORMATS = ('bundle', 'npz', 'hugging_face', 'gguf')
_SUFFIXES = {'.npz': 'npz', '.gguf': 'gguf'}
_OF_USE = {
    'resize': 'it needs image_size',
    'per_layer': 'only an .npz is written layer by layer',
    'precision': 'only a GGUF file is written in others than its source',
    'tokenizer': 'an .npz holds none',
}


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    to: str = '',
    tokenizer: str | os.PathLike = '',
    image_size: int = 0,
    resize: str = '',
    per_layer: bool = False,
    precision: str = '',
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Writes the model at `source` in another format, array by array.

    Args:
      source: a bundle, FILE.npz, FILE.npz:SUBTREE, FILE.gguf or a folder with config.json and safetensors files; or the
        `adapters` of a LoRA stage, which become a folder of PEFT.
      destination: a name that is free; it appears when it is whole.
      to: one of FORMATS; '': 'npz' or 'gguf' for a name that ends so, else 'hugging_face' for a bundle or GGUF, else
        'bundle'. A GGUF file holds a Gemma, or the decoder of a PaliGemma alone.
      tokenizer: a SentencePiece file; '': the one that came with the model.
      image_size: pixels per side of the converted model; 0: the same. Learned positions are resized.
      resize: one of `position_resize.RESIZES`; '': what the source's own code does.
      per_layer: write an `.npz` layer by layer, as SigLIP 1 was published.
      precision: of a GGUF file's matrices, one of `gguf_files.PRECISIONS`; '': 'F32'.
      progress: called with (bytes done, bytes in all).
      say: called with a line about what of the source is not in what was written.

    Returns:
      The format written, 'peft' for adapters.

    Raises:
      UserError: a source that is damaged, incomplete or of no family known here; a vocabulary that is not the
        tokenizer's; a destination that exists or cannot be written; what the other format cannot say.
    """
    destination = pathlib.Path(destination).expanduser()
    if destination.exists():
        raise UserError(f'{destination} exists: choose another name, or remove it')
    if adapters.holds(pathlib.Path(source).expanduser()):
        if to or tokenizer or image_size or resize or per_layer or precision:
            raise UserError(f'{source}: adapters of LoRA become a folder of PEFT as they are: leave the options out')
        adapters.to_peft(source, destination)
        return 'peft'
    model, kind = open_model(source)
    unnamed = 'hugging_face' if kind in ('bundle', 'gguf') else 'bundle'
    to = to or _SUFFIXES.get(destination.suffix, unnamed)
    if to not in FORMATS:
        raise unknown('format', to, FORMATS)
    for option, value, needed in (
        ('resize', resize, image_size),
        ('per_layer', per_layer, to == 'npz'),
        ('precision', precision, to == 'gguf'),
        ('tokenizer', tokenizer, to != 'npz'),
    ):
        if value and not needed:
            raise UserError(f'{option}={value} has no effect: {_OF_USE[option]}')
    if image_size:
        model = _at(model, image_size, resize or ('bicubic' if kind == 'hugging_face' else 'bilinear'))
    pieces, contract = None, None
    own = to != 'npz' and (Tokenizer.load(tokenizer) if tokenizer else model.own_tokenizer())
    if own:
        pieces = model.fitted(own)
        contract = model.contract(pieces)
    total, so_far = model.weights.nbytes, 0

    def done(nbytes: int) -> None:
        nonlocal so_far
        so_far += nbytes
        if progress:
            progress(min(so_far, total), total)

    if to == 'npz':
        big_vision.write(destination, model.weights, per_layer=per_layer, done=done)
    elif to == 'hugging_face':
        hugging_face.write(destination, model, contract, pieces, done)
    elif to == 'gguf':
        if pieces is None:
            raise UserError(
                f'{model.weights.where} comes without a SentencePiece tokenizer, and a GGUF has one: --tokenizer=FILE'
            )
        gguf_gemma.write(destination, model, pieces, precision or 'F32', done)
    else:
        _write_bundle(destination, model, contract, pieces, os.fspath(source), done)
    if model.decoder_of:
        say(f'{destination} is the decoder of {source}, a {model.decoder_of}: its image tower is left out')
    if to == 'hugging_face' and model.family not in DECODERS and not model.settings.antialias:
        say(f'{destination}: its images are to be resized without antialias, and transformers resizes with it')
    return to


def load_any(
    source: str | os.PathLike, *, tokenizer: str | os.PathLike = '', dtype: str = '', mesh: Mesh | None = None
) -> Bundle:
    """The model at `source`, of any format that `convert` reads, ready for use; nothing is written.

    Args:
      source: as of `convert`.
      tokenizer: a SentencePiece file; '': the one that came with the model.
      dtype: as of `load`; '': float32 if it is no bundle.
      mesh: where its weights go; None: one device.

    Raises:
      UserError: as `convert` does; a bundle whose own tokenizer is not to be used.
    """
    model, kind = open_model(source)
    if kind == 'bundle':
        if tokenizer:
            raise UserError(f'--tokenizer={tokenizer} has no effect: {source} is a bundle and brings its own')
        return folder.load(source, dtype=dtype, mesh=mesh)
    stage = folder.in_dtype(model.stage(os.fspath(source)), dtype)
    pieces = Tokenizer.load(tokenizer) if tokenizer else model.own_tokenizer()
    if pieces is None:
        raise _no_tokenizer(source)
    pieces = model.fitted(pieces)
    contract = model.contract(pieces)
    if mesh is None:
        mesh = meshes.make_mesh(data=1, devices=jax.local_devices()[:1])
    shardings = trees.flat(rules.param_shardings(trees.nested(dict(model.weights.shapes)), mesh))
    params = {}
    for name in model.weights.shapes:
        # As a bundle's are read: what is computed in a weight's dtype is not to depend on the file.
        array = model.weights.read(name).astype(dtype or np.float32, copy=False)
        params[name] = jax.device_put(array, shardings[name])
    return Bundle(stage, contract, pieces, trees.nested(params), mesh)


def open_model(source: str | os.PathLike) -> tuple[Pretrained, str]:
    """(the model at `source`, its format); weights are read when asked for. Raises UserError as `convert` does."""
    path = pathlib.Path(source).expanduser()
    if not (path / 'bundle.json').is_file():
        return interop.read(source), interop.format_of(source)
    stage, contract, tokenizer, _ = folder.read(path)
    if stage.task == tasks.MaskAutoencoder.kind:
        raise UserError(f'{path}: a mask autoencoder is no model of images and texts: take {path.parent / "masks.npz"}')
    shapes, read = weights.open_weights(path / 'weights')
    shapes = trees.flat(tasks.model_weights(shapes))  # what was trained beside the model is left behind
    sections = dataclasses.replace(stage.model, captioner=config.Captioner(), distill=config.Distillation())
    lazy = LazyWeights(shapes, read, str(path))
    own = path / 'tokenizer.model', '', contract.end_ids
    model = Pretrained(family_of(stage), sections, stage.contract, contract.vocab_size, lazy, *own)
    return model.check(), 'bundle'


def _at(model: Pretrained, image_size: int, resize: str) -> Pretrained:
    """The model at another resolution."""
    if resize not in position_resize.RESIZES:
        raise unknown('position resize', resize, position_resize.RESIZES)
    if POSITION not in model.weights.shapes:
        raise UserError(f'{model.weights.where}: no learned position embedding of images: leave out --image_size')
    if model.settings.max_patches:
        raise UserError(f'{model.weights.where}: a NaFlex model takes images of any size: leave out --image_size')
    side = image_size // vit.decode_variant(model.model.image.variant)['patch_size']
    if not side:
        raise UserError(f'--image_size={image_size} holds no patch of {model.model.image.variant}')
    _, _, width = model.weights.shapes[POSITION].shape
    lazy = model.weights.changed(
        POSITION,
        (1, side * side, width),
        lambda x: np.asarray(position_resize.RESIZES[resize](x, (side, side))),
    )
    settings = dataclasses.replace(model.settings, image_size=image_size)
    return dataclasses.replace(model, settings=settings, weights=lazy)


def _write_bundle(
    destination: pathlib.Path,
    model: Pretrained,
    contract: Contract | None,
    tokenizer: Tokenizer | None,
    source: str,
    done: Callable[[int], None],
) -> None:
    if tokenizer is None or contract is None:
        raise _no_tokenizer(source)
    free = shutil.disk_usage(_existing(destination)).free
    if free < model.weights.nbytes:
        raise UserError(
            f'{destination}: {model.weights.nbytes / 1e9:.1f} GB to write and {free / 1e9:.1f} GB free: make room'
        )

    def read(name: str) -> np.ndarray:
        array = model.weights.read(name)
        done(array.nbytes)
        return array

    params = {
        name: weights.Unread(leaf.shape, leaf.dtype, functools.partial(read, name))
        for name, leaf in model.weights.shapes.items()
    }
    folder.save(destination, trees.nested(params), model.stage(source), contract, tokenizer)


def _no_tokenizer(source: str | os.PathLike) -> UserError:
    return UserError(f'{source} comes without a SentencePiece tokenizer: name its file, --tokenizer=FILE')


def _existing(path: pathlib.Path) -> pathlib.Path:
    """The nearest folder above that is there."""
    path = path.absolute().parent
    while not path.exists():
        path = path.parent
    return path
