"""Evaluations that could not run, or would not do what they say, are refused from the config alone."""

import dataclasses
from types import SimpleNamespace

import micro_config
import pytest
import small_bundle

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.sharding import mesh as meshes
from big_vlm.training import evaluation, evaluation_settings, stages


@pytest.mark.parametrize(
    ('stage', 'name', 'changes', 'message'),
    [
        (
            'multimodal',
            'answer',
            {'label': 'caption'},
            r"answer\.label: 'caption' has no effect.*leave label out.*suffix",
        ),
        ('multimodal', 'answer', {'classes': ('a',)}, r"answer\.classes: \('a',\) has no effect, it is for zero_shot:"),
        (
            'pretrain',
            'color',
            {'max_new_tokens': 5},
            r'color\.max_new_tokens: 5 has no effect, it is for generation and .*:',
        ),
        ('pretrain', 'color', {'shots': 3}, r'color\.shots: 3 has no effect, it is for linear_probe:'),
        (
            'pretrain',
            'color',
            {'kind': 'linear_probe', 'fit_split': 'validation'},
            r'color\.fit_split: .*another split',
        ),
        ('pretrain', 'retrieval', {'templates': ('{}.',)}, r'retrieval\.templates: .* leave templates out'),
        ('pretrain', 'retrieval', {'metrics': ('box_iou',)}, r'retrieval\.metrics: .* leave metrics out'),
        ('pretrain', 'color', {'templates': ('a {} three', 'seven')}, r"color\.templates: 'seven' has no '\{\}'"),
        ('pretrain', 'color', {'templates': ('',)}, r"color\.templates: '' has no '\{\}'"),
        ('pretrain', 'color', {'classes': ('red', 'blue', 'red')}, r"color\.classes: .* 'red' is there twice"),
        (
            'pretrain',
            'color',
            {'pipeline': 'decode | resize(48)'},
            r'color\.pipeline: resize\(48\), but contract\.image_size is 32',
        ),
        ('pretrain', 'retrieval', {'slices': ('held_out',)}, r"retrieval\.slices: \('held_out',\) .*leave slices out"),
    ],
)
def test_refused(stage, name, changes, message, tmp_path):
    raw = getattr(micro_config, stage)(str(tmp_path))
    evaluation_settings.check(config.parse_stage(raw), 'config')
    raw['evals'][name].update(changes)
    with pytest.raises(UserError, match=r'config\.evals\.' + message) as error:
        evaluation_settings.check(config.parse_stage(raw), 'config')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('resize', ['resize(48)', 'resize(antialias=False, size=48)'])
def test_a_source_of_another_size_is_refused(resize, tmp_path):
    raw = micro_config.multimodal(str(tmp_path))
    raw['data']['sources']['ask']['pipeline'] = f'decode | {resize} | question | tokenize'
    raw.pop('init_from')
    message = r'config\.data\.sources\.ask\.pipeline: resize\(48\), but contract\.image_size is 32: make them the same'
    with pytest.raises(UserError, match=message):
        stages.check(config.validate(raw))


@pytest.mark.parametrize('stage', ['pretrain', 'multimodal'])
def test_an_image_smaller_than_a_patch_is_refused(stage, tmp_path):
    raw = getattr(micro_config, stage)(str(tmp_path))
    raw.pop('init_from', None)
    raw['model']['image'] = raw['model']['image'] | {'variant': 'mu/64'}
    with pytest.raises(UserError, match=r'^config: an image of 32x32 .* no patch of 64: raise contract\.image_size'):
        stages.check(config.validate(raw))


def test_a_linear_probe_of_a_stage(tiny_digit_scenes):
    """Colours from an embedding that is the brightest value of each channel."""
    raw = micro_config.pretrain(tiny_digit_scenes)
    raw['evals'] = {
        'color': dict(
            micro_config.SCENES,
            kind='linear_probe',
            pipeline='decode | resize(32) | first("objects/color", "color")',
            where=dict(num_digits=1),
            label='color',
            split='test',
            fit_split='train',
            shots=8,
        )
    }
    stage, mesh = config.parse_stage(raw), meshes.make_mesh()
    evaluation_settings.check(stage, 'config')
    task = SimpleNamespace(predict={'embed_image': lambda params, batch: batch['image'].max((1, 2)) / 255 * params})
    probe = evaluation.Evaluator(stage, task, stages.draft_contract(stage, 400), None, mesh)
    probe.rehearse('config')
    accuracy = probe('color', 1.0)['accuracy']
    assert accuracy['score'] > 0.6 and accuracy['chance'] == pytest.approx(1 / 8) and accuracy['n'] > 20


def test_a_tenth_of_what_is_read_may_fail(tiny_digit_scenes, tmp_path):
    """Retrieval scores a part of its examples and reads all."""
    stage, tokenizer = (
        config.parse_stage(micro_config.pretrain(tiny_digit_scenes)),
        small_bundle.train_tokenizer(tmp_path),
    )
    contract, task = stages.make_contract(stage, tokenizer), SimpleNamespace(predict={})
    evaluator = evaluation.Evaluator(stage, task, contract, tokenizer, meshes.make_mesh())
    few = dataclasses.replace(stage.evals['retrieval'], examples=8)
    for examples, expected in ((None, 8), (0, 32)):
        next(evaluator.batches(few, examples))
        assert evaluator._failures[-1].examples == expected


@pytest.mark.parametrize(
    ('name', 'changes', 'message'),
    [
        ('answer', {'slices': ('objects/color',)}, r'objects/color has several values in one example: .*first\('),
        ('answer', {'metrics': ('exact_match', 'vqa_accuracy')}, r'vqa_accuracy .* 4 people or more, and .* has 1'),
    ],
)
def test_what_cannot_be_scored_is_found_before_training(tiny_digit_scenes, name, changes, message, tmp_path):
    raw = micro_config.multimodal(tiny_digit_scenes)
    raw['evals'] = {name: raw['evals'][name] | changes}
    stage, tokenizer = config.parse_stage(raw), small_bundle.train_tokenizer(tmp_path)
    contract, task = stages.make_contract(stage, tokenizer), SimpleNamespace(predict={})
    evaluator = evaluation.Evaluator(stage, task, contract, tokenizer, meshes.make_mesh())
    with pytest.raises(UserError, match=rf'^config\.evals\.{name}: .*{message}'):
        evaluator.rehearse('config')
