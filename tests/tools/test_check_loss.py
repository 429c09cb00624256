"""The command line: what it teaches, what it prints, and its exit codes."""

import os
import pathlib
import subprocess
import sys

from big_vlm.checks import loss_forms
from tools import check_loss

ROOT = pathlib.Path(__file__).parents[2]


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


def test_disagreement_is_exit_code_one(monkeypatch, capsys):
    rows = [loss_forms.Row('sigmoid', 'new', 'ring', {'value': 1e-7, 't': float('nan')})]
    monkeypatch.setattr(loss_forms, 'compare', lambda *sizes: iter(rows))
    assert check_loss.main([]) == 1
    assert 'WRONG, beyond 1e-05: sigmoid ring t\n' in capsys.readouterr().out


def test_bad_input_is_one_line(capsys):
    assert check_loss.main(['--batch=13']) == 2
    assert check_loss.main(['--devices=0']) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith('error: batch=13 does not divide over 8 devices')
    assert errors[1] == 'error: --devices=0: must be at least 1'
