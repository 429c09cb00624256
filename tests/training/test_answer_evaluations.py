"""Evaluations of answers on a trained bundle against the bundle itself: choices, grammar, calibration, perplexity."""

import json
import os
import signal

import micro_config
import numpy as np
import pytest
from PIL import Image

from big_vlm import bundle, config
from big_vlm.config import UserError
from big_vlm.data import coordinates, transforms
from big_vlm.evaluators import calibration as confidence
from big_vlm.metrics import calibration
from big_vlm.reports import report, sections
from big_vlm.training import evaluation, evaluation_settings, signals

LOOKS = 'decode | resize(32)'
COLOR = dict(
    micro_config.SCENES, pipeline=f'{LOOKS} | question("color") | tokenize', examples=12, where=dict(num_digits=1)
)
SUFFIX = f'{LOOKS} | {micro_config.CAPTION} | tokenize'
EVALS = dict(
    chosen=dict(COLOR, kind='generation', choices=micro_config.COLORS, max_new_tokens=8),
    boxes=dict(COLOR, kind='generation', grammar='boxes', choices=('three', 'red one'), max_new_tokens=16),
    free=dict(COLOR, kind='calibration', split='train', fit_split='validation', max_new_tokens=4),
    calibrated=dict(COLOR, kind='calibration', split='train', fit_split='validation', choices=micro_config.COLORS),
    captions=dict(micro_config.SCENES, kind='perplexity', pipeline=SUFFIX, examples=11, slices=('held_out',)),
)


def stage(data_dir, evals):
    return config.parse_stage(micro_config.multimodal(data_dir) | {'evals': evals})


@pytest.fixture(scope='module')
def model(micro_run):
    return bundle.load(micro_run / 'multimodal' / 'bundle')


