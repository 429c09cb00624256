"""The folder of a bundle, written whole or not at all, and read back with every check that is cheap."""

import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

import big_vlm
from big_vlm import config, tasks
from big_vlm.bundle import adapters as adapting
from big_vlm.bundle import whole
from big_vlm.bundle.card import model_card
from big_vlm.bundle.model import Bundle
from big_vlm.checkpoints import trees, weights
from big_vlm.config import UserError, unknown
from big_vlm.data.contract import Contract
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.sharding import mesh as meshes
from big_vlm.sharding import rules

DTYPES = ('float32', 'bfloat16')
FORMAT = 1  # one more whenever an older big_vlm could not read the folder


def load(
    path: str | os.PathLike,
    *,
    adapters: str | os.PathLike | None = None,
    quantize: str = '',
    dtype: str = '',
    mesh: Mesh | None = None,
) -> Bundle:
    """The model in a folder that `save` wrote, with its weights on `mesh` (default: one device).

    `adapters`, a folder of LoRA adapters, ours or PEFT's, are added to its matrices. What was trained beside the model,
    such as a captioner, stays in the folder. `quantize`: 'int8' or 'int4' for `Bundle.quantised`. `dtype`: one of
    DTYPES, in which weights are held and computed with; '': float32 weights, and the dtype of the config to compute in.

    Raises:
      UserError: no such folder, not a bundle, a bundle of a newer big_vlm, files missing or cut short, a tokenizer
        other than the one it was trained with; adapters of another model.
    """
    path = pathlib.Path(path).expanduser()
    stage, contract, tokenizer, scores = read(path)
    stage = in_dtype(stage, dtype)
    if mesh is None:
        mesh = meshes.make_mesh(data=1, devices=jax.local_devices()[:1])
    task = tasks.make(stage, contract, mesh)
    shapes = tasks.model_weights(tasks.weights(*jax.eval_shape(task.init, jax.random.key(0))))
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding),
        shapes,
        rules.param_shardings(shapes, mesh),
    )
    params = weights.load_weights(path / 'weights', placed)
    if adapters is not None:
        params = adapting.onto(params, adapting.read(adapters, stage, trees.flat(shapes)))
    bundle = Bundle(stage, contract, tokenizer, params, mesh, scores)
    return bundle.quantised(quantize) if quantize else bundle


def in_dtype(stage: config.Stage, dtype: str) -> config.Stage:
    """The stage with a model that computes in one of DTYPES, or '' for its own. Raises UserError for another."""
    if dtype not in ('', *DTYPES):
        raise unknown('dtype', dtype, DTYPES)
    return dataclasses.replace(stage, model=dataclasses.replace(stage.model, dtype=dtype or stage.model.dtype))


def read(path: pathlib.Path) -> tuple[config.Stage, Contract, Tokenizer, dict[str, Any]]:
    """(stage, contract, tokenizer, scores) of a bundle: all but its weights. Raises UserError as `load` does."""
    description = _describe(path)
    where = path / 'bundle.json'
    try:
        with config.located(str(where)):
            contract = Contract.from_dict(description['contract'])
            stage = config.parse_stage(description['config'], 'config', trained=False)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{where}: damaged or not a bundle ({type(error).__name__}: {error})') from None
    tokenizer = Tokenizer.load(str(path / 'tokenizer.model'))
    if contract.vocab_size < tokenizer.vocab_size:  # a converted model without location tokens
        tokenizer = tokenizer.without_locations()
    if tokenizer.sha256 != contract.tokenizer_sha256:
        raise UserError(
            f'{path / "tokenizer.model"} is not the tokenizer that the weights were trained with (sha256 '
            f'{tokenizer.sha256[:12]}…, expected {contract.tokenizer_sha256[:12]}…): copy the whole folder again'
        )
    return stage, contract, tokenizer, description.get('scores', {})


def save(
    path: str | os.PathLike,
    params: Any,
    stage: config.Stage | Mapping[str, Any],
    contract: Contract,
    tokenizer: Tokenizer,
    *,
    stats: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Writes a bundle. It appears under its name only when it is whole; one that is already there is replaced.

    Args:
      path: the folder to make. Every process calls this, with the same path.
      params, stats: parameters and running statistics, as the task's `init` returns them; stats may be among them.
      stage: the stage they were trained with, or its dict.
      contract, tokenizer: how pixels and text were made into arrays.
      scores: evaluation results for the model card, {name: {'score': …, 'chance': …, 'n': …}}, nested as you like.

    Raises:
      UserError: the folder exists and is not a bundle, the tokenizer is not the contract's, or it cannot be written.
    """
    path = pathlib.Path(path).expanduser()
    if path.exists() and not (path / 'bundle.json').is_file():
        raise UserError(f'{path} exists and is not a bundle: choose another name, or remove it')
    if tokenizer.sha256 != contract.tokenizer_sha256:
        raise UserError('the tokenizer is not the one that the contract names: save the pair that was trained together')
    if not isinstance(stage, config.Stage):
        stage = config.parse_stage(stage)
    with whole.writing(path, 'bundle') as temporary:
        weights.save_weights(temporary / 'weights', tasks.weights(params, stats or {}))
        meshes.wait('bundle: weights')
        if jax.process_index() == 0:
            tokenizer.save(temporary / 'tokenizer.model')
            files = sorted(file for file in temporary.rglob('*') if file.is_file())
            description = {
                'format': FORMAT,
                'task': stage.task,
                'parameters': sum(leaf.size for leaf in jax.tree.leaves(tasks.model_weights(params))),
                'versions': {
                    'big_vlm': big_vlm.__version__,
                    'jax': jax.__version__,
                    'python': platform.python_version(),
                },
                'contract': contract.to_dict(),
                'config': config.to_dict(stage),
                'scores': scores or {},
                'files': {file.relative_to(temporary).as_posix(): file.stat().st_size for file in files},
            }
            (temporary / 'README.md').write_text(model_card(path.name, description), encoding='utf-8')
            text = json.dumps(description, indent=2, ensure_ascii=False) + '\n'
            (temporary / 'bundle.json').write_text(text, encoding='utf-8')


def _describe(path: pathlib.Path) -> dict[str, Any]:
    """bundle.json, after the checks that need nothing else."""
    if not path.is_dir():
        raise UserError(f'bundle {path}: no such folder')
    file = path / 'bundle.json'
    if not file.is_file():
        inside = sorted(str(p.parent) for p in [*path.glob('*/bundle.json'), *path.glob('*/*/bundle.json')])
        hint = f'; did you mean {inside[-1]}?' if inside else ': a bundle is a folder with a bundle.json'
        raise UserError(f'{path} is not a bundle{hint}')
    try:
        description = json.loads(file.read_text(encoding='utf-8'))
        version, files = int(description['format']), dict(description['files'])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{file}: damaged or not a bundle ({type(error).__name__}: {error})') from None
    if version > FORMAT:
        by = description.get('versions', {}).get('big_vlm', 'a newer release')
        raise UserError(
            f'{path}: bundle format {version}, written by big_vlm {by}; this is {big_vlm.__version__}, which reads '
            f'formats up to {FORMAT}: upgrade big_vlm'
        )
    for name, size in files.items():
        here = path / name
        if not here.is_file():
            raise UserError(f'{path}: {name} is missing: copy the whole folder again')
        if here.stat().st_size != size:
            raise UserError(
                f'{path}: {name} has {here.stat().st_size} bytes, {size} were written: copy the whole folder again'
            )
    return description
