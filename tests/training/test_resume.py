"""A killed run, started again, is the run that was never killed: every loss and every final bit."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from big_vlm.main import INTERRUPTED
from big_vlm.reports.writers import CsvWriter, read_csv
from big_vlm.sharding import mesh as meshes
from big_vlm.training import loop

ROOT = Path(__file__).parents[2]
TOTAL = 40


def start(workdir, delay, *process):
    workdir.mkdir(exist_ok=True)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'error::DeprecationWarning:big_vlm'}
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'tests/training/toy.py'), str(workdir), str(TOTAL), str(delay), *process],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ''
    return out


def wait_for_step(process, workdir, step):
    """Returns when the run has logged `step`."""
    path = workdir / 'metrics.csv'
    for _ in range(6000):
        if path.exists() and len(path.read_text().splitlines()) > step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError('the run did not get there')


def losses(workdir):
    return read_csv(workdir / 'metrics.csv')['loss']


def assert_same_run(a, b):
    assert losses(a) == losses(b)
    assert [step for step, _ in losses(a)] == list(range(1, TOTAL + 1))
    x, y = np.load(a / 'final.npz'), np.load(b / 'final.npz')
    assert sorted(x) == sorted(y)
    for key in x:
        np.testing.assert_array_equal(x[key], y[key], err_msg=key)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    finish(start(workdir, 0))
    first, last = losses(workdir)[0][1], losses(workdir)[-1][1]
    assert last < first / 2, 'it should learn, or the comparison says little'
    return workdir


@pytest.mark.slow
def test_killed_twice(whole, tmp_path):
    """SIGKILL at two random steps. The losses of the repeated steps replace those of the killed run."""
    rng = random.Random()
    workdir = tmp_path / 'run'
    for step in (rng.randint(8, 20), rng.randint(22, 35)):
        process = start(workdir, 0.05)
        wait_for_step(process, workdir, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (workdir / 'final.npz').exists()
    finish(start(workdir, 0))
    assert_same_run(whole, workdir)


@pytest.mark.slow
def test_asked_to_stop(whole, tmp_path):
    """SIGTERM: saves where it is, so that nothing is repeated, and says so."""
    workdir = tmp_path / 'run'
    process = start(workdir, 0.05)
    wait_for_step(process, workdir, 10)
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    last = losses(workdir)[-1][0]
    assert out.splitlines()[-1] == f'stopped and saved at step {last}; the same command goes on from there'
    assert str(last) in [f.name for f in (workdir / 'checkpoints').iterdir()]
    finish(start(workdir, 0))
    assert_same_run(whole, workdir)


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(whole, tmp_path):
    """Only one of two processes gets the signal: both save the same step. One process with four devices takes over."""
    workdir = tmp_path / 'run'
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    processes = [start(workdir, 0.05, address, str(i)) for i in range(2)]
    try:
        wait_for_step(processes[0], workdir, 9)
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    last = losses(workdir)[-1][0]
    for out, err in said:
        assert f'stopped and saved at step {last};' in out, (out, err)
    finish(start(workdir, 0))
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=1e-4)
    # What befell the second process' examples counts too, and stays counted.
    one, two = (read_csv(run / 'metrics.csv') for run in (whole, workdir))
    assert two['images_replaced'] == one['images_replaced'] == [(n, float(n > 5)) for n in range(1, TOTAL + 1)]
    assert two['examples_of_toy'] == one['examples_of_toy'] and one['examples_of_toy'][-1][1] == TOTAL * toy.BATCH


@pytest.mark.slow
def test_two_processes_roll_back_together(tmp_path, monkeypatch, capsys):
    """From steps 17 and 18 to the checkpoint of 14, as one process with two devices does it."""
    monkeypatch.setenv('BIG_VLM_TOY_BAD', '16')
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    processes = [start(tmp_path / 'two', 0, address, str(i)) for i in range(2)]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    told = 'back to the checkpoint of step 14, past the 4 batches since; roll-back 1 of 1'
    assert told in said[0][1] and said[1][1] == '' and said[0][0].count('memory per device') == 1, said
    mesh = meshes.make_mesh(fsdp=2, devices=jax.devices()[:2])
    with contextlib.closing(CsvWriter(tmp_path / 'one' / 'metrics.csv')) as writer:
        loop.train(toy.stage(TOTAL), toy.Toy(), toy.batches, tmp_path / 'one', writer, mesh=mesh)
    assert told in capsys.readouterr().err
    np.testing.assert_allclose(losses(tmp_path / 'two'), losses(tmp_path / 'one'), rtol=1e-4)


@pytest.mark.slow
def test_a_finished_run_is_left_alone(whole):
    before = losses(whole)
    finish(start(whole, 0))
    assert losses(whole) == before


@pytest.mark.slow
def test_of_two_processes_one_is_killed(tmp_path):
    """The other one ends within a minute, with one line and the exit code that schedulers start again."""
    workdir = tmp_path / 'run'
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    processes = [start(workdir, 0.05, address, str(i)) for i in range(2)]
    try:
        wait_for_step(processes[0], workdir, 9)
        processes[1].kill()
        _, said = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == INTERRUPTED
    (line,) = [line for line in said.splitlines() if not line.startswith('[Gloo]')]
    assert line.startswith('big_vlm: another process of this run is gone (') and 'start all again' in line
