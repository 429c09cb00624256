"""The benchmarks of the contrastive losses, and what the TPU compiler says of the ring."""

import json
import pathlib
import subprocess
import sys

import pytest

from tools.bench import interleaved

ROOT = pathlib.Path(__file__).parents[2]


def test_ratios_of_interleaved_times():
    """Against a side that is always half as fast, whatever the machine does between rounds."""
    ours, theirs = [1.0, 2.0, 4.0], [2.0, 4.0, 8.0]
    assert interleaved.ratio(ours, theirs) == {'minima': 0.5, 'median': 0.5, 'quartiles': [0.5, 0.5]}
    order = []
    times = interleaved.rounds({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, 4)
    assert [len(times[name]) for name in 'ab'] == [4, 4]
    assert order[:2] == ['a', 'b'], 'a first call of each, outside the count'
    assert order[2:] == ['a', 'b', 'b', 'a'] * 2, 'each goes first as often as second'


@pytest.mark.parametrize('name', ['memory', 'overlap', 'floor', 'time'])
def test_help_needs_no_jax(name):
    code = (
        f'import sys; from tools.bench import contrastive_{name} as tool\n'
        'try: tool.main(["--help"])\n'
        'except SystemExit as stop: assert stop.code == 0\n'
        'assert not {"jax", "numpy", "torch"} & set(sys.modules)'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f'python -m tools.bench.contrastive_{name}' in result.stdout


def bench(*words):
    """A benchmark in a process of its own, for the TPU compiler wants an environment of its own; its line of JSON."""
    pytest.importorskip('libtpu')
    command = [sys.executable, '-m', *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parity
def test_memory_on_eight_chips():
    """The gradients of 16,384 images fit into fast memory, which is not counted; those of 131,072 are 384 MiB."""
    words = '--case=sigmoid-ring', '--batch=131072', '--batch=1048576'
    large, largest = (row['temp_mib'] for row in bench('tools.bench.contrastive_memory', *words)['results'])
    assert large <= 16 and largest <= 400


@pytest.mark.parity
def test_what_does_not_fit_is_told_too():
    [dense] = bench('tools.bench.contrastive_memory', '--case=softmax-dense', '--batch=131072')['results']
    assert not dense['fits'] and dense['temp_mib'] > 16_000


@pytest.mark.parity
@pytest.mark.parametrize('loss', ['sigmoid', 'softmax'])
def test_every_transfer_has_a_matrix_product_beside_it(loss):
    told = bench('tools.bench.contrastive_overlap', f'--loss={loss}', '--batch=32768')
    assert len(told['results']) >= 4 and all(row['matmuls'] for row in told['results'])
    assert told['temp_mib'][loss] <= 16
