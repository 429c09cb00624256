"""One mapping table per model family of Hugging Face: their names and layouts, ours (big_vision's).

Axes: N heads, K kv heads, H head dim, D width, F mlp width, P patches, Y X rows and columns of them, p q the pixels of
a patch, C colours.
"""

from __future__ import annotations

from collections.abc import Sequence

from big_vlm.interop.rows import Row, below
from big_vlm.models.naflex_vit import POSITIONS


def _linear(theirs: str, ours: str) -> list[Row]:
    return [Row(f'{theirs}.weight', 'F D -> D F', f'{ours}/kernel'), Row(f'{theirs}.bias', '', f'{ours}/bias')]


def _layer_norm(theirs: str, ours: str) -> list[Row]:
    return [Row(f'{theirs}.weight', '', f'{ours}/scale'), Row(f'{theirs}.bias', '', f'{ours}/bias')]


def _attention(inputs: dict[str, str], out: str, ours: str) -> list[Row]:
    """`inputs`: query, key and value → their (weight, bias) as a pattern over the word."""
    table = []
    for name, theirs in inputs.items():
        table.append(Row(theirs.format('weight'), '(N H) D -> D N H', f'{ours}/{name}/kernel'))
        table.append(Row(theirs.format('bias'), '(N H) -> N H', f'{ours}/{name}/bias'))
    table.append(Row(f'{out}.weight', 'D (N H) -> N H D', f'{ours}/out/kernel'))
    return [*table, Row(f'{out}.bias', '', f'{ours}/out/bias')]


_MHA = 'MultiHeadDotProductAttention_0'
_PROJECTIONS = {'query': 'self_attn.q_proj.{}', 'key': 'self_attn.k_proj.{}', 'value': 'self_attn.v_proj.{}'}
_PACKED = {name: f'attention.in_proj_{{}}[{i}/3]' for i, name in enumerate(('query', 'key', 'value'))}

_ENCODER_BLOCK = [
    *_layer_norm('layer_norm1', 'LayerNorm_0'),
    *_attention(_PROJECTIONS, 'self_attn.out_proj', _MHA),
    *_layer_norm('layer_norm2', 'LayerNorm_1'),
    *_linear('mlp.fc1', 'MlpBlock_0/Dense_0'),
    *_linear('mlp.fc2', 'MlpBlock_0/Dense_1'),
]
_MAP_HEAD = [
    Row('probe', '', 'probe'),
    *_attention(_PACKED, 'attention.out_proj', _MHA),
    *_layer_norm('layernorm', 'LayerNorm_0'),
    *_linear('mlp.fc1', 'MlpBlock_0/Dense_0'),
    *_linear('mlp.fc2', 'MlpBlock_0/Dense_1'),
]
_VISION_ENCODER = [
    *below('encoder.layers.{i}.', 'Transformer/encoderblock/', _ENCODER_BLOCK),
    *_layer_norm('post_layernorm', 'Transformer/encoder_norm'),
]
_VISION = [
    Row('embeddings.patch_embedding.weight', 'D C p q -> p q C D', 'embedding/kernel'),
    Row('embeddings.patch_embedding.bias', '', 'embedding/bias'),
    Row('embeddings.position_embedding.weight', 'P D -> 1 P D', 'pos_embedding'),
    *_VISION_ENCODER,
]
# NaFlex: a patch is a row of numbers in the same order on both sides, and its positions are a square.
_NAFLEX_VISION = [
    *_linear('embeddings.patch_embedding', 'embedding'),
    Row('embeddings.position_embedding.weight', '(Y X) D -> Y X D', 'pos_embedding', (('Y', POSITIONS),)),
    *_VISION_ENCODER,
]
_TEXT = [
    Row('embeddings.token_embedding.weight', '', 'Embed_0/embedding'),
    Row('embeddings.position_embedding.weight', 'P D -> 1 P D', 'pos_embedding'),
    *below('encoder.layers.{i}.', 'Encoder_0/encoderblock/', _ENCODER_BLOCK),
    *_layer_norm('final_layer_norm', 'Encoder_0/encoder_norm'),
    *_linear('head', 'head'),
]

