"""Bundles with one known fault each, for the tests of the parity doctor."""

import json
import shutil

import numpy as np

from big_vlm import bundle
from big_vlm.checkpoints import trees
from big_vlm.checks import states

PROMPT = 'Red'  # a capital, and shorter than any row


def contract(**fields):
    """Other preprocessing in bundle.json."""
    return _described(lambda content: content['contract'].update(fields))


def softcap(content):
    """The other way round: off where it is on."""
    decoder = content['config']['model']['decoder']
    decoder['final_softcap'] = 0.0 if decoder['final_softcap'] else 0.05


def attention_softcap(content):
    """Not applied, where the variant caps at 50."""
    content['config']['model']['decoder']['attn_softcap'] = 0.0


def weights(names, change):
    """`change` of every array whose name contains one of `names`."""

    def plant(source, path):
        stage, settings, tokenizer, _ = bundle.read(source)
        side, _ = states.open_pair(source, source)
        changed = {
            name: change(x).astype(np.float32) if any(part in name for part in names) else x
            for name, x in side.weights.items()
        }
        bundle.save(path, trees.nested(changed), stage, settings, tokenizer)

    return plant


def _described(change):
    def plant(source, path):
        shutil.copytree(source, path)
        content = json.loads((path / 'bundle.json').read_text())
        change(content)
        (path / 'bundle.json').write_text(json.dumps(content))

    return plant


def turned(kernel):
    """[L, D, N, H] with its D x N·H matrices transposed."""
    layers, width, heads, _ = kernel.shape
    return kernel.reshape(layers, width, width).transpose(0, 2, 1).reshape(layers, width, heads, -1)


def misread(kernel):
    """[L, F, D]: its reader filled the F x D of each layer with the numbers of a D x F as they came."""
    return kernel.swapaxes(1, 2).reshape(kernel.shape)


def miswritten(kernel):
    """[L, F, D]: written as they lie, and transposed by its reader as if they had been D x F."""
    layers, rows, columns = kernel.shape
    return kernel.reshape(layers, columns, rows).swapaxes(1, 2)


def plus_one_in_the_last(scale):
    return scale + (np.arange(len(scale)) == len(scale) - 1)[:, None]


ROOT_D = 4.0  # of the goldens' decoders
LLM_NORMS = ('pre_attention_norm', 'pre_ffw_norm', 'post_attention_norm', 'post_ffw_norm', 'final_norm')

# (the golden, how the fault is planted, where the sides then part, the cause to be named)
FAULTS = {
    'resampling': ('siglip', contract(resample='bicubic', antialias=False), 'pixels', 'resampling'),
    'resampling of patches': ('siglip2_naflex', contract(resample='bicubic'), 'pixels', 'resampling'),
    'value range': ('siglip', contract(value_range=[0.0, 1.0]), 'pixels', 'value range'),
    'case': ('siglip', contract(lower=False), 'token ids', 'case'),
    'case of a prompt': ('paligemma2', contract(lower=True), 'token ids', 'case'),
    'padding id': ('siglip', contract(pad_id=0), 'token ids', 'padding id'),
    'end token': ('siglip2', contract(eos=False), 'token ids', 'end token'),
    'causal prompt': ('gemma', contract(causal_prompt=False), 'token ids', 'setting'),
    'separator': ('gemma', contract(separator='\n', separator_ids=[4]), 'token ids', 'setting'),
    'newline': ('paligemma2', contract(separator_ids=[]), 'token ids', 'newline'),
    'features divided': (
        'paligemma2',
        weights(['img/head/'], lambda w: w / ROOT_D),
        'image projected',
        'image features scaled twice',
    ),
    'features multiplied': (
        'paligemma2',
        weights(['img/head/'], lambda w: w * ROOT_D),
        'image projected',
        'image features scaled twice',
    ),
    'softcap': ('paligemma2', _described(softcap), 'logits', 'softcap'),
    'attention softcap': ('paligemma2', _described(attention_softcap), 'decoder layer 0', 'softcap'),
    'norm offset': ('paligemma2', weights(LLM_NORMS, lambda w: w + 1), 'decoder layer 0', 'norm offset'),
    'norm offset the other way': ('paligemma', weights(LLM_NORMS, lambda w: w - 1), 'decoder layer 0', 'norm offset'),
    'norm offset in one layer': (
        'paligemma2',
        weights(['llm/layers/pre_ffw_norm'], plus_one_in_the_last),
        'decoder layer 2',
        'norm offset',
    ),
    'transposed queries': (
        'siglip',
        weights(['txt/Encoder_0/encoderblock/MultiHeadDotProductAttention_0/query/kernel'], turned),
        'text layer 0',
        'transposed projection',
    ),
    'transposed head': (
        'siglip',
        weights(['txt/head/kernel'], lambda w: w.T),
        'text projected',
        'transposed projection',
    ),
    'transposed queries of a tower of patches': (
        'siglip2_naflex',
        weights(['img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel'], turned),
        'image layer 0',
        'transposed projection',
    ),
    'transposed mlp': (
        'siglip',
        weights(['txt/Encoder_0/encoderblock/MlpBlock_0/Dense_0/kernel'], misread),
        'text layer 0',
        'transposed projection',
    ),
    'transposed mlp of a decoder': (
        'paligemma2',
        weights(['llm/layers/mlp/linear'], miswritten),
        'decoder layer 0',
        'transposed projection',
    ),
    'transposed patches': (
        'paligemma2',
        weights(['img/embedding/kernel'], lambda w: w.swapaxes(0, 1)),
        'image patches',
        'transposed projection',
    ),
}
