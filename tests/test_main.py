"""The command line: one line for every mistake, and a run that can be stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import jax
import micro_run as runs
import numpy as np
import pytest

from big_vlm import checkpoints
from big_vlm import config as config_lib
from big_vlm.config import UserError
from big_vlm.main import CTRL_C, INTERRUPTED, main
from big_vlm.training import workdirs


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs `main` on the micro config with more flags; returns (exit code, its lines on stderr)."""
    monkeypatch.chdir(runs.ROOT)

    def call(*flags, config=f'{runs.CONFIG}:{tmp_path}/data', workdir=tmp_path / 'run'):
        code = main([f'--config={config}', f'--workdir={workdir}', *flags])
        return code, capsys.readouterr().err.splitlines()

    return call


@pytest.mark.parametrize(
    ('flag', 'named'),
    [
        (
            '--config.pretrain.optimiser.lr=1',
            ["'optimiser'", "did you mean 'optimizer'", '--config.pretrain.optimiser.lr'],
        ),
        ('--config.pretrian.seed=1', ["'pretrian'", 'pretrain']),
        ('--config.pretrain.optimizer.lr=fast', ['--config.pretrain.optimizer.lr', 'float', "'fast'"]),
        ('--config.pretrain.optimizer.name=adamv', ["'adamv'", 'config.pretrain.optimizer.name', "'adamw'"]),
        ('--config.pretrain.data.sources.captions.pipeline=decode | resiz(32)', ["'resiz'", "'resize'", 'captions']),
        ('--config.pretrain.data.sources.captions.dataset=digit_scense', ["'digit_scense'", "'digit_scenes'"]),
        ('--config.pretrain.data.sources.captions.split=trial', ["'trial'", "'train'", 'captions']),
        ('--config.transfer.evals.answer.split=tests', ["'tests'", "'test'", 'config.transfer.evals.answer']),
        ("--config.transfer.evals.answer.metrics=('exactmatch',)", ["'exactmatch'", "'exact_match'"]),
        ('--config.pretrain.model.image.variant=mo/16', ["'mo'", "'mu'"]),
        ('--config.pretrain.total.epochs=2', ['config.pretrain.total', 'steps and epochs', 'keep one']),
        ('--config.pretrain.batch_size=10', ['batch_size=10', '8', '16']),
        ('--config.pretrain.mesh.model=3', ['8 devices', 'model=3']),
        ('--config.pretrain.init_from.path=/nowhere/at/all', ['config.pretrain.init_from.path', '/nowhere/at/all']),
        ('--config.pretrain.tokenizer.path=/nowhere.model', ['/nowhere.model']),
        ("--config.stages=('pretrain','transfre')", ["'transfre'", "'transfer'"]),
        ('--workdri=x', ["'--workdri'", "'--workdir'"]),
        ('--config.pretrain.seed', ['--config.pretrain.seed', 'VALUE']),
    ],
)
def test_a_mistake_is_one_line_that_names_it(call, tmp_path, flag, named):
    code, lines = call(flag)
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith('big_vlm: ')
    for words in named:
        assert words in lines[0]
    assert list(tmp_path.iterdir()) == [], 'nothing is written for a wrong config'


