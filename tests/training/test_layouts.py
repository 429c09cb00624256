"""One device or eight, split by data, fsdp or model: the same stage, run as the main job runs it, loses the same."""

import functools

import jax
import micro_config
import micro_run as runs
import numpy as np
import pytest

from big_vlm import config
from big_vlm.checkpoints import trees
from big_vlm.sharding import mesh as meshes
from big_vlm.tasks import make
from big_vlm.training import loop, stages, tokenizers
from big_vlm.training import step as steps

STEPS = 20
LAYOUTS = {'data': (8, 1, 1), 'fsdp': (1, 8, 1), 'mixed': (2, 2, 2)}
# Wide enough that weights pass the size below which fsdp leaves them whole.
WIDE = dict(width=64, mlp_dim=512, depth=2, num_heads=4)
# Otherwise than by default, in the mixed layout.
OWN = ((r'img/.*/MlpBlock_0/Dense_0/kernel', ('model', 'fsdp')),)


def stage(kind, data_dir, layout='one'):
    raw = micro_config.get_config(data_dir)[kind.split('-')[0]]
    model = raw['model']
    model['image'] = model['image'] | WIDE
    if 'text' in model:
        model['text'] = model['text'] | WIDE
        model['loss_form'] = kind.split('-')[1]
    else:
        model['decoder'] = model['decoder'] | WIDE | dict(head_dim=16)
        model['image'] |= dict(stem='conv')  # the dual encoder has the other stem
    raw['mesh'] = dict(rules=OWN if layout == 'mixed' else ())
    raw |= dict(total=dict(steps=STEPS), batch_size=16, evals={}, init_from={}, checkpoint=dict(every=100))
    return config.validate(raw)['train']


@pytest.fixture(scope='module')
def losses(tiny_digit_scenes, tmp_path_factory):
    """(kind, layout) → the losses of its steps; each is run once."""
    folder = tmp_path_factory.mktemp('layouts')
    stage_ = functools.partial(stage, data_dir=tiny_digit_scenes)
    both = {kind: stage_(kind) for kind in ('pretrain-dense', 'multimodal')}
    tokenizer = tokenizers.make(folder, both)['multimodal']

    @functools.cache
    def run(kind, layout):
        sizes = (1, 1, 1) if layout == 'one' else LAYOUTS[layout]
        mesh = meshes.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        place = folder / f'{kind}_{layout}'
        stages.run_stage(kind, stage_(kind, layout=layout), place, tokenizer, {}, mesh=mesh)
        steps_, values = zip(*runs.losses(place / 'metrics.csv'), strict=True)
        assert steps_ == tuple(range(1, STEPS + 1))
        return np.array(values, np.float64)

    return run


@pytest.mark.slow
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kind', ['pretrain-ring', 'multimodal'])
def test_eight_devices_lose_what_one_does(losses, kind, layout):
    one = losses(kind.replace('ring', 'dense'), 'one')
    assert one[-3:].mean() < 0.9 * one[:3].mean(), 'it should learn, or the comparison says little'
    np.testing.assert_allclose(losses(kind, layout), one, rtol=1e-4)


@pytest.mark.parametrize('kind', ['pretrain-dense', 'multimodal'])
def test_these_layouts_really_split_weights(kind, tmp_path):
    """Otherwise the losses above would agree for the wrong reason."""
    for layout, axes in (('fsdp', {'fsdp'}), ('mixed', {'fsdp', 'model'})):
        made, mesh = stage(kind, str(tmp_path), layout), meshes.make_mesh(*LAYOUTS[layout])
        task = make(made, stages.draft_contract(made, 1536), mesh)
        shapes = steps.param_shapes(task)
        tx, info = loop.make_optimizer(made, shapes, None)
        placed = trees.flat(steps.abstract_state(task, tx, mesh, **loop.state_options(made, info)).params)
        shardings = [leaf.sharding for leaf in placed.values()]
        own = placed['img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel'].sharding.spec
        assert tuple(own) == (None, *(('model', 'fsdp') if layout == 'mixed' else ('fsdp', 'model')))
        used = {axis for sharding in shardings for axis in sharding.spec if axis and mesh.shape[axis] > 1}
        assert used == axes
        sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
        split = sum(n for n, s in zip(sizes, shardings, strict=True) if 'fsdp' in s.spec)
        assert split > sum(sizes) / 3
