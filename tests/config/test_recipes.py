"""The recipes of published models: valid and sharded at full size, on shapes alone; two steps of each at a laptop's."""

import json
import pathlib

import jax
import micro_run as runs
import numpy as np
import pytest
from PIL import Image

from big_vlm import bundle, config, tasks
from big_vlm.config import UserError
from big_vlm.sharding import mesh as meshes
from big_vlm.sharding import rules
from big_vlm.training import schedules, stages
from big_vlm.training import step as steps

ROOT = pathlib.Path(__file__).parents[2]
FROM_OTHERS = {
    'lit_coco': 'image=none',
    'paligemma_3b': 'siglip=none,gemma=none',
    'paligemma2_3b': 'siglip=none,gemma=none',
}
CAPTIONS = tuple(f'a wall of shade {i}' for i in range(8))
# Recipe → million parameters: those in docs/models.md, and 1,152 rows more in a dual encoder's text tower.
SIZES = {
    'siglip_b16': 204.1,
    'siglip_so400m': 878.8,
    'siglip2_b16': 376.1,
    'siglip2_b16_naflex': 376.1,
    'clip_b16': 150.2,
    'clip_rn50': 89.9,
    'lit_coco': 202.9,
    'omni_tiny': 1.7,
    'paligemma_3b': 2923.3,
    'paligemma2_3b': 3032.1,
}


def load(name, *args):
    text = ','.join([*args, *filter(None, [FROM_OTHERS.get(name, '')])])
    return config.validate(config.load_config(f'{ROOT}/configs/{name}.py:{text}'))


@pytest.fixture
def photos(tmp_path):
    """captions.jsonl about eight pictures."""
    with open(tmp_path / 'captions.jsonl', 'w') as file:
        for i in range(8):
            Image.new('RGB', (40, 30), (30 * i, 0, 0)).save(tmp_path / f'{i}.png')
            file.write(json.dumps({'image': f'{i}.png', 'caption': CAPTIONS[i]}) + '\n')
    return tmp_path / 'captions.jsonl'


@pytest.mark.parametrize('name', SIZES)
def test_full_size(name, photos, monkeypatch):
    """What `--check` finds, the published number of parameters, and a shard of every large weight on each device."""
    made, init_shapes = [], steps.init_shapes
    monkeypatch.setattr(steps, 'init_shapes', lambda task: made.append(init_shapes(task)) or made[-1])
    checked = load(name, f'data={photos}', 'fsdp=8')
    stages.check(checked)
    assert len(made) == len(checked) and not any(stage.evals for stage in checked.values())
    made = [params for params, _ in made]
    model = tasks.model_weights(made[0])
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) / 1e6 == pytest.approx(SIZES[name], abs=0.06)
    for stage, shapes in zip(checked.values(), made, strict=True):
        mesh = meshes.make_mesh(stage.mesh.data, stage.mesh.fsdp, stage.mesh.model)
        for leaf, sharding in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(rules.param_shardings(shapes, mesh)), strict=True
        ):
            parts = leaf.size // np.prod(sharding.shard_shape(leaf.shape))
            assert parts == 8 or leaf.size < 2**21, (leaf.shape, sharding)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'data'),
    [(name, 'scenes' if name == 'paligemma_3b' else 'file') for name in SIZES],
)
def test_two_steps_on_a_laptop(name, data, photos, tiny_digit_scenes, tmp_path, one_device):
    where = [f'data={photos}'] if data == 'file' else [f'data_dir={tiny_digit_scenes}']
    if name == 'siglip_b16':
        where += [f'retrieval={photos}', f'zero_shot={photos}', 'label=caption', f'classes={"+".join(CAPTIONS)}']
    small = load(name, 'runlocal', *where)
    stages.check(small)
    for stage, path in stages.run(small, tmp_path / 'run').items():
        assert small[stage].total.steps == 2
        assert bundle.load(path).contract.image_size == small[stage].contract.image_size
        if name == 'siglip_b16':
            chances = {which: runs.scores(tmp_path / 'run', stage)[which] for which in ('retrieval', 'zero_shot')}
            assert chances['zero_shot']['accuracy']['chance'] == 1 / 8
            assert chances['retrieval']['image_to_text/R@1']['n'] == 8
        elif data == 'scenes':
            scored = runs.scores(tmp_path / 'run', stage)
            assert scored['answers']['cider']['n'] == scored['perplexity']['perplexity']['n'] == 16
        losses = runs.losses(tmp_path / 'run' / stage / 'metrics.csv')
        assert len(losses) == 2 and np.isfinite([float(loss) for _, loss in losses]).all()