@pytest.fixture(scope='module')
def evaluate(model, tiny_digit_scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp('evaluations')
    made = stage(tiny_digit_scenes, EVALS)
    evaluation_settings.check(made, 'config')
    evaluator = evaluation.Evaluator(made, model.task, model.contract, model.tokenizer, model.mesh, folder)
    evaluator.rehearse('config')
    return evaluator, lambda name: evaluator(name, model.params)


def examples(evaluate, name, **changes):
    evaluator, _ = evaluate
    settings = evaluation.dataclasses.replace(evaluator.stage.evals[name], **changes)
    for batch, records in evaluator.batches(settings):
        for i, record in enumerate(records):
            yield batch['image'][i, 0], record


def predictions(evaluate, name):
    evaluator, run = evaluate
    scores = run(name)
    lines = (evaluator.predictions / f'predictions_{name}.jsonl').read_text().splitlines()
    return scores, [json.loads(line)['prediction'] for line in lines]


def test_answers_out_of_a_set(evaluate, model):
    scores, said = predictions(evaluate, 'chosen')
    images, records = zip(*examples(evaluate, 'chosen'), strict=True)
    ask = model.generate(list(images), [r['prefix'] for r in records], choices=micro_config.COLORS, max_new_tokens=8)
    assert said == [answer.text for answer in ask] and set(said) <= set(micro_config.COLORS)
    assert scores['exact_match']['n'] == 12


def test_an_example_that_fails_is_in_no_score(evaluate, monkeypatch):
    """Of either split; the answers to the others are what they were."""
    _, before = predictions(evaluate, 'chosen')
    bad = [record['id'] for _, record in examples(evaluate, 'chosen')][2]
    make = transforms.Pipeline.__call__

    def failing(pipeline, record, context):
        if record['id'] == bad:
            raise ValueError('cut short')
        return make(pipeline, record, context)

    monkeypatch.setattr(transforms.Pipeline, '__call__', failing)
    scores, said = predictions(evaluate, 'chosen')
    assert said == before[:2] + before[3:]
    confident, captions = (evaluate[1](name) for name in ('calibrated', 'captions'))
    found = (scores['exact_match'], confident['accuracy'], captions['perplexity'])
    assert [(entry['n'], entry['unreadable']) for entry in found] == [(11, 1), (12, 1), (10, 1)]
    assert all('unreadable' not in entry for name, entry in captions.items() if '=' in name)


@pytest.mark.slow
def test_answers_out_of_each_examples_own_set(evaluate, model, tmp_path):
    sets = [['red'], ['blue', 'green'], ['three', 'red', 'one']]
    lines = []
    for i, (allowed, (image, _)) in enumerate(zip(sets, examples(evaluate, 'chosen'), strict=False)):
        Image.fromarray(image).save(tmp_path / f'{i}.png')
        lines.append(json.dumps({'image': f'{i}.png', 'options': allowed, 'answer': allowed[-1]}))
    (tmp_path / 'asked.jsonl').write_text('\n'.join(lines))
    pipeline = 'decode | resize(32) | prefix("which digit?") | suffix("{answer}") | tokenize'
    asked = dict(dataset='asked.jsonl', split='train', pipeline=pipeline, choices_field='options', batch_size=2)
    made = stage(str(tmp_path), dict(x=asked | dict(kind='generation', max_new_tokens=8)))
    evaluator = evaluation.Evaluator(made, model.task, model.contract, model.tokenizer, model.mesh, tmp_path)
    evaluator.rehearse('config')
    evaluator('x', model.params)
    said = [json.loads(line)['prediction'] for line in (tmp_path / 'predictions_x.jsonl').read_text().splitlines()]
    images = [tmp_path / f'{i}.png' for i in range(3)]
    assert said == [a.text for a in model.generate(images, 'which digit?', choices=sets, max_new_tokens=8)]
    assert all(text in allowed for text, allowed in zip(said, sets, strict=True))


def test_it_stops_between_batches(evaluate):
    with signals.catch(), pytest.raises(signals.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        evaluate[1]('chosen')


def test_answers_in_a_grammar(evaluate):
    _, said = predictions(evaluate, 'boxes')
    labels = {label for text in said for _, label in coordinates.text_to_boxes(text)}
    assert labels <= {'three', 'red one'}
    assert all(text.startswith('<loc') or not text for text in said)


def test_calibration_over_choices(evaluate, model):
    evaluator, run = evaluate
    scores = run('calibrated')
    logits, labels = {}, {}
    for split in ('validation', 'train'):
        images, records = zip(*examples(evaluate, 'calibrated', split=split), strict=True)
        ranked = model.rank(list(images), [record['prefix'] for record in records], micro_config.COLORS)
        logits[split] = np.array([ranking.scores for ranking in ranked])
        labels[split] = np.array([micro_config.COLORS.index(record['suffix']) for record in records])
    temperature = calibration.fit_temperature(logits['validation'], labels['validation'])
    p, right = (
        calibration.probabilities(logits['train'], temperature),
        logits['train'].argmax(axis=1) == labels['train'],
    )
    written = json.loads((evaluator.predictions / 'calibration_calibrated.json').read_text())
    assert written['temperature'] == pytest.approx(temperature, rel=1e-2)
    assert scores['accuracy']['score'] == pytest.approx(right.mean())
    assert f'{written["temperature"]:.3g}' in sections.calibration([report.Calibration('x', **written)])
    error = calibration.expected_calibration_error(p.max(axis=1), right)
    assert scores['ece_after']['score'] == pytest.approx(error, abs=1e-2)


def test_calibration_of_free_answers(evaluate, model):
    _, run = evaluate
    scores = run('free')
    images, records = zip(*examples(evaluate, 'free'), strict=True)
    said = model.generate(list(images), [record['prefix'] for record in records], max_new_tokens=4)
    right = [answer.text == record['suffix'] for answer, record in zip(said, records, strict=True)]
    found = [confidence.of_answer(a.log_prob, r) for a, r in zip(said, right, strict=True)]
    p = calibration.probabilities(np.array([one.logits for one in found]))[:, 0]
    assert scores['accuracy']['score'] == pytest.approx(np.mean(right))
    assert scores['ece_before']['score'] == pytest.approx(calibration.expected_calibration_error(p, right), abs=1e-3)


def test_perplexity_is_that_of_scored_answers(evaluate, model):
    _, run = evaluate
    scores = run('captions')
    images, records = zip(*examples(evaluate, 'captions'), strict=True)
    scored = model.score_each(list(images), [r['prefix'] for r in records], [r['suffix'] for r in records])
    nats = [value for answer in scored for value in answer.log_probs]
    assert scores['perplexity']['score'] == pytest.approx(np.exp(-np.mean(nats)), rel=1e-4)
    assert scores['perplexity']['n'] == 11 and any('held_out=' in name for name in scores)
    assert 1 < scores['perplexity']['chance'] < 100


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(kind='calibration'), r"answer\.fit_split: '', but it has to be another split than 'validation'"),
        (dict(kind='calibration', fit_split='validation'), r'answer\.fit_split: .*another split'),
        (dict(kind='calibration', fit_split='train', metrics=('box_iou',)), r'answer\.metrics: .*for generation'),
        (dict(fit_split='train'), r"answer\.fit_split: 'train' has no effect, it is for calibration"),
        (dict(choices=('a',), choices_field='b'), 'answer: choices and choices_field are both given'),
        (dict(grammar='box'), "answer.grammar: .*did you mean 'boxes'|answer.grammar.*boxes"),
        (dict(kind='perplexity', choices=('a',)), r"answer\.choices: \('a',\) has no effect"),
        (dict(kind='calibraton'), "did you mean 'calibration'|calibration"),
    ],
)
def test_refused(changes, message, tmp_path):
    raw = micro_config.multimodal(str(tmp_path))
    raw['evals']['answer'].pop('max_new_tokens')
    raw['evals']['answer'].update(changes)
    with pytest.raises(UserError, match=message) as error:
        evaluation_settings.check(config.parse_stage(raw), 'config')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('changes', 'bad', 'message'),
    [
        (dict(kind='perplexity'), dict(answer=' '), 'the true answer is empty'),
        (dict(kind='generation'), dict(options=['red', '']), "choice '': must be text"),
        (dict(kind='generation'), dict(options=['red', None]), 'options has null among its items'),
        (dict(kind='generation'), dict(options=['red', 'a caption of very many words']), 'raise max_new_tokens from 8'),
        (dict(kind='generation'), dict(options=[]), 'no choices'),
        (dict(kind='generation'), dict(options='red'), 'options is one value and no list'),
        (dict(kind='calibration', fit_split='train[:5]'), dict(answer='green'), "'green' is none of the choices"),
    ],
)
def test_a_record_without_an_answer_to_give_is_left_out(model, tmp_path, caplog, changes, bad, message):
    Image.new('RGB', (32, 32)).save(tmp_path / 'a.png')
    good = {'image': 'a.png', 'answer': 'red', 'options': ['red', 'blue']}
    (tmp_path / 'asked.jsonl').write_text('\n'.join(map(json.dumps, [good] * 9 + [good | bad])))
    pipeline = f'{LOOKS} | prefix("which?") | suffix("{{answer}}") | tokenize'
    asked = dict(dataset='asked.jsonl', split='train', pipeline=pipeline, batch_size=16, max_new_tokens=8)
    choices = {} if changes['kind'] == 'perplexity' else {'choices_field': 'options'}
    made = stage(str(tmp_path), dict(x=asked | choices | changes))
    evaluator = evaluation.Evaluator(made, model.task, model.contract, model.tokenizer, model.mesh)
    [(_, records)] = evaluator.allowed(made.evals['x'])
    assert len(records) == 9 and message in caplog.text


def test_choices_that_do_not_fit_are_found_before_training(model, tiny_digit_scenes):
    for changes, message in (
        (dict(choices=('red', 'a caption of very many words'), max_new_tokens=3), r'config\.evals\.x: choice .*from 3'),
        (dict(choices_field='answers'), r"config\.evals\.x: .*'answers'"),
    ):
        made = stage(tiny_digit_scenes, dict(x=EVALS['chosen'] | {'choices': ()} | changes))
        evaluator = evaluation.Evaluator(made, model.task, model.contract, model.tokenizer, model.mesh)
        with pytest.raises(UserError, match=message):
            evaluator.rehearse('config')
