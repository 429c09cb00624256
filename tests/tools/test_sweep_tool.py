"""A sweep from beginning to end: finished, failed, stopped, shared; its table; as a SLURM array; and for real."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time

import compiler
import micro_run
import pytest

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.reports import sweep as table
from big_vlm.training import sweep as running
from tools import sweep

CONFIG = """
def get_config():
    evaluation = dict(kind='retrieval')
    return dict(task='contrastive', total=dict(steps=9), data=dict(sources=dict(s={})), evals=dict(color=evaluation))

def sweep():
    return {'optimizer.lr': (0.1, 0.2, 0.3), 'seed': (0,)}
"""
# In the place of Python: says yes to the check, and leaves what a run would. lr=0.2 fails unless `mended` is there;
# `slow` makes it wait for a signal.
PYTHON = r"""#!{python}
import json, pathlib, signal, sys, time
given = dict(word.split('=', 1) for word in sys.argv[3:] if '=' in word)
if sys.argv[2] != 'big_vlm.main':
    sys.exit(0)
here, lr = pathlib.Path({here!r}), float(given['--config.optimizer.lr'])
print(json.dumps(sys.argv[3:]), file=(here / 'calls').open('a'), flush=True)
if (here / 'slow').exists():
    signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)))
    print('waiting', flush=True)
    (here / 'slow').rename(here / 'waits')
    time.sleep(60)
if lr == 0.2 and not (here / 'mended').exists():
    sys.exit('big_vlm: the disk is full')
