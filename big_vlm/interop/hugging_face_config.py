"""What config.json of a Hugging Face folder says, in our words, and the other way round."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from big_vlm import config
from big_vlm.config import UserError, unknown
from big_vlm.data.contract import Contract
from big_vlm.interop import hugging_face_decoder, hugging_face_processor, hugging_face_tokenizer, pretrained
from big_vlm.interop.hugging_face_keys import fixed, read_json, sizes, their_sizes
from big_vlm.interop.pretrained import Pretrained
from big_vlm.models import gemma, naflex_vit, resnet, vit

# Their key → (ours, what an absent key means).
_VISION = {
    'hidden_size': ('width', 768),
    'num_hidden_layers': ('depth', 12),
    'intermediate_size': ('mlp_dim', 3072),
    'num_attention_heads': ('num_heads', 12),
}
# Their key → the values under which our models compute the same.
_ENCODER_FIXED = {'hidden_act': ('gelu_pytorch_tanh',), 'layer_norm_eps': (1e-6,)}
_NAFLEX_FIXED = {'num_patches': (naflex_vit.POSITIONS**2,)}  # of the position embedding, not of a picture
GENERATION = 'generation_config.json'
PALIGEMMA_DECODERS = ('gemma', 'gemma2')  # those of PaliGemma 1 and 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """A folder's model: `vocab_size` rows of the `table_rows` of its token table are tokens, the others padding.

    `decoder_of`: the model_type whose decoder alone this is, if it is a part. `end_ids`: that end an answer.
    """

    family: str
    model: config.Model
    contract: config.Contract
    vocab_size: int
    table_rows: int
    decoder_of: str = ''
    end_ids: tuple[int, ...] = ()


def read(folder: pathlib.Path) -> Settings:
    """Raises UserError: no config.json, another family, options that our models do not have."""
    where = folder / 'config.json'
    content = read_json(where)
    family = content.get('model_type')
    readers = dict.fromkeys(pretrained.TOWERS, _siglip) | dict.fromkeys(pretrained.DECODERS, _gemma)
    readers |= {'paligemma': _paligemma, 'gemma3': _gemma3}
    if family not in readers:
        raise unknown('model_type', str(family), readers, str(where))
    try:
        settings = readers[family](content, where)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f'{where}: damaged ({type(error).__name__}: {error})') from None
    contract = settings.contract
    if settings.family not in pretrained.DECODERS:
        patch = vit.decode_variant(settings.model.image.variant)['patch_size']
        contract = hugging_face_processor.read(folder, contract, patch)
    contract = dataclasses.replace(contract, **_text(folder, settings.family))
    return dataclasses.replace(settings, contract=contract, end_ids=_end_ids(folder, settings.family, content))


def _siglip(content: Mapping[str, Any], where: pathlib.Path) -> Settings:
    family, text, vision = content['model_type'], content.get('text_config') or {}, content.get('vision_config') or {}
    image, image_size = _image_tower(vision, f'{where}: vision_config', head=True)
    pictures = dict(image_size=image_size)
    if family == 'siglip2':
        fixed(vision, _NAFLEX_FIXED, f'{where}: vision_config')
        pictures = dict(max_patches=pretrained.NAFLEX_PATCHES)
    fixed(text, _ENCODER_FIXED, f'{where}: text_config')
    tower = sizes(text, _VISION)
    # Without a projection_size the head keeps the text tower's width.
    embed_dim = text.get('projection_size') or tower['width']
    width = sizes(vision, _VISION)['width']
    if embed_dim != width:
        raise UserError(f'{where}: texts of {embed_dim} and images of {width} numbers cannot be compared')
    rows = int(text.get('vocab_size', 32_000))
    model = config.Model(image=image, text=pretrained.text_tower(**tower))
    settings = config.Contract(**pictures, text_length=int(text.get('max_position_embeddings', 64)))
    return Settings(family, model, settings, rows, rows)


def _paligemma(content: Mapping[str, Any], where: pathlib.Path) -> Settings:
    text, vision = content.get('text_config') or {}, content.get('vision_config') or {}
    family = text.get('model_type', 'gemma')
    if family not in PALIGEMMA_DECODERS:
        raise unknown('text_config.model_type', str(family), PALIGEMMA_DECODERS, str(where))
    image, image_size = _image_tower(vision, f'{where}: vision_config', head=False)
    decoder = hugging_face_decoder.read(text, family, f'{where}: text_config')
    rows = int(text.get('vocab_size', 256_000))
    # `<image>` is the first id beyond the tokens; it and the padding after it are no part of our table.
    tokens = min(int(content.get('image_token_index', content.get('image_token_id', rows))), rows)
    settings = config.Contract(
        image_size=image_size, text_length=pretrained.paligemma_text_length(image_size), lower=False
    )
    return Settings('paligemma', config.Model(image=image, decoder=decoder), settings, tokens, rows)


def _gemma(content: Mapping[str, Any], where: pathlib.Path | str) -> Settings:
    family = content['model_type']
    # Under a PaliGemma it says what is always so; alone, it makes an encoder.
    fixed(content, {'use_bidirectional_attention': (False, None)}, str(where))
    rows = int(content.get('vocab_size', hugging_face_decoder.ROWS[family]))
    model = config.Model(decoder=hugging_face_decoder.read(content, family, str(where)))
    return Settings(family, model, pretrained.OF_TEXT, rows, rows)


def _gemma3(content: Mapping[str, Any], where: pathlib.Path) -> Settings:
    """The decoder of a Gemma 3 with an image tower, of 4B and above: its images stand behind the start token of the
    prompt, and ours before it."""
    text = {**(content.get('text_config') or {}), 'model_type': 'gemma3_text'}
    return dataclasses.replace(_gemma(text, f'{where}: text_config'), decoder_of=content['model_type'])


def _image_tower(vision: Mapping[str, Any], where: str, head: bool) -> tuple[config.ImageTower, int]:
    fixed(vision, _ENCODER_FIXED | {'num_channels': (3,)}, where)
    if vision.get('vision_use_head', True) != head:
        raise UserError(f'{where}: vision_use_head must be {str(head).lower()} for this family')
    patch, size = int(vision.get('patch_size', 16)), int(vision.get('image_size', 224))
    return pretrained.image_tower(patch, pool='map' if head else 'none', **sizes(vision, _VISION)), size


def _text(folder: pathlib.Path, family: str) -> dict[str, bool]:
    """What the folder's tokenizer says of case and, for texts of towers, of their end: fields of the contract."""
    file = folder / hugging_face_tokenizer.CONFIG
    content = read_json(file) if file.is_file() else {}
    keys = {'lower': 'do_lower_case'} | ({'eos': 'add_eos_token'} if family in pretrained.TOWERS else {})
    return {field: content[key] for field, key in keys.items() if isinstance(content.get(key), bool)}


