"""One side of a comparison, computed by our own models: what an input becomes, stage after stage.

A `Side` is frozen: a suspected fault is mended by making another one with `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import string
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np

from big_vlm import bundle
from big_vlm.checkpoints import trees
from big_vlm.config import UserError
from big_vlm.data import images, naflex, prompts
from big_vlm.data.contract import Contract
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import lazy, pretrained
from big_vlm.models import gemma, image_towers, paligemma, two_towers
from big_vlm.ops import masks, pixels, position_resize


class Tokens(NamedTuple):
    """A row without padding, but for a text tower's: `ids` int32 [T], -1 at image slots; `answer` int32 [T], 1 where a
    token is not seen by those before it."""

    ids: np.ndarray
    answer: np.ndarray


@dataclasses.dataclass(frozen=True)
class Side:
    """A model with its preprocessing and its weights in memory.

    Attributes:
      model: family and sizes.
      contract: how pixels and text become arrays.
      tokenizer: the pieces.
      weights: name → float32 array, under our names.
      joint: the separator is tokenized together with the prompt, not on its own.
      bare: a dual encoder's text loses punctuation, and of spaces all but one in a run: transformers' SigLIP 1 does so.
    """

    model: pretrained.Pretrained
    contract: Contract
    tokenizer: Tokenizer
    weights: Mapping[str, np.ndarray]
    joint: bool = False
    bare: bool = False

    @property
    def sees(self) -> bool:
        """Whether there is an image tower."""
        return self.model.family not in pretrained.DECODERS

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H,W,3] of any size → float32 of the size the image tower reads; of a NaFlex one, whole patches."""
        if self.contract.max_patches:
            row = naflex.rows(image, self.contract)
            prepared = naflex.picture(row['patches'], row['patch_grid'])
        else:
            prepared = images.prepare(image, self.contract)
        return np.asarray(pixels.to_model_range(prepared, self.contract.value_range))

    def tokens(self, prompt: str, answer: str) -> Tokens:
        """The row of a text or, of a PaliGemma, of a prompt and its answer. Raises UserError for one that is too long.

        A dual encoder and a decoder alone read the prompt only.
        """
        contract = self.contract
        prompt, answer = (text.lower() if contract.lower else text for text in (prompt, answer))
        if self.model.family in pretrained.TOWERS:
            if self.bare:
                prompt = ' '.join(prompt.translate(str.maketrans('', '', string.punctuation)).split())
            ids, _ = prompts.contrastive_text(self.tokenizer.encode(prompt), contract)
            return Tokens(ids, np.zeros_like(ids))
        if self.joint:
            prompt, contract = prompt + contract.separator, dataclasses.replace(contract, separator_ids=())
        suffix = self.tokenizer.encode(answer) if self.sees else None
        row = prompts.generative_row(self.tokenizer.encode(prompt), suffix, contract)
        real = row['segment'] != 0
        if self.sees and row['text'][real][-1] != contract.eos_id:  # cut, as no oracle does
            slots = f'{contract.text_length} text slots of {self.model.weights.where}'
            raise UserError(f'prompt and answer do not fit into the {slots}: shorten them')
        return Tokens(row['text'][real], row['mask_ar'][real])

    def states(self, image: np.ndarray | None, tokens: Tokens) -> dict[str, np.ndarray]:
        """Stage → float32 array, in the order of computation. `image` and `tokens` as the methods above return them."""
        # In float32, whatever the model was trained in.
        settings = dataclasses.replace(self.model.model, dtype='float32', remat='none', scan=True)
        model = dataclasses.replace(self.model, model=settings).build()
        params = trees.nested(self.weights)
        if isinstance(model, two_towers.TwoTowers):
            real = tokens.ids != self.contract.pad_id
            inputs = rows_of(image, self.contract.patch_size) if self.contract.max_patches else image
            inputs = jax.tree.map(lambda x: x[None], inputs)
            out = jax.device_get(_towers(model, params, inputs, tokens.ids[None], real[None]))
        else:
            out = jax.device_get(_decoder(model, params, image, *(x[None] for x in tokens)))
        return dict(_in_order(out))