folder = pathlib.Path(given['--workdir']) / 'train'
(folder / 'bundle').mkdir(parents=True)
(folder / 'bundle' / 'bundle.json').write_text('')
(folder / 'metrics.csv').write_text(f'step,loss\n1,9.0\n2,{{lr}}\n')
score = dict(score=lr, low=lr - 0.05, high=lr + 0.05)
scores = {{'color': {{'accuracy': score, 'accuracy/held_out=True': score}}}}
scores['words'] = {{'wer': score | dict(lower_is_better=True)}}
(folder / 'evals.json').write_text(json.dumps(scores))
(folder.parent / 'config.json').write_text('{{"train": {{}}}}')
(folder.parent / 'report.html').write_text('')
"""
NAMES = ['lr=0.1,seed=0', 'lr=0.2,seed=0', 'lr=0.3,seed=0']


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / 'config.py').write_text(CONFIG)
    fake = tmp_path / 'python'
    fake.write_text(PYTHON.format(python=sys.executable, here=str(tmp_path)))
    fake.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(fake))
    return tmp_path


def begin(place, *more):
    return sweep.main([f'--config={place}/config.py', f'--workdir={place}/runs', *more])


def calls(place):
    """Which runs were started, since the last time."""
    lines = (place / 'calls').read_text().splitlines()
    (place / 'calls').write_text('')
    return [json.loads(line)[1].rpartition('/')[2] for line in lines]


def test_in_turn_and_once_more(place, capfd):
    assert begin(place) == 1
    said = capfd.readouterr().out
    assert calls(place) == NAMES
    assert f'2 of 3: {NAMES[1]}: FAILED' in said and f'3 of 3: {NAMES[2]}: done' in said
    log = place / 'runs' / NAMES[1] / 'log.txt'
    assert said.endswith(f'failed: {NAMES[1]} (exit code 1): big_vlm: the disk is full; {log}\n')
    assert log.read_text() == 'big_vlm: the disk is full\n'
    (place / 'mended').touch()
    assert begin(place) == 0
    assert calls(place) == NAMES[1:2], 'only what failed is run again'
    assert f'1 of 3: {NAMES[0]}: finished already' in capfd.readouterr().out


def test_the_table(place, capfd):
    begin(place)
    capfd.readouterr()
    assert begin(place, '--table') == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split() for line in lines[3:6]] == [
        ['0.1', '0', '0.1', '0.1', '0.1*'],
        ['0.2', '0'],
        ['0.3', '0', '0.3', '0.3*', '0.3'],
    ]
    assert lines[2].split() == ['lr', 'seed', 'loss', 'accuracy', 'wer'] and 'held_out' not in ''.join(lines)
    rows = list(csv.DictReader((place / 'runs' / 'sweep.csv').read_text().splitlines()))
    assert [row['run'] for row in rows] == NAMES
    assert rows[2]['train/color/accuracy/held_out=True'] == '0.3' and rows[1]['train/words/wer'] == ''
    page = (place / 'runs' / 'sweep.html').read_text()
    assert page.count('<b>') == 3, 'one best of each score, the slice too'
    assert '<td title="0.25 to 0.35"><b>0.3</b></td>' in page and '<td title="0.05 to 0.15"><b>0.1</b></td>' in page


def test_a_stop_is_passed_on(place, capfd):
    """To the run, which saves; the sweep ends with its exit code, and goes on later."""
    (place / 'mended').touch()
    (place / 'slow').touch()

    def stop():
        while not (place / 'waits').exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert begin(place) == 75
    thread.join()
    assert calls(place) == NAMES[:1]
    assert (place / 'runs' / NAMES[0] / 'log.txt').read_text() == 'waiting\nsaved\n'
    assert begin(place) == 0 and calls(place) == NAMES


def test_two_sweeps_share_the_runs(place, capfd):
    (place / 'mended').touch()
    runs, folder = config.sweep_runs(f'{place}/config.py'), place / 'runs' / NAMES[0]
    folder.mkdir(parents=True)
    said = []

    def meanwhile(line):
        said.append(line)
        assert running.start(runs[0], place / 'runs') is None

    (place / 'slow').touch()
    assert running.start(runs[0], place / 'runs', meanwhile, lambda process: wait_and_stop(place, process)) == 75
    assert said == ['waiting', 'saved']


def wait_and_stop(place, process):
    while not (place / 'waits').exists():
        time.sleep(0.01)
    process.terminate()


@pytest.mark.parametrize(
    ('flags', 'told'),
    [
        (('--sweep.optimizer.lr=1,x',), "lr=x: --config.optimizer.lr: must be float, got 'x'"),
        (('--slurm=/nowhere/x.sh',), '--slurm=/nowhere/x.sh: cannot be written'),
        (('--table',), 'there is no such folder, so no run has begun'),
    ],
)
def test_a_mistake_is_one_line(place, capsys, flags, told):
    assert begin(place, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and told in line


def test_check_names_the_run(place):
    runs = config.sweep_runs(f'{place}/config.py', swept={'data.sources.s.pipeline': 'decod'})
    with pytest.raises(UserError, match='^pipeline=decod: unknown op'):
        running.check(runs, place)


def test_slurm(place, monkeypatch, capsys):
    """The script, run with stand-ins for SLURM: each task makes its own run, and asks to be started again after 75."""
    assert begin(place, f'--slurm={place}/array.sh', '--config.total.steps=3') == 0
    script = (place / 'array.sh').read_text()
    assert '#SBATCH --array=0-2\n' in script and script.count('--output') == 1 and '#SBATCH --requeue\n' in script
    for name in ('srun', 'scontrol'):
        fake = place / name
        fake.write_text(f'#!/bin/sh\necho {name} "$@" >> {place}/called\nexit 75\n')
        fake.chmod(0o755)
    env = {'PATH': f'{place}:{os.environ["PATH"]}', 'SLURM_ARRAY_TASK_ID': '1', 'SLURM_JOB_ID': '12'}
    assert subprocess.run(['bash', place / 'array.sh'], cwd=place, env=env).returncode == 75
    run, again = (place / 'called').read_text().splitlines()
    flags = ' '.join(config.sweep_runs(f'{place}/config.py', {'total.steps': '3'})[1].flags(f'{place}/runs/{NAMES[1]}'))
    assert run.endswith(f'python -m big_vlm.main {flags} --distributed') and again == 'scontrol requeue 12'


def test_slurm_warns_of_what_would_be_refused_here(place, capsys):
    assert begin(place, f'--slurm={place}/array.sh') == 0
    assert '--array=0-2' in (place / 'array.sh').read_text()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('warning: on this machine it would be refused: ') and 'the pipeline is empty' in line


@pytest.mark.slow
def test_for_real(tiny_digit_scenes, tmp_path):
    """A run of one stage that is stopped half way, and goes on with the same command."""
    command = [sys.executable, '-m', 'tools.sweep', f'--config={micro_run.CONFIG}:{tiny_digit_scenes}']
    command += [f'--workdir={tmp_path}', '--sweep.pretrain.optimizer.lr=3e-3', "--config.stages=('pretrain',)"]
    command += ['--config.pretrain.evals={}']
    environment = os.environ | {'XLA_FLAGS': f'--xla_force_host_platform_device_count=1 {compiler.FLAGS}'}
    metrics = tmp_path / 'lr=0.003' / 'pretrain' / 'metrics.csv'
    sweeping = subprocess.Popen(command, cwd=micro_run.ROOT, env=environment)
    assert micro_run.wait_for(sweeping, metrics, 2)
    sweeping.terminate()
    assert sweeping.wait() == 75
    assert subprocess.run(command, cwd=micro_run.ROOT, env=environment).returncode == 0
    losses = micro_run.losses(metrics)
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    columns = {column.head: column for column in table.table(tmp_path, {'lr=0.003': {'pretrain.optimizer.lr': 0.003}})}
    assert columns[('pretrain', 'loss')].cells == [f'{float(losses[-1][1]):.4g}']
