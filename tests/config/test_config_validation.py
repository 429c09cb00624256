"""Every mistake that the schema can see costs one line that names the key; what is right comes back typed."""

import copy
import json

import ml_collections
import pytest

from big_vlm import config as c

pytestmark = pytest.mark.smoke

STAGE = {
    'task': 'contrastive',
    'total': {'steps': 10},
    'data': {'sources': {'cells': {'pipeline': 'decode | keep("image")'}}},
    'optimizer': {'lr': 1, 'rules': (('img/.*', {'frozen': True}), ('.*', {'decay': 0.5}))},
    'evals': {'test': {'kind': 'generation', 'where': {'num_digits': 1}}},
}


def test_one_stage_is_called_train_and_is_typed():
    (name, stage), *others = c.validate(ml_collections.ConfigDict(STAGE)).items()
    assert (name, others) == ('train', [])
    assert stage.total.steps == 10
    assert type(stage.optimizer.lr) is float
    assert stage.data.sources['cells'] == c.Source(pipeline='decode | keep("image")')
    assert stage.optimizer.rules == (('img/.*', c.ParamRule(frozen=True)), ('.*', c.ParamRule(decay=0.5)))
    assert stage.evals['test'].where == {'num_digits': 1}
    assert stage.batch_size == 64


def test_stages_come_in_their_own_order_not_the_alphabet():
    second = {**STAGE, 'init_from': {'stage': 'zeta', 'parts': {'img': 'img'}}}
    config = ml_collections.ConfigDict({'stages': ('zeta', 'alpha'), 'alpha': second, 'zeta': STAGE})
    assert list(c.validate(config)) == ['zeta', 'alpha']
    config.stages = ('zeta',)
    assert list(c.validate(config)) == ['zeta']


def test_through_json_and_back():
    stages = c.validate({'stages': ['a', 'b'], 'a': STAGE, 'b': STAGE})
    assert c.validate(json.loads(json.dumps(c.to_dict(stages)))) == stages
    assert c.parse_stage(json.loads(json.dumps(c.to_dict(stages['a'])))) == stages['a']


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('batch_sise', 8, "unknown key 'batch_sise' (config): did you mean 'batch_size'?"),
        ('optimizer.lrr', 8, "unknown key 'lrr' (config.optimizer): did you mean 'lr'?"),
        ('data.sources.cells.wieght', 1.0, "unknown key 'wieght' (config.data.sources.cells): did you mean 'weight'?"),
        ('batch_size', '8', "config.batch_size: must be int, got '8'"),
        ('batch_size', 8.0, 'config.batch_size: must be int, got 8.0'),
        ('batch_size', True, 'config.batch_size: must be int, got True'),
        ('batch_size', 0, 'config.batch_size: must be at least 1, got 0'),
        ('optimizer.lr', float('nan'), 'config.optimizer.lr: must be finite, got nan'),
        ('optimizer.lr', float('inf'), 'config.optimizer.lr: must be finite, got inf'),
        ('optimizer.lr', -1.0, 'config.optimizer.lr: must be at least 0.0, got -1.0'),
        ('optimizer.b2', 1.0, 'config.optimizer.b2: must be below 1, got 1.0'),
        ('optimizer.schedule', 'cosin', "did you mean 'cosine'?"),
        ('optimizer.curve', (0.9, 0.1), 'config.optimizer.curve: must rise between 0 and 1, got (0.9, 0.1)'),
        ('optimizer', {'schedule': 'rsqrt', 'curve': (0, 0.9)}, "curve: schedule='rsqrt' has no end to be part of"),
        ('optimizer', 3, 'config.optimizer: must be a section, got 3'),
        ('optimizer.rules', (('(', {}),), "config.optimizer.rules: '(' is no regular expression"),
        ('optimizer.warmup', {'steps': 3, 'percent': 0.1}, 'config.optimizer.warmup: steps and percent are both given'),
        ('total', {'steps': 3, 'epochs': 1}, 'config.total: steps and epochs are both given'),
        ('total', {}, 'config.total: say how long'),
        ('total', {'percent': 5.0}, 'config.total.percent: a percentage of what?'),
        ('contract.value_range', (1.0, -1.0), 'config.contract.value_range: must rise'),
        ('contract.image_alone', True, 'config.contract.image_alone: a contrastive stage has no prompts; leave it out'),
        ('contract.value_range', (1.0,), 'config.contract.value_range: must have 2 entries'),
        ('data.sources', {}, 'config.data.sources is empty'),
        ('data.sources.cells.weight', 0.0, 'config.data.sources: every weight is 0'),
        ('evals.test.kind', 'generatoin', "did you mean 'generation'?"),
        ('evals.test', {'kind': 'zero_shot'}, 'config.evals.test: zero_shot needs classes'),
        ('evals.test', {}, 'config.evals.test.kind is missing'),
        ('profile', (3, 2), 'config.profile: must be the first and the last step, from 1 on, got (3, 2)'),
        ('checkpoint.keep_every', 750, 'config.checkpoint.keep_every: 750 is no multiple of every=500'),
        ('checkpoint.best', 'tset/accuracy', "'tset' (config.checkpoint.best): did you mean 'test'?"),
        ('checkpoint.best', 'test', "config.checkpoint.best: 'test' names no metric: write test/METRIC"),
        ('checkpoint.best', 'test/accuracy', 'config.checkpoint.best: evals.test.every is 0, so only the end has'),
        ('task', 'contrast', "did you mean 'contrastive'?"),
        ('model.token_chunk', 8, 'config.model.token_chunk: a contrastive stage makes no use of it; leave it out'),
        ('model.decoder.width', 8, "config.model.decoder: a text tower of kind 'transformer' has none; leave it out"),
        ('model.text.dropout', 1.0, 'config.model.text.dropout: must be below 1, got 1.0'),
        ('init_from', {'stage': 'a', 'path': 'b'}, 'config.init_from: stage and path are both given'),
        ('init_from.also', ({'pth': 'b'},), "unknown key 'pth' (config.init_from.also[0]): did you mean 'path'?"),
    ],
)
def test_a_mistake_costs_one_line_that_names_the_key(key, value, message):
    config = copy.deepcopy(STAGE)
    *path, last = key.split('.')
    node = config
    for name in path:
        node = node.setdefault(name, {})
    node[last] = value
    with pytest.raises(c.UserError) as error:
        c.validate(config)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('option', [dict(ema_warmup=True), dict(ema_use='last')])
