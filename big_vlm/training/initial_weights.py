"""The first weights of a stage that starts from other models': all or parts of them, the positions resized.

A NaFlex tower starts from a ViT, and a ViT from a NaFlex tower, of the same sizes.

Another model is an earlier stage, a bundle, a checkpoint, or a public checkpoint in a format that `interop` reads.
"""

from __future__ import annotations

import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from big_vlm import bundle, checkpoints, config, interop
from big_vlm.checkpoints import trees
from big_vlm.config import InitFrom, Stage, UserError, Weights
from big_vlm.data.contract import Contract
from big_vlm.data.coordinates import NUM_LOCATIONS, NUM_SEGMENTS
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.models import lora, matrices, quantised
from big_vlm.ops import position_resize

POSITION, PATCHES = 'img/pos_embedding', 'img/embedding/kernel'
TOKENS = ('txt/Embed_0/embedding', 'llm/embedder/input_embedding', 'txt/llm/embedder/input_embedding')
# What weights expect of their inputs at any resolution and length: an image tower's, all others', both together.
OF_PIXELS, OF_TEXT, OF_BOTH = ('value_range',), ('lower', 'separator'), ('image_alone', 'causal_prompt')


def check(stages: Mapping[str, Stage], shapes: Mapping[str, Any], name: str, where: str) -> None:
    """Refuses, before anything is trained, weights that are not there or do not fit.

    Args:
      stages: validated.
      shapes: stage → its weights' shapes, of this stage and the earlier ones.
      name, where: the stage's, and its dotted key.

    Raises:
      UserError: no such folder, a folder of something else, an unknown part, missing or misshapen parameters, a regex
        of `fresh` that matches none; weights with adapters or scales beside them; text weights without the
        tokenizer they were trained with, and any without the pixel range, case or separator.
    """
    for key, init in stages[name].init_from.given().items():
        _check(stages, shapes, name, init, f'{where}.{key}')


def _check(stages: Mapping[str, Stage], shapes: Mapping[str, Any], name: str, init: Weights, where: str) -> None:
    stage, params = stages[name], trees.flat(shapes[name])
    for pattern in init.fresh:
        try:
            matched = any(re.fullmatch(pattern, path) for path in params)
        except re.error as error:
            raise UserError(f'{where}.fresh: {pattern!r} is no regular expression: {error}') from None
        if not matched:
            raise UserError(
                f'{where}.fresh: {pattern!r} matches no parameter; it must match a path such as {min(params)}'
            )
    folder = _folder(init, {})
    if init.stage:
        stored, trained_with = trees.flat(shapes[init.stage]), stages[init.stage].contract
    else:
        with config.located(f'{where}.path'):
            stored, trained_with = _shapes(init, folder), _contract(folder)
            if beside := next(filter(lora.is_beside, stored), None):
                raise UserError(
                    f'{init.path} has weights in parts, such as {beside}, from a run with LoRA: take its bundle, where '
                    'they are one'
                )
    for ours, theirs, wanted in _parts(init, params, where):
        found = _below(theirs, stored)
        if not found:
            raise config.unknown('part', theirs, _tops(stored), f'{where}.parts')
        if trained_with:
            _check_contract(ours, stage.contract, trained_with, where)
        if ours.split('/')[0] != 'img':
            given = stage.tokenizer.path
            if init.path:
                _check_tokenizer(given, folder, where)
            else:
                _check_stage_tokenizer(given, stages[init.stage].tokenizer.path, where)
        fitting = _reshaped(init, ours, wanted, found)
        wanted = {
            path: leaf
            for path, leaf in wanted.items()
            if not (path in fitting or (path in found and _without_locations(_join(ours, path), leaf, found[path])))
        }
        trees.check_same(wanted, found, f'{where}: {init.stage or init.path}', partial=True)


def _contract(folder: pathlib.Path) -> Contract | None:
    """What the weights of a bundle were trained with; other folders of weights don't tell."""
    return bundle.read(folder)[1] if (folder / 'bundle.json').is_file() else None


def _check_contract(part: str, ours: config.Contract, theirs: config.Contract | Contract, where: str) -> None:
    """Pixels and text mean the same to the weights and to the run."""
    top = part.split('/')[0]
    pixels, text = top in ('', 'img'), top != 'img'
    for key in (*OF_PIXELS * pixels, *OF_TEXT * text, *OF_BOTH * (pixels and text)):
        here, there = getattr(ours, key), getattr(theirs, key)
        if here != there:
            raise UserError(
                f'{where}: its weights were trained with contract.{key} {there!r}, this stage has {here!r}: '
                'set it to theirs'
            )