def test_a_bucket_is_no_workdir(call, tmp_path):
    code, lines = call(workdir='gs://bucket/run')
    assert code == 2 and 'gs://bucket/run' in lines[0] and len(lines) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_workdir(call, tmp_path, monkeypatch):
    """`--workdir=$DIR` of a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    code, lines = call(workdir='', config=f'{runs.ROOT}/configs/quickstart.py:smoke')
    assert code == 2 and '--workdir is empty' in lines[0] and list(tmp_path.iterdir()) == []


def test_a_run_is_under_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workdirs, 'WAIT_SECONDS', 0)
    with workdirs.held(tmp_path / 'run'):
        with (
            pytest.raises(UserError, match=r'--workdir=.*run: another run is under way there'),
            workdirs.held(tmp_path / 'run'),
        ):
            raise AssertionError
    assert 'another run is under way there, or about to end: waiting' in capsys.readouterr().out
    with workdirs.held(tmp_path / 'run'):
        pass


def test_the_devices_that_were_asked_for(call, monkeypatch):
    """jax passes over a GPU that it does not find."""
    monkeypatch.setenv('JAX_PLATFORMS', 'cuda,cpu')
    code, lines = call('--check')
    assert code == 2 and len(lines) == 1 and 'JAX_PLATFORMS=cuda,cpu, but jax finds only cpu' in lines[0]

    def broken():
        raise RuntimeError('Unable to initialize backend\n"tpu"')

    monkeypatch.setattr(jax, 'default_backend', broken)
    code, lines = call('--check')
    assert code == 2 and len(lines) == 1 and 'jax cannot start (Unable to initialize backend "tpu")' in lines[0]


def test_processes_that_find_no_job(call, monkeypatch):
    def initialize(**_):
        raise ValueError('coordinator_address should be defined.')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    code, lines = call('--distributed')
    assert code == 2 and len(lines) == 1 and 'tools/launch/' in lines[0]


def test_a_process_that_waits_for_others_hears_sigterm(tmp_path):
    """In jax's own code, where Python runs no handler."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    script = (
        'import functools, jax, sys\n'
        'from big_vlm import main\n'
        f"join = functools.partial(jax.distributed.initialize, 'localhost:{port}', 2, 0)\n"
        'jax.distributed.initialize = join\n'
        'main._PATIENCE = 1\n'
        f"sys.exit(main.main(['--config={runs.CONFIG}:{tmp_path}/data', '--workdir={tmp_path}/run', '--distributed']))"
    )
    waiting = subprocess.Popen([sys.executable, '-c', script], cwd=runs.ROOT, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr.readline() == 'big_vlm: waiting for the other processes of this run\n'
    waiting.terminate()
    assert waiting.wait(20) == INTERRUPTED
    assert waiting.stderr.read() == 'big_vlm: stopped; the same command goes on from the newest checkpoint\n'


def test_a_wrong_file(call, tmp_path):
    for config, named in (
        ('tests/micro_confg.py', "did you mean 'tests/micro_config.py'"),
        ('nowhere/a.py', "no file 'nowhere/a.py'"),
        ('configs/quickstart.py:smok', "did you mean 'smoke'"),
    ):
        code, lines = call(config=config)
        assert code == 2 and len(lines) == 1 and named in lines[0], lines
    assert main([]) == 2


def test_weights_of_something_else(call, tmp_path):
    """A folder that is no checkpoint, and one of another model."""
    foreign = tmp_path / 'foreign'
    foreign.mkdir()
    code, lines = call(f'--config.pretrain.init_from.path={foreign}')
    assert code == 2 and len(lines) == 1 and 'is not a bundle' in lines[0] and str(foreign) in lines[0]
    checkpoints.save_weights(foreign / 'weights', {'img': {'kernel': np.zeros(3)}})
    flags = [f'--config.pretrain.init_from.path={foreign}', "--config.pretrain.init_from.parts={'img': 'img'}"]
    code, lines = call(*flags)
    assert code == 2 and len(lines) == 1 and 'does not fit' in lines[0] and 'config.pretrain.init_from' in lines[0]
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('place', ['file', 'file/below'])
def test_a_workdir_that_cannot_be(call, tmp_path, place):
    (tmp_path / 'file').write_text('mine')
    code, lines = call(workdir=tmp_path / place)
    assert code == 2 and len(lines) == 1 and f'--workdir={tmp_path / place}' in lines[0], lines
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_workdir_without_permission(call, tmp_path):
    (tmp_path / 'locked').mkdir(mode=0o500)
    code, lines = call(workdir=tmp_path / 'locked' / 'run')
    assert code == 2 and len(lines) == 1 and 'Permission denied' in lines[0]


def test_a_foreign_workdir(call, micro_run, tiny_digit_scenes):
    code, lines = call('--config.pretrain.seed=5', config=f'{runs.CONFIG}:{tiny_digit_scenes}', workdir=micro_run)
    assert code == 2 and len(lines) == 1 and 'pretrain.seed: 0 → 5' in lines[0] and '--workdir' in lines[0]


@pytest.mark.smoke
def test_check_validates_and_writes_nothing(call, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    assert main([f'--config={runs.CONFIG}:{tmp_path}/data', f'--workdir={tmp_path}/run', '--check']) == 0
    out, err = capsys.readouterr()
    assert [line.split(':')[0] for line in out.splitlines()] == ['pretrain', 'multimodal', 'transfer'] and err == ''
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_outside_the_loop_is_one_line(call, monkeypatch):
    def ask(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(config_lib, 'validate', ask)
    code, lines = call()
    assert code == CTRL_C and len(lines) == 1 and 'the same command goes on' in lines[0]


def test_what_the_disk_refuses_is_one_line(call, monkeypatch):
    """As of a stage's folder that is a file, or somebody else's."""
    for error, line in (
        (NotADirectoryError(20, 'Not a directory', 'runs/a'), 'big_vlm: runs/a: Not a directory; the same command'),
        (OSError(28, 'No space left on device'), 'big_vlm: No space left on device; the same command goes on'),
    ):
        monkeypatch.setattr(config_lib, 'validate', mock.Mock(side_effect=error))
        code, lines = call()
        assert code == 2 and len(lines) == 1 and lines[0].startswith(line)


def test_sigterm_outside_the_loop_ends_at_once_with_75(tmp_path, monkeypatch, capfd):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setattr(config_lib, 'validate', lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)))
    monkeypatch.setattr(os, '_exit', sys.exit)
    with pytest.raises(SystemExit) as ended:
        main([f'--config={runs.CONFIG}', f'--workdir={tmp_path}'])
    assert ended.value.code == INTERRUPTED and signal.getsignal(signal.SIGTERM) is before
    assert capfd.readouterr().err == 'big_vlm: stopped; the same command goes on from the newest checkpoint\n'


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['--help'])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for words in (
        '--config=configs/quickstart.py',
        '--workdir',
        '--config.KEY',
        '--check',
        'exit code 75',
        'skips finished',
    ):
        assert words in said


def test_a_reader_who_has_gone_leaves_the_exit_status():
    """`big_vlm.main … | tee log`, Ctrl-C: a scheduler is told 75, and not Python's 120 for what it could not write."""
    reader, writer = os.pipe()
    os.close(reader)
    program = 'import sys; from big_vlm import main, config; config.say("stopping"); main.let_go(); sys.exit(75)'
    with os.fdopen(writer, 'wb') as nobody:
        assert subprocess.run([sys.executable, '-c', program], stdout=nobody, stderr=nobody).returncode == 75