def test_what_is_scored():
    """What the data holds out, unless the arguments say otherwise."""
    pictures = 'decode | resize(256)'
    shared = dict(batch_size=1024, every=10_000)
    [siglip, _] = load('siglip_b16').values()
    held_out = dict(split='val', pipeline=pictures, label='captions/text')
    assert siglip.evals == {'retrieval': config.Eval('retrieval', 'coco_captions', examples=5000, **held_out, **shared)}
    [siglip, _] = load('siglip_b16', 'data=mine.jsonl', 'zero_shot=cifar10').values()
    assert siglip.evals['zero_shot'].classes[3] == 'cat' and siglip.evals['zero_shot'].split == 'test'
    clips = siglip.evals['zero_shot'].templates
    assert len(set(clips)) == 18 and {'a photo of a {}.', 'a low contrast photo of the {}.'} < set(clips)
    [clip, _] = load('siglip_b16', 'zero_shot=b.jsonl', 'label=pet', 'classes=cat+dog', 'templates=clip').values()
    assert len(clip.evals['zero_shot'].templates) == 7 and clip.evals['zero_shot'].templates[0] == 'itap of a {}.'
    [own, _] = load('siglip_b16', 'retrieval=none', 'zero_shot=b.jsonl', 'label=pet', 'classes=a cat+a dog').values()
    of_file = dict(split='train', pipeline=pictures, label='pet', classes=('a cat', 'a dog'))
    assert own.evals == {
        'zero_shot': config.Eval('zero_shot', 'b.jsonl', templates=('a photo of {}',), **of_file, **shared)
    }
    *_, naflex = load('siglip2_b16_naflex').values()
    assert naflex.evals['retrieval'].pipeline == 'decode | naflex(1024, 256)'
    for wrong, message in (
        ('zero_shot=b.jsonl', 'name its classes'),
        ('classes=a+b', 'zero_shot=DATASET'),
        ('zero_shot=cifar10,templates=x', 'only clip'),
    ):
        with pytest.raises(UserError, match=message):
            load('siglip_b16', wrong)


def test_answers_are_scored():
    """By their perplexity and CIDEr, beside all captions of a picture; of a file, as its arguments say."""
    first, *later = load('paligemma_3b').values()
    held_out = dict(dataset='coco_captions', split='val', every=10_000)
    pipeline = 'decode | resize(224) | first(\'captions/text\', "first") | prefix(\'caption en\') | suffix("{first}")'
    held_out['pipeline'] = f'{pipeline} | tokenize'
    answers = dict(metrics=('cider',), answers='captions/text', examples=1000, batch_size=1024)
    assert first.evals == {
        'answers': config.Eval('generation', **held_out, **answers),
        'perplexity': config.Eval('perplexity', **held_out, examples=5000, batch_size=1024),
    }
    assert [set(stage.evals) for stage in later] == [set(first.evals)] * 2
    own = 'answered=b.jsonl', 'prefix={question}', 'text=answer', 'metric=vqa_accuracy'
    [answers, perplexity] = next(iter(load('paligemma2_3b', 'data=a.jsonl', *own).values())).evals.values()
    assert (answers.metrics, answers.split, answers.answers) == (('vqa_accuracy',), 'train', '')
    assert perplexity.pipeline.endswith('prefix(\'{question}\') | suffix("{answer}") | tokenize')
    _, decoder = load('omni_tiny').values()
    assert set(decoder.evals) == {'answers', 'perplexity'}
    with pytest.raises(UserError, match='eval_split=a has no effect: give answered=DATASET'):
        load('paligemma_3b', 'data=a.jsonl', 'eval_split=a')


