"""The benchmark of a training step: its own side, and what it says where there is no other."""

import json

import pytest

from tools.bench import train_step

TINY = ['--image=mu/16', '--text=mu', '--batch=4', '--size=32', '--length=8', '--vocabulary=50']


def test_no_checkout_is_one_line(capsys):
    assert train_step.main([*TINY, '--big_vision=/nowhere']) == 2
    assert capsys.readouterr().err.startswith('error: --big_vision=/nowhere: no big_vision/models/proj/image_text/')


def test_a_decoder_has_no_other_side(capsys):
    assert train_step.main([*TINY, '--answers', '--big_vision=/nowhere']) == 2
    assert capsys.readouterr().err == 'error: --answers is of our side alone: leave --big_vision out\n'


@pytest.mark.slow
@pytest.mark.parametrize('more', [[], ['--answers']])
def test_our_side(more, capsys):
    assert train_step.main([*TINY, *more, '--accumulate=2', '--rounds=1']) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == 'skipped: big_vision (--big_vision=CHECKOUT names one)'
    told = json.loads(said[-1])
    assert 0 < told['ours temporary MiB'] < told['ours peak MiB']
    assert told['results'].keys() == {'ours again / ours', 'accumulated / ours'}


@pytest.mark.slow
def test_micro_batches_may_go_without_remat(capsys):
    size = ['--image=Ti/16', '--text=Ti', '--batch=32', '--size=64', '--length=32', '--vocabulary=50', '--rounds=0']
    assert train_step.main([*size, '--accumulate=2', '--accumulated_remat=none']) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told['remat'] == 'full' and told['accumulated remat'] == 'none'
    assert told['accumulated temporary MiB'] > 2 * told['ours temporary MiB'], 'of half as many pairs'
