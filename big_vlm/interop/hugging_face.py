"""Hugging Face folders, read and written without torch: config.json, preprocessor, tokenizer, safetensors.

Folders of transformers 4 and 5 differ in prefixes; both are read, and the published ones are written, which both read.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from collections.abc import Callable

import numpy as np

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.data.contract import Contract
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import (
    families,
    hugging_face_config,
    hugging_face_tokenizer,
    pretrained,
    rows,
    safetensors_files,
)
from big_vlm.interop.lazy import LazyWeights, check_names, with_rows
from big_vlm.interop.pretrained import Pretrained
from big_vlm.models import gemma, vit

# Version 5's names → the published ones. The first that matches is applied.
_SPELLINGS = {
    'paligemma': (
        (r'(?:model\.)?vision_tower\.(?:vision_model\.)?(.*)', r'vision_tower.vision_model.\1'),
        (r'model\.multi_modal_projector\.(.*)', r'multi_modal_projector.\1'),
        (r'(?:model\.)?language_model\.(?!model\.|lm_head)(.*)', r'language_model.model.\1'),
        (r'lm_head\.(.*)', r'language_model.lm_head.\1'),
    ),
    # As the decoder of a 'gemma3' has them.
    'gemma3_text': (
        (r'language_model\.lm_head\.(.*)', r'lm_head.\1'),
        (r'(?:model\.)?language_model\.(?:model\.)?(.*)', r'model.\1'),
    ),
}
# family → (the unembedding that a file may repeat, the token table it has to equal).
_TIED = {
    **dict.fromkeys(pretrained.DECODERS, ('lm_head.weight', 'model.embed_tokens.weight')),
    'paligemma': ('language_model.lm_head.weight', 'language_model.model.embed_tokens.weight'),
}
_OF_NO_USE = re.compile(r'.*\.(?:position_ids|rotary_emb\.inv_freq)')  # buffers of old releases, some of whole numbers
_OF_IMAGES = re.compile(r'(?:model\.)?(?:vision_tower|multi_modal_projector)\..*')


def read(folder: pathlib.Path) -> Pretrained:
    """The model in a folder; of a Gemma 3 with an image tower, its decoder. Weights are read when they are asked for,
    those of all layers stacked.

    Raises:
      UserError: no config.json, another family or an option of it that is not supported, weights missing, unexpected,
        misshapen or damaged, a separate unembedding.
    """
    settings = hugging_face_config.read(folder)
    family = settings.family
    theirs = safetensors_files.read(folder, without=_OF_NO_USE)
    if settings.decoder_of:
        theirs = theirs.renamed({name: name for name in theirs.shapes if not _OF_IMAGES.fullmatch(name)})
    theirs = _without_tied(_published_names(theirs, family), family)
    ours = pretrained.expected(family, settings.model, settings.contract, settings.vocab_size)
    table = table_of(family, settings.model)
    name = _token_table(family)
    wanted = rows.their_shapes(table, ours)
    if name in theirs.shapes and theirs.shapes[name].shape == (settings.table_rows, *wanted[name].shape[1:]):
        theirs = with_rows(theirs, name, settings.vocab_size)
    check_names(wanted, theirs.shapes, str(folder), f'the {family} that its config.json describes')
    return Pretrained(
        family,
        settings.model,
        settings.contract,
        settings.vocab_size,
        rows.to_ours(table, ours, theirs),
        hugging_face_tokenizer.of_folder(folder),
        settings.decoder_of,
        settings.end_ids,
    )


def write(
    folder: pathlib.Path,
    model: Pretrained,
    contract: Contract | None = None,
    tokenizer: Tokenizer | None = None,
    done: Callable[[int], None] | None = None,
) -> None:
    """Writes a folder that transformers 5 (and 4) loads. It must not exist, and appears when it is whole.

    Args:
      folder: to make.
      model: what to write.
      contract, tokenizer: how text becomes ids; None leaves the tokenizer's files out.
      done: called with the bytes of each tensor.

    Raises:
      UserError: a model that transformers has no class for, a folder that exists, a full disk.
    """
    if folder.exists():
        raise UserError(f'{folder} exists: choose another name, or remove it')
    description = hugging_face_config.describe(model, contract)
    table = table_of(model.family, model.model)
    if homeless := sorted(set(model.weights.shapes) - {row.our_name for row in table}):
        raise UserError(
            f'{model.weights.where}: a {model.family} of transformers has no place for {", ".join(homeless[:4])}'
            f'{", …" if len(homeless) > 4 else ""}: write an .npz instead'
        )
    theirs = rows.to_theirs(table, model.weights)
    if model.family == 'paligemma':
        theirs = with_rows(theirs, _token_table(model.family), pretrained.padded(model.vocab_size))
    part = folder.with_name(f'.{folder.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, content in description.items():
            (part / name).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
        if tokenizer is not None and contract is not None:
            hugging_face_tokenizer.write(part, model.family, contract, tokenizer)
        safetensors_files.write(part, theirs, done)
        part.rename(folder)
    except OSError as error:
        raise UserError(f'{folder}: not written: {error.strerror or error}') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def table_of(family: str, model: config.Model) -> list[rows.Row]:
    """The mapping table of a model of these sizes."""
    image, text = (
        vit.resolve(tower.variant, **{key: getattr(tower, key) for key in ('width', 'depth', 'mlp_dim', 'num_heads')})
        for tower in (model.image, model.text)
    )
    if family in pretrained.TOWERS:
        return families.siglip(family, image['num_heads'], text['num_heads'])
    sizes = gemma.Gemma(
        variant=model.decoder.variant, num_heads=model.decoder.num_heads, num_kv_heads=model.decoder.num_kv_heads
    ).sizes
    heads = sizes['num_heads'], sizes['num_kv_heads']
    if family == 'paligemma':
        rest = families.decoder(pretrained.decoder_family(model.decoder.variant), *heads)
        return families.paligemma(image['num_heads'], rest)
    return families.gemma(family, *heads)


def published_name(name: str, family: str) -> str:
    """A tensor's name of transformers 5 as it was published; those that were not renamed stay."""
    for pattern, spelling in _SPELLINGS.get(family, ()):
        if re.fullmatch(pattern, name):
            return re.sub(pattern, spelling, name)
    return name


def _token_table(family: str) -> str:
    return {
        **dict.fromkeys(pretrained.TOWERS, 'text_model.embeddings.token_embedding.weight'),
        'paligemma': 'language_model.model.embed_tokens.weight',
    }.get(family, 'model.embed_tokens.weight')


def _published_names(weights: LazyWeights, family: str) -> LazyWeights:
    names: dict[str, str] = {}
    for name in weights.shapes:
        new = published_name(name, family)
        if new in names.values():
            raise UserError(f'{weights.where}: {name} is there under two names')
        names[name] = new
    return weights.renamed(names)


def _without_tied(weights: LazyWeights, family: str) -> LazyWeights:
    """Without the unembedding, which must be the token table again."""
    head, table = _TIED.get(family, ('', ''))
    if head not in weights.shapes:
        return weights
    same = table in weights.shapes and weights.shapes[head] == weights.shapes[table]
    if not same or not np.array_equal(weights.read(head), weights.read(table)):
        raise UserError(f'{weights.where}: {head} differs from {table}: a decoder has one table for both ends')
    return weights.renamed({name: name for name in weights.shapes if name != head})
