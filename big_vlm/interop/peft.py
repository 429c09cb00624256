"""LoRA adapters of PEFT, read and written: adapter_config.json and adapter_model.safetensors, without torch.

PEFT keeps of a matrix [out, in] the factors `lora_A.weight` [r, in] and `lora_B.weight` [out, r]. Their columns are
laid out as those of the matrix, so the mapping tables of `families` serve the factors too. Queries, keys and values
that ours holds in one array are several matrices of theirs; of those that a folder leaves out, ours are zero.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import einops
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.interop import hugging_face, rows
from big_vlm.interop.pretrained import family_of
from big_vlm.models import lora, matrices

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_NAME = re.compile(r'(?:base_model\.model\.)?(.*)\.lora_(A|B)(?:\.\w+)?\.weight')
# What changes the product or the matrices it is added to, and is computed otherwise here: key → what it may be.
_FIXED = {
    'bias': ('none',),
    'use_dora': (False, None),
    'fan_in_fan_out': (False, None),
    'alora_invocation_tokens': (None, []),
    'use_qalora': (False, None),
    'use_bdlora': (None, False),
    'arrow_config': (None,),
    'kasa_config': (None,),
    'monteclora_config': (None,),
    'layer_replication': (None, []),
    'modules_to_save': (None, []),
    'init_lora_weights': (True, False, None, 'gaussian', 'eva', 'orthogonal'),
}
# The published names → those of transformers 5, under which PEFT looks for them.
_TODAY = (
    (r'language_model\.model\.(.*)', r'model.language_model.\1'),
    (r'vision_tower\.vision_model\.(.*)', r'model.vision_tower.\1'),
    (r'(multi_modal_projector\..*)', r'model.\1'),
)


def holds(folder: pathlib.Path) -> bool:
    """Whether there is anything for `read`."""
    return (folder / CONFIG).is_file()


def read(folder: pathlib.Path, stage: config.Stage, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our path → float32 array of every factor and scale.

    Args:
      folder: with both files.
      stage: of the model; its task and `model` section choose the names.
      shapes: path → leaf of the model's parameters.

    Raises:
      UserError: a missing or damaged file, another kind of adapter, modules that our model lacks, other shapes.
    """
    settings, theirs = _files(folder)
    table = _table(stage, shapes)
    family = family_of(stage)
    found: dict[str, dict[str, np.ndarray]] = {}
    modules: dict[str, str] = {}  # published name → the file's
    for name, array in theirs.items():
        match = _NAME.fullmatch(name)
        if not match:
            raise UserError(f'{folder / WEIGHTS}: {name} is no factor of a linear layer: only those are read')
        published = hugging_face.published_name(match[1] + '.weight', family)
        found.setdefault(published, {})[match[2]] = array
        modules[published] = match[1]
    if unknown := sorted(set(found) - set(table)):
        more = f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''
        raise UserError(f'{folder}: adapters of {", ".join(unknown[:3])}{more}, which this model does not have')
    if half := sorted(name for name, pair in found.items() if len(pair) < 2):
        raise UserError(f'{folder / WEIGHTS}: of {half[0]} only one factor is there')
    ours: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for name, pair in found.items():
        path = table[name][0].our_name
        ranks[path] = max(ranks.get(path, 0), len(pair['A']))
    for name, pair in found.items():
        row, i = table[name]
        path, rank = row.our_name, len(pair['A'])
        for end, shape in _shapes(path, shapes[path].shape, ranks[path]).items():
            ours.setdefault(path + end, np.zeros(shape, np.float32))
        at = row.index(i)
        for end, array in ((lora.A, pair['A'].T), (lora.B, pair['B'])):
            leaf = ours[path + end]
            entry = _columns(row, array.astype(np.float32), end)
            if entry.shape[:-1] != leaf[at].shape[:-1]:
                raise UserError(f'{folder}: {name} has factors of another model: {pair["A"].shape}, {pair["B"].shape}')
            leaf[(*at, ..., slice(rank))] = entry
        ours[path + lora.SCALE][at] = _scale(settings, modules[name], rank)
    return ours