def rows_of(picture: np.ndarray, patch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture [H,W,3] of whole patches as a NaFlex tower takes it, without padding: (patches, mask, grid)."""
    patches = einops.rearrange(picture, '(h p) (w q) C -> (h w) (p q C)', p=patch_size, q=patch_size)
    return patches, np.ones(len(patches), bool), np.array(picture.shape[:2], np.int32) // patch_size


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest value of `theirs`; inf for another shape."""
    if mine.shape != theirs.shape:
        return math.inf
    return float(np.abs(mine - theirs).max(initial=0.0) / (np.abs(theirs).max(initial=0.0) or 1.0))


def open_pair(source: str | os.PathLike, against: str | os.PathLike) -> tuple[Side, Side]:
    """Two checkpoints of one architecture, each in any format that `bundle.convert` reads.

    Raises UserError for what cannot be read, has weights of other names or shapes than the other, is of a family whose
    stages are not known here, or has no tokenizer where the other has none either.
    """
    (model, _), (other, _) = bundle.open_model(source), bundle.open_model(against)
    for one in (model, other):
        _check_known(one)
    if model.family != other.family:
        raise UserError(f'{source} is a {model.family}, {against} a {other.family}: nothing to compare')
    lazy.check_names(other.weights.shapes, model.weights.shapes, os.fspath(source), f'a model as {against}')
    tokenizer = model.own_tokenizer() or other.own_tokenizer()
    if tokenizer is None:
        raise UserError(f'neither {source} nor {against} comes with a tokenizer: make one of them a bundle first')
    sides = _side(source, model, tokenizer), _side(against, other, tokenizer)
    sizes = [side.contract.image_size for side in sides]
    if sides[0].sees and len({*sizes, model.settings.image_size, other.settings.image_size}) > 1:
        raise UserError(f'{source} reads images of {sizes[0]} pixels, {against} of {sizes[1]}: nothing to compare')
    return sides


def _side(path, model, tokenizer):
    path = pathlib.Path(path).expanduser()
    if (path / 'bundle.json').is_file():  # its contract is written, and may be wrong
        _, contract, tokenizer, _ = bundle.read(path)
    else:
        tokenizer = model.fitted(model.own_tokenizer() or tokenizer)
        contract = model.contract(tokenizer)
    contract = dataclasses.replace(contract, images=1, image_tokens=contract.image_tokens // contract.images)
    weights = {name: np.asarray(model.weights.read(name), np.float32) for name in model.weights.shapes}
    return Side(model, contract, tokenizer, weights)


def _check_known(model):
    sections, where = model.model, model.weights.where
    known, of_patches = [], model.settings.max_patches > 0
    if model.family in pretrained.TOWERS:
        known.append(('model.text.kind', sections.text.kind, 'transformer'))
    elif model.family not in pretrained.DECODERS:
        known.append(('contract.max_patches', model.settings.max_patches, 0))
        known.append(('model.projector', sections.projector, 'linear'))
    if model.family not in pretrained.DECODERS:
        tower = image_towers.from_config(sections.image, naflex=of_patches)
        known += [('the image tower', type(tower).__name__, 'NaFlexViT' if of_patches else 'ViT')]
        known += [('model.image.position', sections.image.position, 'learn')]
    for what, value, needed in known:
        if value != needed:
            raise UserError(
                f'{where}: {what} is {value!r}, and only models with {needed!r} are compared stage by stage'
            )


@functools.partial(jax.jit, static_argnames='model')
def _towers(model, params, image, text, real):
    zimg, ztxt, out = model.apply(params, image, text, real)
    stem, positions = out['img/stem'], params['img']['pos_embedding']
    if model.max_patches:
        positions = position_resize.antialiased_each(positions, image[2], stem.shape[1])
    tokens = params['txt']['Embed_0']['embedding'][text]
    return {
        'image patches': stem,
        'image positions': stem + positions,
        'image layer': out['img/blocks'],
        'image norm': out['img/encoded'],
        'image pooled': out['img/pooled'],
        'text tokens': tokens,
        'text positions': tokens + params['txt']['pos_embedding'],
        'text layer': out['txt/blocks'],
        'text norm': out['txt/encoded'],
        'text projected': ztxt * out['txt/norm'],
        'image embedding': zimg,
        'text embedding': ztxt,
        'logits': zimg @ ztxt.T * jnp.exp(params['t']) + params['b'],
    }


@functools.partial(jax.jit, static_argnames='model')
def _decoder(model, params, image, ids, answer):
    llm, out = model, {}
    if isinstance(model, paligemma.PaliGemma):
        llm, slots = model.llm, model.image_tokens
        features, tower = model.image_features(params, image[None, None])
        x = model.embed(params, features, None, ids)
        out = {
            'image patches': tower['stem'],
            'image positions': tower['stem'] + params['img']['pos_embedding'],
            'image layer': tower['blocks'],
            'image norm': tower['encoded'],
            'image projected': x[:, :slots],
            'decoder image slots': x[:, :slots],
        }
    else:
        slots, x = 0, gemma.embed(llm, params['llm'], ids)
    position = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    mask = masks.attention_mask(jnp.ones_like(ids), answer)
    last, llm_out = llm.apply({'params': params['llm']}, x, position, mask)
    norm = llm.apply({'params': params['llm']}, last, method=lambda module, x: module.final_norm(x))
    return out | {
        'decoder text slots': x[:, slots:],
        'decoder layer': llm_out['blocks'],
        'decoder norm': norm,
        # The last image slot predicts the first token.
        'logits': gemma.logits(llm, params['llm'], last[:, max(slots - 1, 0) :]),
    }


# A jitted function returns its dict sorted by name.
_ORDER = (
    *(f'image {x}' for x in ('patches', 'positions', 'layer', 'norm', 'pooled', 'projected')),
    *(f'text {x}' for x in ('tokens', 'positions', 'layer', 'norm', 'projected')),
    *('image embedding', 'text embedding'),
    *(f'decoder {x}' for x in ('image slots', 'text slots', 'layer', 'norm')),
    'logits',
)


def _in_order(out: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for name in _ORDER:
        if name not in out:
            continue
        if name.endswith(' layer'):
            yield from ((f'{name} {i}', x[0]) for i, x in enumerate(out[name]))
        else:
            yield name, out[name][0]
