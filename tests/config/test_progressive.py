"""The stages of a progressive schedule are, put together, the run that was asked for."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from big_vlm.config import validate
from big_vlm.training import schedules
from configs import progressive


def make(size, **optimizer):
    optimizer = dict(lr=1e-3, warmup=dict(percent=5.0)) | optimizer
    data = dict(sources=dict(s=dict(pipeline=f'decode | resize({size})')))
    contract = dict(image_size=size)
    return ConfigDict(
        dict(task='contrastive', total=dict(steps=1000), seed=7, contract=contract, data=data, optimizer=optimizer)
    )


@pytest.mark.parametrize(
    'optimizer',
    [{}, {'schedule': 'linear', 'warmup': {'steps': 100}}, {'warmup': {}}],
    ids=['percent', 'steps', 'none'],
)
def test_one_curve(optimizer):
    stages = progressive.stages(lambda size: make(size, **optimizer), {96: 50, 128: 33.33, 160: 16.67})
    stages = validate(ConfigDict(dict(stages=tuple(stages), **stages)))
    assert list(stages) == ['at_96', 'at_128', 'at_160']
    rates = []
    for stage in stages.values():
        steps, settings = stage.total.steps, stage.optimizer
        warmup = schedules.steps(settings.warmup, batch_size=1, total_steps=steps)
        rate = schedules.learning_rate(settings.schedule, settings.lr, steps, warmup, curve=settings.curve)
        rates.append(np.asarray(rate(np.arange(steps))))
    whole = make(96, **optimizer).optimizer
    warmup = {'percent': 50, 'steps': 100, 'none': 0}[
        'steps' if 'schedule' in optimizer else 'none' if optimizer else 'percent'
    ]
    rate = schedules.learning_rate(whole.get('schedule', 'cosine'), 1e-3, 1000, warmup)
    np.testing.assert_allclose(np.concatenate(rates), np.asarray(rate(np.arange(1000))), atol=1e-6)
    last = stages['at_160']
    assert (last.contract.image_size, last.seed, last.init_from.stage, last.init_from.state) == (160, 9, 'at_128', True)
    assert 'resize(160)' in last.data.sources['s'].pipeline


def rule(**settings):
    return dict(rules=(('img/.*', ConfigDict(settings)), ('.*', {})))


def test_what_later_stages_keep():
    """How positions are resized; rules whose start is none; averages, whose warmup has ended."""

    def at(size):
        average = dict(ema_decay=0.9, ema_warmup=True)
        stage = make(size, **average, **rule(lr=0.1, start=dict(percent=0.0), schedule='constant'))
        return ConfigDict(dict(stage, init_from=dict(path='some.npz', resize_method='bicubic')))

    stages = progressive.stages(at, {96: 50, 128: 50})
    first, second = validate(ConfigDict(dict(stages=tuple(stages), **stages))).values()
    assert (first.init_from.path, second.init_from.stage) == ('some.npz', 'at_96')
    assert first.init_from.resize_method == second.init_from.resize_method == 'bicubic'
    assert (first.optimizer.ema_warmup, second.optimizer.ema_warmup) == (True, False)
    assert first.optimizer.rules == second.optimizer.rules and second.optimizer.ema_decay == 0.9


@pytest.mark.parametrize(
    ('sizes', 'optimizer', 'message'),
    [
        ({96: 50, 128: 40}, {}, '100 together'),
        ({96: 4, 128: 96}, {}, 'a warmup of 5 % does not end within the first stage'),
        ({96: 50, 128: 50}, {'warmup': {'epochs': 1.0}}, 'a warmup in epochs of a run in steps'),
        ({96: 50, 128: 50}, {'schedule': 'rsqrt'}, "schedule='rsqrt'"),
        ({96: 50, 128: 50}, rule(start=dict(percent=10)), "a rule's start would come again in every stage"),
        ({96: 50, 128: 50}, rule(warmup=dict(steps=5)), "a rule's warmup .* leave it out: img/"),
        ({96: 50, 128: 50}, rule(schedule='rsqrt'), "a rule's schedule='rsqrt' would"),
        ({96: 50, 128: 50}, dict(ema_decay=0.99, ema_warmup=True), 'averages of 89 % does not end within the first'),
    ],
)
def test_what_cannot_be_parted_is_refused(sizes, optimizer, message):
    with pytest.raises(ValueError, match=message):
        progressive.stages(lambda size: make(size, **optimizer), sizes)
