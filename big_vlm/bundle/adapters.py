"""LoRA adapters alone, as a small folder, in the bundle of their stage, and onto the bundle that they belong to.

  adapters.json     format, versions, the stage's config
  weights/          the factors and scales, and what else was trained

A folder of PEFT (`adapter_config.json`, `adapter_model.safetensors`) is taken as well, and made by `to_peft`.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import big_vlm
from big_vlm import config
from big_vlm.bundle import whole
from big_vlm.checkpoints import trees, weights
from big_vlm.config import UserError
from big_vlm.interop import peft
from big_vlm.models import lora

FORMAT = 1
_FILE = 'adapters.json'


def save(path: str | os.PathLike, params: Any, stage: config.Stage) -> None:
    """Writes what LoRA trained, of the parameters of a stage. Every process calls this.

    The folder appears under its name only when it is whole; one that is already there is replaced.

    Raises UserError: the folder exists and holds something else, or it cannot be written.
    """
    path = pathlib.Path(path).expanduser()
    if path.exists() and not holds(path):
        raise UserError(f'{path} exists and is no folder of adapters: choose another name, or remove it')
    leaves = trees.flat(params)
    also = [name for name in leaves if any(re.fullmatch(pattern, name) for pattern in stage.lora.train)]
    kept = {name: leaf for name, leaf in leaves.items() if lora.is_adapter(name) or name in also}
    with whole.writing(path, 'adapters') as temporary:
        weights.save_weights(temporary / 'weights', trees.nested(kept))
        if jax.process_index() == 0:
            description = {
                'format': FORMAT,
                'parameters': sum(leaf.size for leaf in kept.values()),
                'versions': {'big_vlm': big_vlm.__version__, 'jax': jax.__version__},
                'stage': config.to_dict(stage),
            }
            (temporary / _FILE).write_text(json.dumps(description, indent=2) + '\n', encoding='utf-8')


def merged(params: Any) -> Any:
    """Parameters of a stage with LoRA as a bundle holds them: adapters added to their matrices, narrow ones float32.

    One process makes each matrix when it is written, on the host, and drops it (`weights.Unread`): beside the state of
    training, a device may have no room for all. Several do it on the devices, each of which has a part. Without
    adapters the parameters come back as they are.
    """
    leaves = trees.flat(params)
    if not any(lora.is_beside(name) for name in leaves):
        return params
    if jax.process_count() > 1:
        return lora.whole(params)

    def unread(name: str) -> weights.Unread:
        parts = {name + end: leaves[name + end] for end in ('', *lora.BESIDE) if name + end in leaves}
        dtype = np.dtype(np.float32) if len(parts) > 1 else leaves[name].dtype
        return weights.Unread(leaves[name].shape, dtype, lambda: lora.matrix(jax.device_get(parts), name))

    return trees.nested({name: unread(name) for name in leaves if not lora.is_beside(name)})


def read(path: str | os.PathLike, stage: config.Stage, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Path → numpy array of the leaves that go beside, or in place of, the parameters of a bundle.

    Args:
      path: a folder that `save` or PEFT wrote.
      stage: the bundle's.
      shapes: path → leaf of its parameters.

    Raises:
      UserError: no such folder, one of something else or of another model.
    """
    path = pathlib.Path(path).expanduser()
    if peft.holds(path):
        found = peft.read(path, stage, shapes)
    else:
        if not holds(path):
            raise UserError(f'{path} holds no adapters: neither {_FILE} nor {peft.CONFIG} is there')
        task = _stage(path).task
        if task != stage.task:
            raise UserError(f'{path}: adapters of a {task} model, and this one is {stage.task}')
        found = trees.flat(weights.load_weights(path / 'weights'))
    problems = [name for name, leaf in found.items() if not lora.fits(name, leaf, shapes)]
    if problems:
        more = f' and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise UserError(f'{path}: adapters of another model: {", ".join(problems[:3])}{more} fit nothing in this one')
    return found


def to_peft(path: str | os.PathLike, destination: pathlib.Path) -> None:
    """Writes a folder of `save` as PEFT loads it onto transformers' class of the model.

    Raises UserError: no such folder, parameters beside the adapters, what `peft.write` refuses.
    """
    path = pathlib.Path(path).expanduser()
    stage, found = _stage(path), trees.flat(weights.load_weights(path / 'weights'))
    if beside := sorted(name for name in found if not lora.is_adapter(name)):
        raise UserError(
            f'{path}: {beside[0]} was trained as well, and a folder of PEFT has adapters alone: '
            'convert the bundle beside it'
        )
    peft.write(destination, found, stage, stage.init_from.path)


def holds(path: pathlib.Path) -> bool:
    """Whether `save` wrote that folder."""
    return (path / _FILE).is_file()


def _stage(path: pathlib.Path) -> config.Stage:
    try:
        description = json.loads((path / _FILE).read_text(encoding='utf-8'))
        with config.located(str(path / _FILE)):
            version, stage = int(description['format']), config.parse_stage(description['stage'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path / _FILE}: damaged ({type(error).__name__}: {error})') from None
    if version > FORMAT:
        raise UserError(f'{path}: adapters of format {version}, this is {FORMAT}: upgrade big_vlm')
    return stage


def onto(params: Any, adapters: Mapping[str, Any]) -> Any:
    """The parameters with the adapters merged in, placed as they were and in their dtypes."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)

    def merge(params, adapters):
        merged = lora.merge(trees.nested(trees.flat(params) | adapters))
        return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), merged, trees.nested(trees.flat(params)))

    return jax.jit(merge, out_shardings=shardings)(params, dict(adapters))
