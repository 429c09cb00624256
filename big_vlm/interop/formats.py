"""Which format a path is in, and the reader for it."""

from __future__ import annotations

import os
import pathlib

from big_vlm.config import UserError
from big_vlm.interop import big_vision, gguf_gemma, hugging_face, pretrained, safetensors_files
from big_vlm.interop.lazy import LazyWeights
from big_vlm.interop.pretrained import Pretrained


def format_of(path: str | os.PathLike) -> str:
    """'npz' for FILE.npz and FILE.npz:SUBTREE, 'gguf' for FILE.gguf, 'hugging_face' for a folder of safetensors.

    '' for anything else.
    """
    if big_vision.split(path)[0].suffix == '.npz':
        return 'npz'
    folder = pathlib.Path(path).expanduser()
    if folder.suffix == '.gguf' and not folder.is_dir():
        return 'gguf'
    if safetensors_files.holds(folder):
        return 'hugging_face'
    return ''


def open_weights(path: str | os.PathLike) -> LazyWeights:
    """The weights of a public checkpoint under our names. Raises UserError if it is none, damaged or incomplete."""
    if format_of(path) == 'npz':
        return big_vision.read(path)
    return read(path).weights


def read(path: str | os.PathLike) -> Pretrained:
    """A public checkpoint with all that it says about itself. Raises UserError as `open_weights` does."""
    kind = format_of(path)
    if kind == 'npz':
        return pretrained.from_shapes(big_vision.read(path))
    folder = pathlib.Path(path).expanduser()
    if kind == 'gguf':
        return gguf_gemma.read(folder)
    if kind == 'hugging_face' or (folder / 'config.json').is_file():
        return hugging_face.read(folder)
    if not folder.exists():
        owner, _, name = os.fspath(path).partition('/')
        of_hub = owner and name and '/' not in name and not pathlib.Path(owner).expanduser().exists()
        fetch = f'; to fetch it from the Hugging Face Hub: hf download {path} --local-dir {name}' if of_hub else ''
        raise UserError(f'{path}: no such file or folder{fetch}')
    raise UserError(f'{path} is neither an .npz or .gguf file nor a folder with config.json and safetensors files')