def test_an_average_that_nobody_keeps(option):
    with pytest.raises(c.UserError, match=r'config\.optimizer\.ema_\w+: without ema_decay there is no average'):
        c.validate({**STAGE, 'optimizer': option})


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        ({'loss': 'softmax'}, 'model.loss: a generative stage makes no use of it; leave it out'),
        ({'text': {'variant': 'S'}}, 'model.text: a generative stage makes no use of it'),
        ({'projector': 'none', 'image': {'variant': 'S/16'}}, "model.image: with projector 'none' there is no image"),
    ],
)
def test_what_a_decoder_makes_no_use_of(model, message):
    stage = {**STAGE, 'task': 'generative', 'model': model}
    with pytest.raises(c.UserError) as error:
        c.validate(stage)
    assert message in str(error.value)
    assert c.parse_stage(stage, trained=False).model != c.Model()  # one of an earlier version still loads


def test_a_codebook_follows_whole_batches():
    masks = {**STAGE, 'task': 'mask_autoencoder', 'accumulate': 2}
    with pytest.raises(c.UserError, match=r'config\.accumulate=2: the codebook .* use accumulate=1$'):
        c.validate(masks)
    assert c.parse_stage(masks, trained=False).accumulate == 2  # a bundle of an earlier version still loads


def test_averages_that_a_stage_goes_on_with_are_not_forgotten():
    goes_on = {**STAGE, 'init_from': {'stage': 'a', 'state': True}, 'optimizer': dict(ema_decay=0.9, ema_warmup=True)}
    with pytest.raises(c.UserError, match=r'config\.b\.optimizer\.ema_warmup: it would forget the averages'):
        c.validate({'stages': ('a', 'b'), 'a': STAGE, 'b': goes_on})


def test_adapters_hold_no_running_statistics():
    with pytest.raises(c.UserError, match=r'config\.lora: adapters would not hold the running statistics'):
        c.validate({**STAGE, 'model': dict(image=dict(norm='batch')), 'lora': dict(rules=(('txt/.*', {}),))})


def test_lora_without_rules():
    with pytest.raises(c.UserError, match=r'config\.lora: without rules there are no adapters'):
        c.validate({**STAGE, 'lora': dict(base_dtype='int8')})
    with pytest.raises(c.UserError, match=r"config\.lora\.rules: 'img\(' is no regular expression"):
        c.validate({**STAGE, 'lora': dict(rules=(('img(', {}),))})


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'stages': ('one', 'tow'), 'one': STAGE, 'two': STAGE}, "unknown stage 'tow' (config.stages): did you mean"),
        ({'stages': ('a', 'a'), 'a': STAGE}, 'name every stage once'),
        ({'stages': (), 'a': STAGE}, 'name every stage once'),
        ({'stages': ('a/b',), 'a/b': STAGE}, 'is no name for a folder'),
        ({'stages': ('a',), 'a': STAGE, 'sead': 3}, "unknown key 'sead' (config)"),
        ({'stages': ('a',), 'a': STAGE, 'b': {**STAGE, 'taks': 1}}, "unknown key 'taks' (config.b)"),
        (
            {'stages': ('a', 'b'), 'a': {**STAGE, 'init_from': {'stage': 'b'}}, 'b': STAGE},
            "unknown earlier stage 'b' (config.a.init_from.stage)",
        ),
        (
            {'stages': ('a', 'b'), 'a': {**STAGE, 'init_from': {'path': 'x', 'also': ({'stage': 'b'},)}}, 'b': STAGE},
            "unknown earlier stage 'b' (config.a.init_from.also[0].stage)",
        ),
        (3, 'get_config must return a ConfigDict, not int'),
    ],
)
def test_stages_are_checked(config, message):
    with pytest.raises(c.UserError) as error:
        c.validate(config)
    assert message in str(error.value)


def test_unknown_lists_valid_names_if_nothing_is_near():
    message = str(c.unknown('op', 'zzz', ['decode', 'resize'], 'config.x'))
    assert message == "unknown op 'zzz' (config.x): valid: decode, resize"
