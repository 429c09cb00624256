"""The proof of a resume: on the real program, and that it can fail."""

import json
import os
import pathlib
import subprocess
import sys

import compiler
import micro_run as runs
import numpy as np
import pytest

from big_vlm import config
from big_vlm.checks import resume
from big_vlm.config import UserError
from big_vlm.training import optimizer
from tools import check_resume

ROOT = pathlib.Path(__file__).parents[2]


def proof(losses, same=True, distance=0.0):
    return resume.Proof('train', 6, losses, same, distance)


def test_what_holds():
    same = [(1, '1.5', '1.5'), (2, '1.25', '1.25')]
    near, far = [(1, '1.5', '1.5001')], [(1, '1.5', '1.6')]
    assert proof(same).holds(exact=True)
    assert not proof(near).holds(exact=True) and not proof(same, same=False, distance=1e-9).holds(exact=True)
    assert proof(near, False, 1e-3).holds(exact=False)
    assert not proof(far, False, 1e-3).holds(exact=False) and not proof(near, False, 0.1).holds(exact=False)
    assert not proof([(1, '1.5', 'nan')], True).holds(exact=False), 'a step that is not there'


def test_the_short_run(tiny_digit_scenes):
    short = resume.shortened(runs.validated(tiny_digit_scenes, pretrain__total={'epochs': 3}), 10)
    assert list(short) == ['pretrain', 'multimodal', 'transfer']
    for stage in short.values():
        assert (stage.total.given(), stage.total.steps) == (['steps'], 10)
        assert (stage.checkpoint.every, stage.log_every, stage.evals) == (5, 1, {})
    with pytest.raises(UserError, match='--steps=3: must be at least 4'):
        resume.shortened(short, 3)


def test_what_is_longer_than_the_short_run_is_cut():
    """Else the optimizer would refuse it."""
    rules = (('a', dict(start=dict(percent=90.0), warmup=dict(examples=64))), ('.*', dict(warmup=dict(epochs=2.0))))
    durations = dict(warmup=dict(steps=2000), cooldown=dict(examples=16_000), schedule='constant', rules=rules)
    made = runs.validated('', pretrain__optimizer=durations, pretrain__wandb='mine', pretrain__profile=(500, 510))
    short = resume.shortened(made, 20)['pretrain']
    assert (short.wandb, short.profile) == ('', (0, 0))
    own = short.optimizer
    assert [own.warmup.steps, own.cooldown.steps] == [5, 5]
    assert [(rule.start.steps, rule.warmup.steps) for _, rule in own.rules] == [(10, 5), (0, 5)]
    optimizer.make(own, 20, {'a': np.zeros(3), 'b': np.zeros(3)}, batch_size=8, examples_per_epoch=1000)
    own = resume.shortened(runs.validated('', pretrain__optimizer=dict(warmup=dict(percent=10.0))), 20)['pretrain']
    assert own.optimizer == config.Optimizer(warmup=config.Duration(steps=2)), 'what fits stays'


@pytest.mark.slow
def test_a_run_that_fails_is_one_line(tiny_digit_scenes, tmp_path, monkeypatch, capsys):
    (tmp_path / 'used').mkdir()
    (tmp_path / 'used' / 'file').touch()
    monkeypatch.chdir(ROOT)
    config = f'--config={runs.CONFIG}:{tiny_digit_scenes}'
    assert check_resume.main([config, f'--workdir={tmp_path / "used"}']) == 2
    assert check_resume.main([config, '--devices=0']) == 2
    flags = ['--config.pretrain.batch_size=7', '--devices=2', f'--workdir={tmp_path / "new"}']
    assert check_resume.main([config, *flags, '--config.pretrain.mesh.fsdp=2']) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert 'is not empty' in lines[0] and '--devices=0' in lines[1] and len(lines) == 3
    assert lines[2].startswith('error: the run failed: big_vlm: config.pretrain') and 'whole.log' in lines[2]


def test_help_teaches_and_imports_nothing_heavy():
    code = (
        'import sys, tools.check_resume as tool\n'
        'try: tool.main(["--help"])\n'
        'except SystemExit as stop: assert stop.code == 0\n'
        'assert not {"jax", "numpy"} & set(sys.modules)'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'python -m tools.check_resume --config=configs/quickstart.py:smoke' in result.stdout


def test_with_more_devices_it_is_the_killed_run_that_goes_on_with_them(tiny_digit_scenes, tmp_path, monkeypatch):
    started = []

    def popen(command, env, **_):
        workdir = pathlib.Path(command[-1].partition('=')[2])
        flags, platform = env['XLA_FLAGS'].split(), env['JAX_PLATFORMS']
        started.append((workdir.name, platform, [flag[-1] for flag in flags if 'device_count' in flag]))
        for stage in ('pretrain', 'multimodal'):
            (workdir / stage / 'checkpoints' / '2').mkdir(parents=True, exist_ok=True)
            (workdir / stage / 'metrics.csv').write_text('step,loss\n' + ''.join(f'{n},{1 / n}\n' for n in range(1, 5)))

    monkeypatch.setattr(resume.subprocess, 'Popen', popen)
    monkeypatch.setattr(resume, '_finish', lambda process: None)
    monkeypatch.setattr(resume, '_kill_after', lambda *_: None)
    monkeypatch.setattr(resume, 'load_weights', lambda folder: {'w': np.ones(2)})
    made = runs.validated(tiny_digit_scenes, stages=('pretrain', 'multimodal'))
    proofs = list(resume.prove(made, tmp_path / 'runs', steps=4, devices=2))
    assert [(one.stage, one.resumed_at, one.holds(True)) for one in proofs] == [
        ('pretrain', 2, True),
        ('multimodal', 2, True),
    ]
    assert started == [('whole', 'cpu', ['1']), *(('killed', 'cpu', [n]) for n in '122')]


@pytest.mark.slow
def test_the_real_program_goes_on(tiny_digit_scenes, tmp_path):
    """The command that the README shows, of two stages."""
    command = [sys.executable, '-m', 'tools.check_resume', f'--config={runs.CONFIG}:{tiny_digit_scenes}']
    command += ["--config.stages=('pretrain','multimodal')", '--steps=12', f'--workdir={tmp_path / "runs"}']
    flags = f'--xla_force_host_platform_device_count=1 {compiler.FLAGS}'
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {'XLA_FLAGS': flags}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    for name in ('pretrain', 'multimodal'):
        went_on, *rows, weights = lines[:14]
        assert went_on == f'{name}: killed, went on from step 6' and weights == 'parameters ='
        assert [row.split()[0] for row in rows] == [str(n) for n in range(1, 13)]
        assert all(row.endswith('=') for row in rows)
        del lines[:14]
    assert lines == ['the same run, bit for bit']
    assert json.loads((tmp_path / 'runs' / 'short.json').read_text())['stages'] == ['pretrain', 'multimodal']
