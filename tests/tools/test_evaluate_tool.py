"""`tools.evaluate`: the same scores from every format of the same weights, and what two runs answered otherwise."""

import json
import pathlib

import pytest

from big_vlm import bundle
from big_vlm.config import UserError, load_config, validate
from big_vlm.evaluators import generation
from big_vlm.training import evaluation
from tools import evaluate

GOLDEN = pathlib.Path(__file__).parents[1] / 'goldens' / 'paligemma'
CONFIG = """
SCENES = dict(dataset='digit_scenes/cells_tiny')
LOOKS = 'decode | resize(14)'


def get_config(arg=''):
    ask = dict(SCENES, kind='generation', pipeline=f'{LOOKS} | question | tokenize', examples=6, max_new_tokens=4)
    say = dict(ask, pipeline=LOOKS + ' | prefix("caption en") | suffix("{caption}") | tokenize', metrics=('cider',))
    train = dict(
        task='generative',
        total=dict(steps=1),
        batch_size=8,
        data=dict(data_dir=arg, sources=dict(a=dict(SCENES, pipeline=f'{LOOKS} | question | tokenize'))),
        evals=dict(ask=ask, say=say),
    )
    return dict(stages=('multimodal',), multimodal=train)
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory, tiny_digit_scenes):
    file = tmp_path_factory.mktemp('config') / 'evals.py'
    file.write_text(CONFIG)
    return f'{file}:{tiny_digit_scenes}'


@pytest.fixture(scope='module')
def scored(tmp_path_factory, config):
    """The folder of scores of a Hugging Face folder."""
    out = tmp_path_factory.mktemp('scored') / 'hugging_face'
    assert evaluate.main([str(GOLDEN), f'--config={config}', f'--out={out}']) == 0
    return out


def test_the_examples_of_its_help(monkeypatch):
    monkeypatch.chdir(GOLDEN.parents[2])
    lines = [line for line in evaluate.EXAMPLES.replace('\\\n', '').splitlines() if 'tools.evaluate' in line]
    files = [line for line in lines if '--config=configs/' in line]
    assert len(files) >= 2
    for line in files:
        args = evaluate.parser().parse_args(line.split('tools.evaluate')[1].split())
        stages = validate(load_config(args.config))
        name = evaluate._stage(args.stage, stages, 'generative')
        assert evaluate._evals(args.evals, stages[name].evals, name), line


def test_a_folder_of_transformers(scored):
    assert sorted(path.name for path in scored.iterdir()) == [
        'evals.json',
        'predictions_ask.jsonl',
        'predictions_say.jsonl',
    ]
    scores = json.loads((scored / 'evals.json').read_text())
    assert scores['say']['cider']['n'] == scores['ask']['exact_match']['n'] == 6
    assert len(generation.read_predictions(scored / 'predictions_say.jsonl')) == 6


def test_a_bundle_answers_the_same(scored, config, tmp_path, capsys):
    bundle.convert(GOLDEN, tmp_path / 'bundle')
    assert evaluate.main([str(tmp_path / 'bundle'), f'--config={config}', '--evals=say', f'--against={scored}']) == 0
    said = capsys.readouterr().out
    assert '0 answers differ\n' in said and 'cider  +0.0000 [+0.0000, +0.0000]  (better 0, worse 0, n=6)' in said
    tokenizer = f'--tokenizer={GOLDEN / "tokenizer.model"}'
    assert evaluate.main([str(tmp_path / 'bundle'), f'--config={config}', tokenizer]) == 2
    assert 'brings its own' in capsys.readouterr().err


def test_an_evaluation_that_fails_loses_no_other(config, tmp_path, monkeypatch):
    def score(evaluator, name, params):
        if name == 'say':
            raise UserError('too much of it cannot be read')
        return {'exact_match': {'score': 1.0, 'n': 6}}

    monkeypatch.setattr(evaluation.Evaluator, '__call__', score)
    of_before = {name: {'exact_match': {'score': 0.5, 'n': 6}} for name in ('ask', 'say')}
    (tmp_path / 'evals.json').write_text(json.dumps(of_before))
    assert evaluate.main([str(GOLDEN), f'--config={config}', f'--out={tmp_path}']) == 2
    now = of_before | {'ask': {'exact_match': {'score': 1.0, 'n': 6}}}
    assert json.loads((tmp_path / 'evals.json').read_text()) == now


@pytest.mark.slow
def test_an_npz(tiny_digit_scenes, tmp_path):
    """It does not say its image size, which is then that of its whole patches."""
    bundle.convert(GOLDEN, tmp_path / 'weights.npz', to='npz')
    (tmp_path / 'evals.py').write_text(CONFIG.replace('resize(14)', 'resize(12)'))
    config = f'--config={tmp_path / "evals.py"}:{tiny_digit_scenes}'
    words = [str(tmp_path / 'weights.npz'), f'--tokenizer={GOLDEN / "tokenizer.model"}', config]
    assert evaluate.main([*words, '--evals=say', f'--out={tmp_path / "scored"}']) == 0
    assert json.loads((tmp_path / 'scored' / 'evals.json').read_text())['say']['cider']['n'] == 6


def test_other_answers_are_shown(scored, config, tmp_path, capsys):
    before = generation.read_predictions(scored / 'predictions_ask.jsonl')
    right = before[0] | {'prediction': 'nonsense', 'score': {'exact_match': -1.0}}
    generation.write_predictions(tmp_path / 'p.jsonl', [right, *before[1:5]])
    words = [str(GOLDEN), f'--config={config}', '--evals=ask', f'--against={tmp_path / "p.jsonl"}']
    assert evaluate.main(words) == 0
    said = capsys.readouterr().out
    assert '(better 1, worse 0, n=5)' in said and '1 answers differ, the first of them:' in said
    assert "was 'nonsense'" in said


@pytest.mark.slow
def test_what_quantised_weights_cost_in_answers(scored, config, tmp_path, capsys):
    """The decoder has so few inputs an output that 4 bits change what it says."""
    words = [str(GOLDEN), f'--config={config}', '--evals=say', '--quantize=int4', f'--out={tmp_path}']
    assert evaluate.main([*words, f'--against={scored}']) == 0
    said = capsys.readouterr().out
    assert 'against  cider' in said and 'n=6)' in said
    before, after = (generation.read_predictions(path / 'predictions_say.jsonl') for path in (scored, tmp_path))
    changed = sum(one['prediction'] != other['prediction'] for one, other in zip(before, after, strict=True))
    assert changed and f'{changed} answers differ, the first of them:' in said


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--quantize=int3'], "unknown quantisation 'int3'"),
        (['--dtype=float16'], "unknown dtype 'float16'"),
        (['--evals=sai'], "unknown evaluation 'sai' (--evals, stage multimodal): did you mean 'say'"),
        (['--stage=multi'], "unknown stage 'multi' (--stage): did you mean 'multimodal'"),
        (['--against=nowhere.jsonl'], 'nowhere.jsonl: cannot be read'),
        ([f'--out={__file__}'], f'{__file__}: File exists'),
        (["--config.multimodal.evals.say.pipeline=decode | resize(28) | prefix('a') | tokenize"], 'image_size is 14'),
        (["--config.multimodal.evals.say.metrics=('cidr',)"], "unknown metric 'cidr' (config.multimodal.evals.say.met"),
        (['--config.multimodal.evals.say.answers=captions'], "needs field 'captions'"),
    ],
)
def test_refused(config, capsys, words, message):
    assert evaluate.main([str(GOLDEN), f'--config={config}', *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count('\n') == 1