def test_naflex_goes_on_along_the_curve():
    """The second stage starts at the rate at which the first ends; alone, it starts from a checkpoint."""
    first, second = load('siglip2_b16_naflex').values()
    assert (first.total.examples, second.total.examples) == (36_000_000_000, 15_000_000_000)
    rates = [
        schedules.learning_rate('cosine', made.optimizer.lr, 1000, 0, curve=made.optimizer.curve)
        for made in (first, second)
    ]
    np.testing.assert_allclose(rates[0](1000), rates[1](0), rtol=1e-5)
    lengths = 'naflex(1024, 128, 256, 576, 784, 1024)'
    assert second.data.sources['data'].pipeline.startswith(f'decode | {lengths} | ')
    [alone] = load('siglip2_b16_naflex', 'siglip=a').values()
    [small] = load('siglip2_b16_naflex', 'siglip=a', 'runlocal').values()
    assert small.init_from.path == ''
    assert (alone.init_from.path, alone.contract.max_patches) == ('a', 1024)


def test_siglip2_ends_in_self_distillation():
    """Its last fifth goes on from the first four along one curve; boxes are read of data that has them."""
    first, last = load('siglip2_b16').values()
    assert (first.total.examples, last.total.examples) == (32_000_000_000, 8_000_000_000)
    rates = [
        schedules.learning_rate('cosine', made.optimizer.lr, 1000, 0, curve=made.optimizer.curve)
        for made in (first, last)
    ]
    whole = schedules.learning_rate('cosine', 1e-3, 1_220_703, 20_000)
    np.testing.assert_allclose([rates[0](1000), rates[1](0)], whole(976_562), rtol=1e-4)
    assert first.model.captioner == last.model.captioner == config.Captioner(weight=1.0)
    assert (first.model.distill, last.model.distill.local) == (config.Distillation(), 0.25)
    [source] = last.data.sources.values()
    assert source.pipeline.startswith('decode | views(8, 96) | resize(256) | choice(')
    [source] = load('siglip2_b16', 'data=mine.jsonl', 'boxes')['pretrain'].data.sources.values()
    assert source.pipeline == "decode | resize(256) | text('caption') | ground"


def test_what_is_read():
    """A column of captions, of which one is drawn; a prompt and an answer of the file's own."""
    [siglip, _] = load('siglip_b16').values()
    assert siglip.data.sources['data'] == config.Source(
        dataset='coco_captions', pipeline="decode | resize(256) | choice('captions/text', \"drawn\") | text('drawn')"
    )
    first, *_ = load('paligemma_3b', 'data=tasks.jsonl', 'split=train[:9]', 'prefix={question}', 'text=answer').values()
    assert first.data.sources['data'] == config.Source(
        dataset='tasks.jsonl',
        split='train[:9]',
        pipeline='decode | resize(224) | prefix(\'{question}\') | suffix("{answer}") | tokenize',
    )


def test_paligemma_learns_along_one_curve():
    """After its own warmup the image tower's rate is the decoder's, and stage 2 goes on where stage 1 ends."""
    stage1, *later = load('paligemma_3b').values()
    total = 1_000_000_000 // stage1.batch_size
    image = dict(stage1.optimizer.rules)['img/.*']
    assert (stage1.optimizer.warmup.percent, image.warmup.percent) == (5, 20)
    decoder = schedules.learning_rate('rsqrt', stage1.optimizer.lr, total, total // 20)
    tower = schedules.learning_rate('rsqrt', stage1.optimizer.lr * image.lr, total, total // 5)
    assert tower(total // 10) < 0.5 * decoder(total // 10)
    for step in (total // 5, total // 2, total):
        np.testing.assert_allclose(tower(step), decoder(step), rtol=1e-4)
    for stage in later:
        assert stage.optimizer.schedule == 'constant'
        np.testing.assert_allclose(stage.optimizer.lr, decoder(total), rtol=1e-4)


@pytest.mark.parametrize('name', ['clip_b16', 'clip_rn50'])
def test_clips_images_are_projected_without_a_bias(name):
    [stage] = load(name).values()
    assert not stage.model.image.head_bias and stage.model.image.variant == {'clip_b16': 'B/16'}.get(name, 'R50')


def test_others_weights_are_asked_for():
    with pytest.raises(UserError, match=r"begins from another's weights: give gemma=PATH, or gemma=none"):
        config.load_config(f'{ROOT}/configs/paligemma_3b.py:siglip=none')
    stage1 = next(
        iter(config.validate(config.load_config(f'{ROOT}/configs/paligemma_3b.py:siglip=a,gemma=b')).values())
    )
    assert {key: given.path for key, given in stage1.init_from.given().items()} == {
        'init_from.also[0]': 'a',
        'init_from.also[1]': 'b',
    }