def _check_tokenizer(given: str, weights: pathlib.Path, where: str) -> None:
    """Token ids mean the same to the run and to a bundle, a Hugging Face folder or a GGUF file. An .npz can't tell."""
    kept = interop.find_tokenizer(weights)
    within = not kept and (interop.format_of(weights) == 'gguf' or (weights / 'tokenizer.json').is_file())
    if given:
        own = Tokenizer.load(kept) if kept else interop.read(weights).own_tokenizer() if within else None
        if own is None or Tokenizer.load(given).same_pieces(own):
            return
    found = (
        f'python -m tools.convert {weights} BUNDLE --to=bundle writes it'
        if within
        else f'a bundle has it as {kept or weights / "tokenizer.model"}'
    )
    raise UserError(
        f'{where}.path: its text weights belong to its tokenizer{f", and {given} is another" if given else ""}: '
        f"set tokenizer.path ({found}), or take parts={{'img': 'img'}} alone"
    )


def _check_stage_tokenizer(given: str, theirs: str, where: str) -> None:
    """The same between two stages of a run. Those that are given none share one."""
    if given == theirs or (given and theirs and Tokenizer.load(given).same_pieces(Tokenizer.load(theirs))):
        return
    raise UserError(
        f'{where}.stage: its text weights belong to its tokenizer, {theirs or "which the run trains"}, and '
        f'{given or "the one which the run trains"} is another: set tokenizer.path alike in both stages, or take '
        "parts={'img': 'img'} alone"
    )


def make(init: InitFrom, bundles: Mapping[str, pathlib.Path], where: str) -> Callable[[Any], Any] | None:
    """A function from fresh weights to the first ones, placed alike; None where everything starts fresh.

    Weights are parameters and, under their modules' names, running statistics.

    Args:
      init: the section.
      bundles: of the earlier stages.
      where: the stage's dotted key, for errors.
    """
    given = init.given()
    if not given:
        return None

    def load(fresh: Any) -> Any:
        params = trees.flat(fresh)
        for key, source in given.items():
            folder = _folder(source, bundles)
            for ours, theirs, wanted in _parts(source, params, f'{where}.{key}'):
                loaded = _load(source, folder, ours, theirs, {path: _unquantised(x) for path, x in wanted.items()})
                for path, leaf in loaded.items():
                    params |= _quantised(_join(ours, path), leaf, params)
        return trees.like(fresh, params)

    return load


def overwritten(init: InitFrom, bundles: Mapping[str, pathlib.Path], shapes: Any, where: str) -> set[str]:
    """The paths of the parameters, of these `shapes`, that `make` replaces whole, whatever they were."""
    paths = set()
    for key, source in init.given().items():
        stored = _shapes(source, _folder(source, bundles))
        for ours, theirs, wanted in _parts(source, trees.flat(shapes), f'{where}.{key}'):
            found = _below(theirs, stored)
            for path, leaf in wanted.items():
                if not _without_locations(_join(ours, path), leaf, found[path]):
                    paths.add(_join(ours, path))
    return paths


