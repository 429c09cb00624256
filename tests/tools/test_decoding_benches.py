"""The benchmarks of decoding: what they teach, and what they say where their peers are missing."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from tools.bench import decode, interleaved, paligemma_pair

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('name', ['decode', 'first_token'])
def test_help_imports_nothing_heavy(name):
    code = (
        f'import sys; from tools.bench import {name} as tool\n'
        'try: tool.main(["--help"])\n'
        'except SystemExit as stop: assert stop.code == 0\n'
        'assert not {"jax", "numpy", "torch"} & set(sys.modules)'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f'python -m tools.bench.{name}' in result.stdout


def test_a_missing_peer_is_named(capsys):
    assert interleaved.there('json')
    assert not interleaved.there('json', 'no_such_peer')
    assert capsys.readouterr().out.startswith('skipped: no_such_peer not here')


def test_a_report_ends_in_json(capsys):
    """Of what each side took on the wall and of all cores."""
    times = {'ours': [1.0, 2.0, 4.0], 'theirs': [2.0, 4.0, 4.0]}, {'ours': [2.0, 2.0, 3.0], 'theirs': [6.0, 6.0, 6.0]}
    interleaved.report('decode', {'case': 'x'}, times, [('theirs', 'ours')], ['pytest'], tokens=8)
    lines = capsys.readouterr().out.splitlines()
    last = json.loads(lines[-1])
    assert (last['bench'], last['case'], last['pytest']) == ('decode', 'x', pytest.__version__)
    assert last['results']['theirs / ours'] == {'minima': 2.0, 'median': 2.0, 'quartiles': [1.5, 2.0]}
    assert last['cpu_results']['theirs / ours'] == {'minima': 3.0, 'median': 3.0, 'quartiles': [2.5, 3.0]}
    assert last['seconds'] == {'ours': 1.0, 'theirs': 2.0} and last['spread'] == {'ours': 4.0, 'theirs': 2.0}
    assert '8.00 tokens/s' in lines[-3] and '4.00 tokens/s' in lines[-2]


def test_both_clocks_run():
    """A side that computes, and one that sleeps."""
    sides = {'computes': lambda: sum(range(200_000)), 'sleeps': lambda: time.sleep(0.01)}
    wall, cpu = interleaved.both_clocks(sides, 3)
    assert min(wall['sleeps']) >= 0.01 > max(cpu['sleeps']) > 0
    assert min(cpu['computes']) > 0.001 and len(wall['computes']) == 3


@pytest.mark.slow
def test_decoding_is_timed_in_batches_and_dtypes(capsys, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.setenv('OMP_WAIT_POLICY', 'PASSIVE')
    assert decode.main(['--shape=tiny', '--dtype=bfloat16', '--batch=2', '--rounds=1']) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told['batch'], told['dtype'], told['platform']) == (2, 'bfloat16', 'cpu')
    assert told['tokens/s after it'] > 0 and told['first token ms'] > 0 and 'transformers' not in told['seconds']


def test_what_cannot_be_timed(capsys, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.setenv('OMP_WAIT_POLICY', 'PASSIVE')
    for words, message in ((['--case=slots', '--batch=2'], 'go with --case=paligemma'), (['--batch=0'], '--batch=0')):
        assert decode.main(words) == 2
        assert message in capsys.readouterr().err


def test_weights_are_drawn_alike_here_and_on_a_device():
    path, shape = 'llm/layers/mlp/linear', (1, 64, 64)
    here, there = (draw(path, shape, 'bfloat16') for draw in (paligemma_pair.drawn, paligemma_pair.drawn_on_device))
    assert here.dtype == there.dtype and here.shape == there.shape
    assert abs(np.asarray(here, np.float32).std() / np.asarray(there, np.float32).std() - 1) < 0.05