# A layer's norms, by decoder family: theirs → ours. Gemma 1 calls the one before its MLP what the later ones call the
# one after their attention.
_NORMS_2 = {
    'input_layernorm': 'pre_attention_norm',
    'post_attention_layernorm': 'post_attention_norm',
    'pre_feedforward_layernorm': 'pre_ffw_norm',
    'post_feedforward_layernorm': 'post_ffw_norm',
}
_NORMS = {
    'gemma': {'input_layernorm': 'pre_attention_norm', 'post_attention_layernorm': 'pre_ffw_norm'},
    'gemma2': _NORMS_2,
    'gemma3_text': _NORMS_2 | {'self_attn.q_norm': 'attn/_query_norm', 'self_attn.k_norm': 'attn/_key_norm'},
}


def siglip(family: str, image_heads: int, text_heads: int) -> list[Row]:
    """'siglip': SigLIP, and SigLIP 2 of fixed resolution, the same model to transformers; 'siglip2': NaFlex alone."""
    return [
        *below('vision_model.', 'img/', _NAFLEX_VISION if family == 'siglip2' else _VISION, N=image_heads),
        *below('vision_model.head.', 'img/MAPHead_0/', _MAP_HEAD, N=image_heads),
        *below('text_model.', 'txt/', _TEXT, N=text_heads),
        Row('logit_scale', '', 't'),
        Row('logit_bias', '', 'b'),
    ]


def decoder(family: str, heads: int, kv_heads: int) -> list[Row]:
    """A Gemma's decoder, 1 to 3. Ours keeps queries, keys and values in one array where every head has its own keys."""
    if heads == kv_heads:
        attention = [
            Row(f'{x}_proj.weight', '(N H) D -> N D H', f'qkv_einsum/w[{i}]') for i, x in enumerate(('q', 'k', 'v'))
        ]
    else:
        attention = [
            Row('q_proj.weight', '(N H) D -> N D H', 'q_einsum/w'),
            Row('k_proj.weight', '(K H) D -> K D H', 'kv_einsum/w[0]'),
            Row('v_proj.weight', '(K H) D -> K D H', 'kv_einsum/w[1]'),
        ]
    layer = [
        *below('self_attn.', 'attn/', [*attention, Row('o_proj.weight', 'D (N H) -> N H D', 'attn_vec_einsum/w')]),
        Row('mlp.gate_proj.weight', 'F D -> D F', 'mlp/gating_einsum[0]'),
        Row('mlp.up_proj.weight', 'F D -> D F', 'mlp/gating_einsum[1]'),
        Row('mlp.down_proj.weight', 'D F -> F D', 'mlp/linear'),
        *(Row(f'{theirs}.weight', '', f'{ours}/scale') for theirs, ours in _NORMS[family].items()),
    ]
    return [
        Row('embed_tokens.weight', '', 'embedder/input_embedding'),
        *below('layers.{i}.', 'layers/', layer, N=heads, K=kv_heads),
        Row('norm.weight', '', 'final_norm/scale'),
    ]


def gemma(family: str, heads: int, kv_heads: int) -> list[Row]:
    """A decoder alone; ours under 'llm', as in a PaliGemma."""
    return below('model.', 'llm/', decoder(family, heads, kv_heads))


def paligemma(image_heads: int, decoder_rows: Sequence[Row]) -> list[Row]:
    """An image tower, its projection and `decoder_rows`."""
    return [
        *below('vision_tower.vision_model.', 'img/', _VISION, N=image_heads),
        *below('', 'img/', _linear('multi_modal_projector.linear', 'head')),
        *below('language_model.model.', 'llm/', decoder_rows),
    ]
