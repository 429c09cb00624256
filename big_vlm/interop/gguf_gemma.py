"""Gemma 1, 2 and 3 (text) out of a GGUF file and into one: sizes, weights and tokenizer.

llama.cpp's conventions for Gemma: a norm's weight is stored with the 1 that our norms add; queries and keys are not
permuted, as Gemma rotates halves; the unembedding is the token table and is not stored; which Gemma scales its queries
by the width is known by its number of layers; a Gemma 2's output logits are capped.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from big_vlm import config
from big_vlm.config import UserError, unknown
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import families, gguf_files, gguf_tokenizer, hugging_face_decoder, pretrained, rows
from big_vlm.interop.lazy import LazyWeights, check_names
from big_vlm.interop.pretrained import Pretrained
from big_vlm.models import gemma
from big_vlm.models.gemma_variants import generation

_FAMILIES = {'gemma': 'gemma', 'gemma2': 'gemma2', 'gemma3': 'gemma3_text'}  # their architecture → ours
# Below the architecture's name → the key of a config.json. The first six have to be there.
_NEEDED = {
    'embedding_length': 'hidden_size',
    'block_count': 'num_hidden_layers',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
    'attention.head_count_kv': 'num_key_value_heads',
    'attention.key_length': 'head_dim',
}
_KEYS = _NEEDED | {
    'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
    'attention.sliding_window': 'sliding_window',
    'attn_logit_softcapping': 'attn_logit_softcapping',
    'final_logit_softcapping': 'final_logit_softcapping',
    'rope.freq_base': 'rope_theta',
    'rope.freq_base_swa': 'rope_local_base_freq',
}
# Hugging Face's names → theirs.
_ENDS = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm'}
_LAYER = {
    'input_layernorm': 'attn_norm',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'self_attn.q_norm': 'attn_q_norm',
    'self_attn.k_norm': 'attn_k_norm',
    'post_attention_layernorm': 'post_attention_norm',
    'pre_feedforward_layernorm': 'ffn_norm',
    'post_feedforward_layernorm': 'post_ffw_norm',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
}


def read(file: pathlib.Path) -> Pretrained:
    """The decoder in a GGUF file, its weights as float32 when they are asked for.

    Raises:
      UserError: another architecture, sizes that are not told, options that our models do not have, tensors missing,
        unexpected, misshapen, of an unknown type or cut off.
    """
    content = gguf_files.read(file)
    said, weights = content.said, content.weights
    architecture = str(said.get('general.architecture'))
    if architecture not in _FAMILIES:
        raise unknown('general.architecture', architecture, _FAMILIES, str(file))
    family = _FAMILIES[architecture]
    model = config.Model(decoder=_decoder(said, architecture, str(file)))
    sizes = gemma.Gemma(**dataclasses.asdict(model.decoder)).sizes
    table = _table(family, sizes['num_heads'], sizes['num_kv_heads'])
    tokens = weights.shapes['token_embd.weight'].shape[0] if 'token_embd.weight' in weights.shapes else 0
    settings = pretrained.OF_TEXT
    ours = pretrained.expected(family, model, settings, tokens or hugging_face_decoder.ROWS[family])
    check_names(rows.their_shapes(table, ours), weights.shapes, str(file), f'the {architecture} that it describes')
    # Made when it is asked for: that takes seconds, and weights alone don't need it.
    tokenizer = functools.partial(gguf_tokenizer.read, said, tokens, str(file))
    ends = gguf_tokenizer.end_ids(said, str(file))
    ours_of_theirs = rows.to_ours(table, ours, _norms(weights, -1))
    return Pretrained(family, model, settings, tokens, ours_of_theirs, tokenizer, end_ids=ends)


def write(
    file: pathlib.Path,
    model: Pretrained,
    tokenizer: Tokenizer,
    precision: str = 'F32',
    done: Callable[[int], None] | None = None,
) -> None:
    """Writes a Gemma, or the decoder of a PaliGemma, as a GGUF file; see `gguf_files.write`.

    In F32 all weights come back bit for bit, but for the scales of norms: of these it is the sum of 1 and the scale,
    which is what a norm computes with.

    Raises UserError: a model without a decoder, one that llama.cpp would compute otherwise, a decoder alone that was
    trained with prompts of another form, a tokenizer of another kind, a full disk.
    """
    where, ours = model.weights.where, model.model.decoder
    if model.family in pretrained.TOWERS:
        raise UserError(
            f'{where} is a {model.family}: GGUF files are written of Gemmas, and of the decoders of PaliGemmas'
        )
    if model.family in pretrained.DECODERS:
        for key in pretrained.OF_PROMPTS:
            value, needed = getattr(model.settings, key), getattr(pretrained.OF_TEXT, key)
            if value != needed:
                raise UserError(
                    f'{where}: contract.{key} is {value!r}, and llama.cpp reads the prompt of a Gemma with {needed!r}: '
                    'keep the bundle'
                )
    family = pretrained.decoder_family(ours.variant)
    [architecture] = [theirs for theirs, name in _FAMILIES.items() if name == family]
    said = _describe(model, architecture)
    mine, theirs = (_computed(decoder) for decoder in (ours, _decoder(said, architecture, where)))
    if unlike := [name for name in mine if mine[name] != theirs[name]]:
        raise UserError(
            f'{where}: model.decoder has {unlike[0]} {mine[unlike[0]]}, and llama.cpp computes such a {architecture} '
            f'with {theirs[unlike[0]]}: write a Hugging Face folder or an .npz instead'
        )
    shapes = pretrained.expected(family, model.model, model.settings, model.vocab_size)
    alone = model.weights.renamed({name: name for name in shapes})
    sizes = gemma.Gemma(**dataclasses.asdict(ours)).sizes
    table = _table(family, sizes['num_heads'], sizes['num_kv_heads'])
    said |= {'general.type': 'model', 'general.name': file.stem}
    said |= gguf_tokenizer.describe(tokenizer, model.vocab_size, model.further_ends(tokenizer))
    gguf_files.write(file, architecture, said, _norms(rows.to_theirs(table, alone), 1), precision, done)


def _describe(model: Pretrained, architecture: str) -> dict[str, Any]:
    text = hugging_face_decoder.describe(model, model.vocab_size)
    said = {key: text[name] for key, name in _KEYS.items() if text.get(name) is not None}
    said |= {'attention.value_length': text['head_dim'], 'context_length': text['max_position_embeddings']}
    said['vocab_size'] = model.vocab_size
    if scaling := text.get('rope_scaling'):
        said |= {'rope.scaling.type': scaling['rope_type'], 'rope.scaling.factor': scaling['factor']}
    return {f'{architecture}.{key}': value for key, value in said.items()}


def _computed(decoder: config.Decoder) -> dict[str, Any]:
    """All that tells one decoder's mathematics from another's."""
    built = gemma.Gemma(**dataclasses.asdict(decoder))
    return built.sizes | dataclasses.asdict(built.generation) | {'final_softcap': decoder.final_softcap}


def _decoder(said: Mapping[str, Any], architecture: str, where: str) -> config.Decoder:
    absent = [f'{architecture}.{key}' for key in _NEEDED if f'{architecture}.{key}' not in said]
    if absent:
        raise UserError(f'{where} does not say {", ".join(absent)}')
    family = _FAMILIES[architecture]
    text = {
        name: _decimal(said[f'{architecture}.{key}']) for key, name in _KEYS.items() if f'{architecture}.{key}' in said
    }
    if (kind := said.get(f'{architecture}.rope.scaling.type', 'none')) != 'none':
        text['rope_scaling'] = {'rope_type': kind, 'factor': said.get(f'{architecture}.rope.scaling.factor', 1.0)}
    try:
        by_width = any(
            generation(name).scale_by_width and gemma.decode_variant(name)['depth'] == text['num_hidden_layers']
            for name in pretrained.variants(family)
        )
        scalar = text['hidden_size'] / text['num_attention_heads'] if by_width else text['head_dim']
        return hugging_face_decoder.read(text | {'query_pre_attn_scalar': scalar}, family, where)
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f'{where}: damaged ({type(error).__name__}: {error})') from None


def _decimal(value: Any) -> Any:
    """A float32 as the decimal that was meant: 9.99999997e-07 → 1e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _table(family: str, heads: int, kv_heads: int) -> list[rows.Row]:
    """Hugging Face's table of the family under their names."""
    layer = _LAYER | ({'post_attention_layernorm': 'ffn_norm'} if family == 'gemma' else {})
    names = _ENDS | {f'model.layers.{{i}}.{name}': f'blk.{{i}}.{theirs}' for name, theirs in layer.items()}
    return [
        dataclasses.replace(row, theirs=f'{names[row.theirs.removesuffix(".weight")]}.weight')
        for row in families.gemma(family, heads, kv_heads)
    ]


def _norms(weights: LazyWeights, plus: int) -> LazyWeights:
    """The same weights, of norms as float32 plus `plus`."""

    def read(name: str) -> np.ndarray:
        x = weights.read(name)
        return x.astype(np.float32) + np.float32(plus) if name.endswith('norm.weight') else x

    return dataclasses.replace(weights, read=read)
