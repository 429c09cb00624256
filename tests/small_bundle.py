"""A decoder and two towers so small that drawing their weights is quicker than compiling their init."""

import jax
import numpy as np

from big_vlm import bundle, config, tasks
from big_vlm.data.contract import Contract
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.sharding import mesh as meshes

SIZE, TEXT = 8, 48
SOURCES = {'sources': {'scenes': {'dataset': 'digit_scenes/cells'}}}
SMALL = {'width': 16, 'mlp_dim': 16, 'depth': 1, 'num_heads': 2}
GENERATIVE = {
    'task': 'generative',
    'total': {'steps': 1},
    'data': SOURCES,
    'contract': {'image_size': SIZE, 'text_length': TEXT},
    'model': {
        'image': {'variant': 'mu/4', **SMALL},
        'decoder': {**SMALL, 'num_kv_heads': 1, 'head_dim': 8},
    },
}
CONTRASTIVE = GENERATIVE | {
    'task': 'contrastive',
    'model': {'image': {'variant': 'mu/4', **SMALL}, 'text': {'variant': 'mu', **SMALL}},
}


def train_tokenizer(folder):
    texts = [f'{a} {b} in the {c}' for a in ('red', 'blue') for b in ('three', 'seven', 'one') for c in ('top', 'left')]
    return Tokenizer.train(texts + ['caption en', 'detect three'], 300, str(folder / 'a.model'))


def make(stage, tokenizer):
    """A bundle of random weights (drawn by numpy: the models' own init takes longer to compile than all else here)."""
    stage = config.parse_stage(stage)
    contract = Contract.make(stage.contract, tokenizer, image_tokens=tasks.image_slots(stage))
    mesh = meshes.make_mesh(data=1, devices=jax.devices()[:1])
    task = tasks.make(stage, contract, mesh)
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
    return bundle.Bundle(stage, contract, tokenizer, params, mesh)


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (rng.integers(6, 30), rng.integers(6, 30), 3), np.uint8) for _ in range(n)]
