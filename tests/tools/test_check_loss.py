"""The command line: what it teaches, what it prints, and its exit codes."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from big_vlm.checks import loss_forms
from big_vlm.ops import contrastive
from tools import check_loss

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_simulated_devices():
    """In a process of its own: how many devices there are is settled before jax starts."""
    command = [sys.executable, '-m', 'tools.check_loss', '--devices=2', '--batch=12', '--width=8', '--accumulate=3']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith('12 pairs of width 8 on 2 cpu devices')
    assert [line.split()[:3] for line in lines[2:5]] == [
        ['sigmoid', 'new', form] for form in ('dense', 'tiled', 'ring')
    ]
    assert lines[-1] == 'all agree within 1e-05'


def test_help_teaches_and_imports_nothing_heavy():
    code = (
        'import sys, tools.check_loss as tool\n'
        'try: tool.main(["--help"])\n'
        'except SystemExit as stop: assert stop.code == 0\n'
        'assert not {"jax", "numpy"} & set(sys.modules)'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'python -m tools.check_loss --devices=8' in result.stdout and 'relative error' in result.stdout


@pytest.mark.parametrize(
    ('wrong', 'advice'),
    [
        (['ring'], "set model.loss_form='dense' for now"),
        (['ring', 'accumulated'], "set model.loss_form='dense' and accumulate=1 for now"),
        (['dense', 'accumulated'], "set model.loss_form='ring' and accumulate=1 for now"),
        (['dense', 'ring'], 'no form is right on these devices: train on others'),
    ],
)
def test_disagreement_is_exit_code_one(wrong, advice, monkeypatch, capsys):
    """Only what agreed is advised."""
    rows = [
        loss_forms.Row('sigmoid', 'new', form, {'value': 1e-7, 't': float('nan') if form in wrong else 1e-7})
        for form in ('dense', 'tiled', 'ring', 'accumulated')
    ]
    right = loss_forms.Row('softmax', 'new', 'dense', {'value': 1e-7})
    monkeypatch.setattr(loss_forms, 'compare', lambda *arguments: iter([*rows, right]))
    assert check_loss.main([]) == 1
    named = ', '.join(f'sigmoid {form} t' for form in wrong)
    assert capsys.readouterr().out.endswith(f'WRONG, beyond 1e-05: {named}\nsigmoid: {advice}\n')


def test_bad_input_is_one_line(capsys):
    assert check_loss.main(['--batch=13']) == 2
    assert check_loss.main(['--devices=0']) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith('error: batch=13 does not divide over 8 devices')
    assert errors[1] == 'error: --devices=0: must be at least 1'


@pytest.mark.parametrize(
    ('change', 'line'),
    [
        (dict(ztxt=[[0.0, np.nan], [0.0, 1.0]]), 'ztxt: row 0 has values that are not finite, as 1 of 2 have'),
        (
            dict(zimg=[[0.0, 1.0], [0.0, 3.0]]),
            'zimg: row 1 has length 3, and 1 of 2 have not length 1: divide every row',
        ),
        (dict(ztxt=np.eye(3)[:2]), 'image embeddings have width 2, text embeddings 3'),
        (dict(ztxt=np.eye(2)[:1]), 'the same batch'),
        (dict(zimg=None), 'cannot be read as an .npz of zimg and ztxt'),
        ({}, 'batch=2: must be at least 8'),
    ],
)
def test_embeddings_of_ones_own(change, line, tmp_path, capsys):
    arrays = dict(zimg=np.eye(2), ztxt=np.eye(2)) | change
    np.savez(tmp_path / 'mine.npz', **{name: array for name, array in arrays.items() if array is not None})
    assert check_loss.main([f'--embeddings={tmp_path}/mine.npz']) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and line in error and error.count('\n') == 1


def save_pairs(path, kind):
    """Sixteen pairs, 'learned' so well that little of the loss is left, or 'alike': all at one point."""
    rng = np.random.default_rng(0)
    zimg, noise = rng.normal(size=(2, 16, 8))
    if kind == 'alike':
        zimg, noise = np.tile(zimg[:1], (16, 1)), 0
    z = {'zimg': zimg, 'ztxt': zimg + 0.1 * noise}
    np.savez(path, **{name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in z.items()})


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['learned', 'alike'])
def test_good_embeddings_pass(kind, tmp_path, capsys):
    save_pairs(tmp_path / 'mine.npz', kind)
    code = check_loss.main([f'--embeddings={tmp_path}/mine.npz'])
    said = capsys.readouterr().out
    assert code == 0 and said.endswith('all agree within 1e-05\n'), said
    assert said.startswith('16 pairs of width 8 on 8 cpu devices')


@pytest.mark.slow
def test_a_wrong_loss_of_learned_embeddings_is_caught(tmp_path, capsys, monkeypatch):
    def wrong(zimg, ztxt, t, **options):
        return contrastive.softmax_loss(zimg, ztxt, t, **options) * (1.001 if options.get('form') == 'ring' else 1)

    monkeypatch.setattr(loss_forms, '_LOSSES', {'softmax': (wrong, loss_forms._softmax)})
    save_pairs(tmp_path / 'mine.npz', 'learned')
    assert check_loss.main([f'--embeddings={tmp_path}/mine.npz']) == 1
    named = ', '.join(f'softmax {form} {name}' for form in ('tiled', 'ring') for name in ('value', 'zimg', 'ztxt', 't'))
    said = capsys.readouterr().out
    assert said.endswith(f"WRONG, beyond 1e-05: {named}\nsoftmax: set model.loss_form='dense' for now\n"), said