def write(folder: pathlib.Path, adapters: Mapping[str, Any], stage: config.Stage, base: str = '') -> None:
    """Writes the adapters of a model as PEFT loads them onto transformers' class of it.

    Args:
      folder: to make.
      adapters: path → factor or scale, as `lora.adapters` gives them.
      stage: of the model.
      base: name or path of the model they belong to, for the config.

    Raises:
      UserError: a folder that exists, a full disk, matrices that are no linear layer there.
    """
    if folder.exists():
        raise UserError(f'{folder} exists: choose another name, or remove it')
    paths = [path.removesuffix(lora.A) for path in adapters if path.endswith(lora.A)]
    table = _table(stage, {path: _dense(adapters, path) for path in paths})
    if homeless := sorted(set(paths) - {row.our_name for row, _ in table.values()}):
        raise UserError(f'{homeless[0]}: transformers has no linear layer for it, and PEFT no adapter')
    tensors, ranks, alphas = {}, {}, {}
    for name, (row, i) in table.items():
        module = name.removesuffix('.weight')
        for pattern, today in _TODAY if family_of(stage) == 'paligemma' else ():
            module = re.sub(f'^{pattern}$', today, module)
        at = row.index(i)
        a, b, scale = (np.asarray(adapters[row.our_name + end])[at] for end in (lora.A, lora.B, lora.SCALE))
        tensors[f'{_PREFIX}{module}.lora_A.weight'] = np.ascontiguousarray(_matrix(row, a)[0].T)
        tensors[f'{_PREFIX}{module}.lora_B.weight'] = np.ascontiguousarray(_matrix(row, b)[:, 0])
        ranks[module], alphas[module] = a.shape[-1], float(scale.ravel()[0]) * a.shape[-1]
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    description = {
        'peft_type': 'LORA',
        'task_type': None,
        'base_model_name_or_path': base,
        'r': rank,
        'lora_alpha': alpha,
        'rank_pattern': {f'^{re.escape(m)}$': r for m, r in ranks.items() if r != rank},
        'alpha_pattern': {f'^{re.escape(m)}$': x for m, x in alphas.items() if x != alpha},
        'target_modules': sorted(ranks),
        'lora_dropout': 0.0,
        'bias': 'none',
        'fan_in_fan_out': False,
        'inference_mode': True,
    }
    part = folder.with_name(f'.{folder.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        (part / CONFIG).write_text(json.dumps(description, indent=2) + '\n', encoding='utf-8')
        save_file(tensors, part / WEIGHTS, metadata={'format': 'pt'})
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{folder}: not written: {error}') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _files(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        settings = dict(json.loads((folder / CONFIG).read_text(encoding='utf-8')))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f'{folder} has no {pathlib.Path(error.filename or WEIGHTS).name}: copy it whole') from None
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f'{folder}: damaged ({type(error).__name__}: {error})') from None
    if settings.get('peft_type') != 'LORA':
        raise UserError(f'{folder / CONFIG}: peft_type is {settings.get("peft_type")!r}, only LORA is read')
    for key, accepted in _FIXED.items():
        if settings.get(key, accepted[0]) not in accepted:
            raise UserError(
                f'{folder / CONFIG}: {key} is {settings[key]!r}, and only {" or ".join(map(repr, accepted))} is read'
            )
    return settings, tensors


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of a module; a pattern of PEFT's is a name's end, or a regex over it."""
    alpha = settings.get('lora_alpha', 8)
    for pattern, value in (settings.get('alpha_pattern') or {}).items():
        if re.match(rf'(.*\.)?({pattern})$', module):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if settings.get('use_rslora') else rank)


def _table(stage: config.Stage, shapes: Mapping[str, Any]) -> dict[str, tuple[rows.Row, int]]:
    """Their name → (row, layer) of every linear layer that is one of the matrices in `shapes`."""
    table = {}
    for row in hugging_face.table_of(family_of(stage), stage.model):
        if row.our_name in shapes and matrices.axes(row.our_name) and row.their_part()[1] == 1:
            for i in range(shapes[row.our_name].shape[0] if row.stacked else 1):
                table[row.their_name.format(i=i)] = row, i
    return table


def _shapes(path: str, shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """Suffix → shape of what belongs to the matrix at a path."""
    inputs, outputs = matrices.axes(path)

    def kept(*without: int) -> tuple[int, ...]:
        return tuple(1 if axis - len(shape) in without else n for axis, n in enumerate(shape))

    return {lora.A: (*kept(*outputs), rank), lora.B: (*kept(*inputs), rank), lora.SCALE: kept(*inputs, *outputs)}


def _dense(adapters: Mapping[str, Any], path: str) -> Any:
    shape = np.broadcast_shapes(*(adapters[path + end].shape[:-1] for end in (lora.A, lora.B)))
    return np.broadcast_to(np.float32(0), shape)


def _columns(row: rows.Row, factor: np.ndarray, end: str) -> np.ndarray:
    """[in, r] or [out, r] of theirs → the entry of our factor."""
    theirs, ours = row.how.split(' -> ')
    array = factor[None] if end == lora.A else factor[:, None]
    out, into = _groups(theirs)
    single = out if end == lora.A else into
    sizes = {name: 1 if name in single else size for name, size in row.axes if name in theirs}
    return einops.rearrange(array, f'{theirs} r -> {ours} r', **sizes)


def _matrix(row: rows.Row, factor: np.ndarray) -> np.ndarray:
    """The entry of our factor → [out, in, r] of theirs, with out or in 1."""
    theirs, ours = row.how.split(' -> ')
    return einops.rearrange(factor, f'{ours} r -> {theirs} r')


def _groups(pattern: str) -> tuple[set[str], set[str]]:
    """The axes of '(N H) D' as ({N, H}, {D})."""
    first, second = re.findall(r'\([^)]*\)|\w+', pattern)
    return set(re.findall(r'\w+', first)), set(re.findall(r'\w+', second))
