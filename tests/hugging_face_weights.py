"""Hugging Face's weights as our parameters, for the parity tests.

Small enough to check by eye. The real importer lives in `interop`; this one must not share code with it.
"""

import jax
import numpy as np


def weights(model):
    return {name: p.detach().numpy() for name, p in model.state_dict().items()}


def gradients(model):
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def heads(w, n):
    """[N·H, D] → [D, N, H]."""
    return w.reshape(n, -1, w.shape[1]).transpose(2, 0, 1)


def dense(sd, name):
    return {'kernel': sd[name + '.weight'].T, 'bias': sd[name + '.bias']}


def layer_norm(sd, name):
    return {'scale': sd[name + '.weight'], 'bias': sd[name + '.bias']}


def mlp(sd, name):
    return {'Dense_0': dense(sd, name + '.fc1'), 'Dense_1': dense(sd, name + '.fc2')}


def attention(q, k, v, out, n):
    """Four (weight, bias) pairs; n heads."""
    table = {
        name: {'kernel': heads(w, n), 'bias': b.reshape(n, -1)}
        for name, (w, b) in zip(('query', 'key', 'value'), (q, k, v), strict=True)
    }
    w, b = out
    return table | {'out': {'kernel': w.T.reshape(n, -1, w.shape[0]), 'bias': b}}


def encoder(sd, prefix, final_norm, config):
    """`config` is Hugging Face's of the tower."""

    def block(i):
        at = f'{prefix}.layers.{i}'
        pairs = [(sd[f'{at}.self_attn.{x}_proj.weight'], sd[f'{at}.self_attn.{x}_proj.bias']) for x in 'qkv']
        out = sd[f'{at}.self_attn.out_proj.weight'], sd[f'{at}.self_attn.out_proj.bias']
        return {
            'LayerNorm_0': layer_norm(sd, f'{at}.layer_norm1'),
            'LayerNorm_1': layer_norm(sd, f'{at}.layer_norm2'),
            'MultiHeadDotProductAttention_0': attention(*pairs, out, config.num_attention_heads),
            'MlpBlock_0': mlp(sd, f'{at}.mlp'),
        }

    blocks = jax.tree.map(lambda *x: np.stack(x), *(block(i) for i in range(config.num_hidden_layers)))
    return {'encoderblock': blocks, 'encoder_norm': layer_norm(sd, final_norm)}


def image_tower(sd, prefix, config):
    return {
        'embedding': {
            'kernel': sd[f'{prefix}.embeddings.patch_embedding.weight'].transpose(2, 3, 1, 0),
            'bias': sd[f'{prefix}.embeddings.patch_embedding.bias'],
        },
        'pos_embedding': sd[f'{prefix}.embeddings.position_embedding.weight'][None],
        'Transformer': encoder(sd, f'{prefix}.encoder', f'{prefix}.post_layernorm', config),
    }


def image_tower_of_patches(sd, prefix, config):
    """NaFlex's: patches through a linear layer, a square of positions."""
    side = round(config.num_patches**0.5)
    return {
        'embedding': dense(sd, f'{prefix}.embeddings.patch_embedding'),
        'pos_embedding': sd[f'{prefix}.embeddings.position_embedding.weight'].reshape(side, side, -1),
        'Transformer': encoder(sd, f'{prefix}.encoder', f'{prefix}.post_layernorm', config),
    }


def map_head(sd, prefix, config):
    d = config.hidden_size
    w, b = (sd[f'{prefix}.attention.in_proj_{x}'].reshape(3, d, *rest) for x, rest in (('weight', (d,)), ('bias', ())))
    out = sd[f'{prefix}.attention.out_proj.weight'], sd[f'{prefix}.attention.out_proj.bias']
    return {
        'probe': sd[f'{prefix}.probe'],
        'MultiHeadDotProductAttention_0': attention(*zip(w, b, strict=True), out, config.num_attention_heads),
        'LayerNorm_0': layer_norm(sd, f'{prefix}.layernorm'),
        'MlpBlock_0': mlp(sd, f'{prefix}.mlp'),
    }


def decoder(sd, prefix, config):
    """`config` is Hugging Face's of a Gemma, 1 to 3."""
    n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    # Gemma 1 calls the norm before its MLP what later ones call the norm after their attention.
    norms = {'pre_attention_norm': 'input_layernorm', 'pre_ffw_norm': 'post_attention_layernorm'}
    if config.model_type != 'gemma':
        norms |= {'post_attention_norm': 'post_attention_layernorm', 'pre_ffw_norm': 'pre_feedforward_layernorm'}
        norms |= {'post_ffw_norm': 'post_feedforward_layernorm'}
    head_norms = {'_query_norm': 'q_norm', '_key_norm': 'k_norm'} if config.model_type == 'gemma3_text' else {}

    def layer(i):
        at = f'{prefix}.layers.{i}'
        q, k_, v = (sd[f'{at}.self_attn.{x}_proj.weight'] for x in 'qkv')
        q, k_, v = (heads(w, m).transpose(1, 0, 2) for w, m in ((q, n), (k_, k), (v, k)))
        einsums = {'q_einsum': {'w': q}, 'kv_einsum': {'w': np.stack([k_, v])}}
        out = sd[f'{at}.self_attn.o_proj.weight'].reshape(-1, n, h).transpose(1, 2, 0)
        return {
            'attn': (einsums if k != n else {'qkv_einsum': {'w': np.stack([q, k_, v])}})
            | {'attn_vec_einsum': {'w': out}}
            | {ours: {'scale': sd[f'{at}.self_attn.{theirs}.weight']} for ours, theirs in head_norms.items()},
            'mlp': {
                'gating_einsum': np.stack([sd[f'{at}.mlp.gate_proj.weight'].T, sd[f'{at}.mlp.up_proj.weight'].T]),
                'linear': sd[f'{at}.mlp.down_proj.weight'].T,
            },
            **{ours: {'scale': sd[f'{at}.{theirs}.weight']} for ours, theirs in norms.items()},
        }

    return {
        'embedder': {'input_embedding': sd[f'{prefix}.embed_tokens.weight']},
        'layers': jax.tree.map(lambda *x: np.stack(x), *(layer(i) for i in range(config.num_hidden_layers))),
        'final_norm': {'scale': sd[f'{prefix}.norm.weight']},
    }
