"""The command line of the preflight: its table, its JSON, its one-line errors, and real TPU compilers."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from big_vlm.checks import preflight
from big_vlm.checks.collectives import Collective
from tools import preflight as tool

ROOT = pathlib.Path(__file__).parents[2]
MICRO = f'--config={ROOT}/tests/micro_config.py'
MIB = 2**20


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that takes no time: a model of 12 MiB, and 1 MiB for every example of a device. → batches it saw."""
    seen = []

    def measure(stage, mesh, limit, batch_size, where, loss):
        del where, loss
        seen.append(batch_size)
        parts = mesh.shape['data'] * mesh.shape['fsdp']
        memory = {'parameters': 12 * MIB, preflight.REST: batch_size // parts * MIB}
        rows = [
            Collective('all-reduce', 'main', 'a', 1, 12 * MIB, 0),
            Collective('all-gather', 'body', 'b', 3, 2 * MIB, 1),
            Collective('all-gather', 'main', 'c', 1, MIB, 0),
        ]
        return preflight.Report(batch_size, batch_size // parts, memory, sum(memory.values()), limit, rows, 2e9, 4.0)

    monkeypatch.setattr(preflight, 'measure', measure)
    return seen


def test_the_table(compiler, capsys):
    assert tool.main([MICRO, '--stage=pretrain', '--hbm=0.5', '--config.pretrain.batch_size=16']) == 0
    said = capsys.readouterr()
    lines = [line.split() for line in said.out.splitlines()]
    assert said.out.startswith('pretrain: contrastive on 8 × cpu (data=8 fsdp=1 model=1), compiled in 4 s\n')
    assert 'batch 16, 2 a device' in said.out
    assert ['parameters', '12.0'] in lines and ['activations,', 'the', 'rest', '2.0'] in lines
    assert ['total', '14.0', 'of', '512.0:', 'fits'] in lines
    # Number, bytes of all, and how many of them and how much a matrix product hides.
    assert ['all-gather', '7.0', '4', '3', '6.0'] in lines and ['all-reduce', '12.0', '1', '0', '0.0'] in lines
    assert ['FLOPs', 'per', 'example', '2e+09'] in lines
    assert 'pretrain: compiling a step of 16 examples for 8 × cpu' in said.err


def test_what_does_not_fit_is_told_after_the_tables(compiler, capsys):
    assert tool.main([MICRO, '--hbm=0.01']) == 2
    said = capsys.readouterr()
    assert said.out.count('TOO MUCH') == 3 and said.err.splitlines()[-1].startswith(
        'error: config.pretrain: batch_size'
    )


def test_fit(compiler, capsys):
    assert tool.main([MICRO, '--stage=transfer', '--hbm=0.5', '--fit', '--json']) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)['transfer']
    assert 484 <= told['per_device'] <= 500 and told['fits'] and told['batch_size'] == 8 * told['per_device']
    assert len(compiler) <= 4 and '  1 a device: 0.01 GiB of 0.50 GiB, fits' in said.err


@pytest.mark.parametrize(
    ('words', 'named'),
    [
        (['--topology=v5e:3x3'], ["unknown topology 'v5e:3x3'", 'v5e:2x4', 'v5p:4x4x4']),
        (['--devices=0'], ['--devices=0: must be at least 1']),
        (['--stage=pretrian'], ["'pretrian'", "did you mean 'pretrain'"]),
        (['--hbm=0'], ['--hbm=0.0: must be a number of GiB, more than 0']),
        (['--hbm=inf'], ['--hbm=inf: must be a number']),
        (['--fit'], ['--hbm=GIB']),
        (['--config.pretrain.mesh.model=3'], ['config.pretrain: mesh: 8 devices', 'model=3']),
        (['--config.pretrain.batch_size=10'], ['config.pretrain: batch_size=10', 'use 8 or 16']),
        (['--config.pretrain.model.image.variant=mo/16'], ["'mo'", "'mu'"]),
    ],
)
def test_bad_input_is_one_line(words, named, capsys):
    assert tool.main([MICRO, *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith('error: ')
    for name in named:
        assert name in line


def test_no_tpu_compiler(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert tool.main([MICRO, '--topology=v5e:2x4']) == 2
    line = capsys.readouterr().err
    assert "pip install -e '.[tpu]'" in line and '--devices=N' in line


def test_a_tokenizer_that_is_not_here(compiler, capsys):
    assert tool.main([MICRO, '--stage=pretrain', '--config.pretrain.tokenizer.path=/nowhere/gemma.model']) == 0
    assert 'config.pretrain: no /nowhere/gemma.model here: counting on 384 pieces' in capsys.readouterr().err


def test_help_teaches_and_imports_nothing_heavy():
    code = (
        'import sys, tools.preflight as tool\n'
        'try: tool.main(["--help"])\n'
        'except SystemExit as stop: assert stop.code == 0\n'
        'assert not {"jax", "numpy"} & set(sys.modules)'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert '--topology=v5e:2x4' in result.stdout and 'v6e:16x16' in result.stdout


@pytest.mark.parity
def test_absent_tpus():
    pytest.importorskip('libtpu')
    command = [sys.executable, '-m', 'tools.preflight', MICRO, '--topology=v5e:2x4', '--json', '--stage=pretrain']
    command += ['--config.pretrain.batch_size=2048', '--config.pretrain.model.loss_form=ring']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)['pretrain']
    assert told['fits'] and told['limit'] == 15.75 * 2**30 and sum(told['memory'].values()) == told['total']
    transfers = [row for row in told['collectives'] if row['kind'] == 'collective-permute']
    assert transfers and all(row['matmuls'] for row in transfers)