def _end_ids(folder: pathlib.Path, family: str, content: Mapping[str, Any]) -> tuple[int, ...]:
    """With which transformers ends an answer: as generation_config.json says, else config.json."""
    if family in pretrained.TOWERS:
        return ()
    file = folder / GENERATION
    places = read_json(file) if file.is_file() else {}, content, content.get('text_config') or {}
    said = next((place['eos_token_id'] for place in places if place.get('eos_token_id') is not None), [])
    ids = said if isinstance(said, list) else [said]
    if not all(type(i) is int for i in ids):
        raise UserError(f'{folder}: eos_token_id is {said!r}: must be an id or a list of ids')
    return tuple(ids)


def describe(model: Pretrained, contract: Contract | None) -> dict[str, dict[str, Any]]:
    """File name → content of the JSON files of a folder, all but the tokenizer's.

    Raises UserError for what transformers has no class for.
    """
    settings, sections = model.settings, model.model
    _expressible(model)
    image, decoder = sections.image, sections.decoder
    # In which transformers loads all of them; a file may mix, and the widest loses nothing.
    dtype = functools.reduce(jnp.promote_types, (leaf.dtype for leaf in model.weights.shapes.values())).name
    ids = {}
    if contract is not None:
        ends = list(contract.ends) if contract.end_ids else contract.eos_id
        ids = {'pad_token_id': contract.pad_id, 'eos_token_id': ends}
        ids['bos_token_id'] = contract.bos_id if contract.bos_id >= 0 else None
    head = {'dtype': dtype}
    generation = {GENERATION: ids} if ids else {}
    if model.family in pretrained.DECODERS:
        return {'config.json': head | hugging_face_decoder.describe(model, model.vocab_size) | ids} | generation
    vision = their_sizes(_VISION, vit.resolve(image.variant, **_given(image)))
    patch = vit.decode_variant(image.variant)['patch_size']
    if model.family == 'siglip2':
        vision |= {'model_type': 'siglip2_vision_model', 'num_patches': naflex_vit.POSITIONS**2, 'patch_size': patch}
    else:
        vision |= {'model_type': 'siglip_vision_model', 'image_size': settings.image_size, 'patch_size': patch}
    vision |= {'hidden_act': 'gelu_pytorch_tanh', 'layer_norm_eps': 1e-6, 'num_channels': 3}
    tokens = (settings.image_size // patch) ** 2
    if model.family in pretrained.TOWERS:
        text = their_sizes(_VISION, vit.resolve(sections.text.variant, **_given(sections.text)))
        text |= {'model_type': f'{model.family}_text_model', 'vocab_size': model.vocab_size}
        text |= {'max_position_embeddings': settings.text_length, 'projection_size': vision['hidden_size']}
        text |= {'hidden_act': 'gelu_pytorch_tanh', 'layer_norm_eps': 1e-6, **ids}
        vision |= {'vision_use_head': True}
        name = model.family.capitalize()
        processor = hugging_face_processor.describe(settings, f'{name}Processor', patch)
        content = {'architectures': [f'{name}Model'], 'model_type': model.family, **head, 'initializer_factor': 1.0}
        content |= {'text_config': text, 'vision_config': vision}
        return {'config.json': content, 'preprocessor_config.json': processor}
    width = gemma.Gemma(**dataclasses.asdict(decoder)).sizes['width']
    text = hugging_face_decoder.describe(model, pretrained.padded(model.vocab_size))
    text |= {'num_image_tokens': tokens, **ids}
    vision |= {'vision_use_head': False, 'projection_dim': width}
    content = {'architectures': ['PaliGemmaForConditionalGeneration'], 'model_type': 'paligemma', **head, **ids}
    content |= {'image_token_index': model.vocab_size, 'vocab_size': model.vocab_size}
    content |= {'hidden_size': width, 'projection_dim': width, 'tie_word_embeddings': True}
    content |= {'text_config': text, 'vision_config': vision}
    processor = hugging_face_processor.describe(settings, 'PaliGemmaProcessor', patch) | {'image_seq_length': tokens}
    return {'config.json': content, 'preprocessor_config.json': processor} | generation


def _given(tower: config.TextTower | config.ImageTower) -> dict[str, int]:
    return {key: getattr(tower, key) for key in ('width', 'depth', 'mlp_dim', 'num_heads')}


def _expressible(model: Pretrained) -> None:
    """Raises UserError for settings under which transformers would compute something else."""
    sections = model.model
    needs = []
    if model.family not in pretrained.DECODERS:
        if resnet.is_variant(sections.image.variant):
            raise UserError(
                f'{model.weights.where}: model.image.variant is {sections.image.variant!r}, a ResNet, and transformers '
                f'has no {model.family} with one'
            )
        needs.append(('model.image.position', sections.image.position, 'learn'))
    if model.family in pretrained.TOWERS:
        width = vit.resolve(sections.image.variant, **_given(sections.image))['width']
        needs += [
            ('model.text.kind', sections.text.kind, 'transformer'),
            ('model.text.causal', sections.text.causal, False),
            ('model.image.pool', sections.image.pool, 'map'),
            ('model.text.pool', sections.text.pool, 'last'),
            ('model.text.mask', sections.text.mask, False),
            ('model.embed_dim', sections.embed_dim or width, width),
        ]
    else:
        if model.family not in pretrained.DECODERS:
            needs += [
                ('contract.max_patches', model.settings.max_patches, 0),
                ('model.projector', sections.projector, 'linear'),
                ('contract.image_alone', model.settings.image_alone, False),
                ('model.image.head_bias', sections.image.head_bias, True),
            ]
        prompts = pretrained.OF_TEXT if model.family in pretrained.DECODERS else config.Contract()
        needs += [
            (f'contract.{key}', getattr(model.settings, key), getattr(prompts, key)) for key in pretrained.OF_PROMPTS
        ]
        family = pretrained.decoder_family(sections.decoder.variant)
        if family == 'gemma':
            needs.append(('model.decoder.final_softcap', sections.decoder.final_softcap, 0.0))
        if model.family == 'paligemma' and family not in PALIGEMMA_DECODERS:
            needs.append(('the family of model.decoder.variant', family, ' or '.join(PALIGEMMA_DECODERS)))
    for key, value, needed in needs:
        if value != needed:
            # An .npz has no contract, and what reads it takes the same for granted.
            of_prompt = key.removeprefix('contract.') in pretrained.OF_PROMPTS
            instead = 'keep the bundle' if of_prompt else 'write an .npz instead'
            raise UserError(
                f'{model.weights.where}: {key} is {value!r}, and transformers computes a {model.family} with '
                f'{needed!r}: {instead}'
            )