def _load(
    init: Weights, folder: pathlib.Path, ours: str, theirs: str, wanted: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The stored weights of the wanted paths, placed like them."""
    stored = _below(theirs, _shapes(init, folder))
    like = {}
    for path, x in wanted.items():
        shape = stored[path].shape if path in stored else x.shape
        # What is still to change its shape comes to the host.
        like[path] = jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding if shape == x.shape else None)
    if _public(init):
        source = interop.open_weights(init.path)
        loaded = {path: _placed(source.read(_join(theirs, path)), leaf) for path, leaf in like.items()}
    else:
        loaded = trees.flat(checkpoints.load_weights(folder, trees.nested(like), theirs))
    for path, reshape in _reshaped(init, ours, wanted, stored).items():
        loaded[path] = jax.device_put(reshape(loaded[path]), wanted[path].sharding)
    for path, fresh in wanted.items():
        if _without_locations(_join(ours, path), fresh, stored[path]):
            loaded[path] = _first_rows(fresh, loaded[path][: fresh.shape[0] - NUM_LOCATIONS - NUM_SEGMENTS])
    return loaded


def _unquantised(x: jax.Array) -> Any:
    """What is read for an int8 or int4 weight: float32, on the host."""
    return jax.ShapeDtypeStruct(x.shape, np.float32) if x.dtype.name in lora.NARROW else x


def _quantised(path: str, leaf: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaf under its path; with its scale where `params` holds it as int8 or int4."""
    kind = params[path].dtype.name
    if kind not in lora.NARROW:
        return {path: leaf}
    names = path, path + lora.NARROW[kind]
    inputs = matrices.axes(path)[0]
    shardings = tuple(params[name].sharding for name in names)
    leaf = jax.device_put(leaf, shardings[0])
    narrowed = jax.jit(lambda x: quantised.narrow(x, inputs, kind), out_shardings=shardings)(leaf)
    return dict(zip(names, narrowed, strict=True))


def _shapes(init: Weights, folder: pathlib.Path) -> dict[str, Any]:
    """Path → shape and dtype of all that is stored."""
    if _public(init):
        return dict(interop.open_weights(init.path).shapes)
    return trees.flat(checkpoints.weight_shapes(folder))


def _public(init: Weights) -> bool:
    """Whether the weights are in another project's format."""
    return bool(init.path and interop.format_of(init.path))


def _placed(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> Any:
    array = array.astype(leaf.dtype)
    if leaf.sharding is None:
        return array
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])


def _without_locations(path: str, wanted: Any, stored: Any) -> bool:
    """A token table that ends before the location and segmentation tokens: ours for them stay as initialised.

    It may have rows of padding instead, as Gemma 3 has from 4B on; they are left out.
    """
    pieces = wanted.shape[0] - NUM_LOCATIONS - NUM_SEGMENTS
    return path in TOKENS and pieces > 0 and stored.shape[0] in (pieces, interop.padded(pieces))


def _first_rows(fresh: jax.Array, rows: np.ndarray) -> jax.Array:
    """`fresh` with its first rows replaced, placed as it was."""
    return jax.jit(lambda table, rows: table.at[: len(rows)].set(rows), out_shardings=fresh.sharding)(fresh, rows)


def _parts(init: Weights, params: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(our subtree, theirs, {path below ours: leaf} of what is taken)."""
    for ours, theirs in (init.parts or {'': ''}).items():
        part = _below(ours, params)
        if not part:
            raise config.unknown('part', ours, _tops(params), f'{where}.parts')
        fresh = {path for path in part if any(re.fullmatch(pattern, _join(ours, path)) for pattern in init.fresh)}
        fresh |= {path for path in part if lora.is_beside(path)}
        yield ours, theirs, {path: leaf for path, leaf in part.items() if path not in fresh}


def _reshaped(
    init: Weights, ours: str, wanted: Mapping[str, Any], stored: Mapping[str, Any]
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Path → what makes the stored array one of our shape, where that can be done and has to be."""
    found = {}
    position, patches = (path.removeprefix(f'{ours}/') for path in (POSITION, PATCHES))
    for path in {position, patches} & set(wanted) & set(stored):
        new, old = wanted[path].shape, stored[path].shape
        if new == old or new[-1] != old[-1]:
            continue
        if path == position and init.resize_position:
            found[path] = functools.partial(resized, shape=new, method=init.resize_method)
        # A ViT's kernel [p,p,3,D] reads a patch in the order in which a NaFlex's row [p·p·3,D] holds it.
        if path == patches and math.prod(new) == math.prod(old):
            found[path] = lambda kernel, shape=new: np.reshape(kernel, shape)
    return found


def resized(positions: np.ndarray, shape: tuple[int, ...], method: str) -> np.ndarray:
    """Position embeddings, [1,P,D] or NaFlex's [S,S,D], on the square grid of `shape`, which is one of the two."""
    side, width = math.isqrt(math.prod(shape[:-1])), shape[-1]
    new = position_resize.RESIZES[method](np.reshape(positions, (1, -1, width)), (side, side))
    return np.reshape(np.asarray(new), shape)


def _folder(init: Weights, bundles: Mapping[str, pathlib.Path]) -> pathlib.Path:
    return bundles.get(init.stage, pathlib.Path(init.path).expanduser())


def _below(part: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {
        path.removeprefix(f'{part}/'): leaf for path, leaf in leaves.items() if not part or path.startswith(f'{part}/')
    }


def _join(part: str, path: str) -> str:
    return f'{part}/{path}' if part else path


def _tops(leaves: Mapping[str, Any]) -> set[str]:
    return {path.split('/')[0] for path in leaves}
