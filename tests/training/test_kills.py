"""Killed and stopped at random over two stages, again and again, a run ends with the bits of one that was left alone.

BIG_VLM_KILLS and BIG_VLM_STOPS set how often (3 and 1); `-s` shows each.
"""

import os
import random
import re
import signal
import time

import micro_run as runs
import numpy as np
import pytest

from big_vlm.checkpoints import load_weights
from big_vlm.checkpoints.trees import flat
from big_vlm.main import INTERRUPTED

pytestmark = pytest.mark.slow
KILLS, STOPS = int(os.environ.get('BIG_VLM_KILLS', 3)), int(os.environ.get('BIG_VLM_STOPS', 1))
EVERY = 3  # steps between checkpoints
STAGES = ('pretrain', 'multimodal')
STEPS = 4 * max(KILLS, STOPS)  # of each stage: a life takes 1 to 9 of them, and repeats some


def start(data_dir, workdir):
    flags = [f'--config.stages={STAGES}']
    for name in STAGES:
        flags += [f'--config.{name}.total.steps={STEPS}', f'--config.{name}.checkpoint.every={EVERY}']
    return runs.start(data_dir, workdir, *flags)


def steps_done(workdir):
    """Of all stages together, as far as they are logged."""
    done = 0
    for name in STAGES:
        file = workdir / name / 'metrics.csv'
        done += runs.losses(file)[-1][0] if file.is_file() and runs.losses(file) else 0
    return done


def saved(workdir, since=0.0):
    """(newest checkpoints of all stages together, whether one was being written `since` then)."""
    files = [list((workdir / name / 'checkpoints').glob('*')) for name in STAGES]
    newest = sum(max([int(f.name) for f in some if f.name.isdecimal()], default=0) for some in files)
    return newest, any('tmp' in f.name and f.stat().st_mtime >= since for some in files for f in some)


def logged(workdir):
    """When the newest table was last written."""
    return max([f.stat().st_mtime for f in workdir.glob('*/metrics.csv')], default=0.0)


def live(data_dir, workdir, rng, number):
    """Starts it, waits until it has taken a random number of steps, and a random moment, and sends the signal.

    Returns (what it said, exit code, when it began).
    """
    begun, began = saved(workdir)[0], time.time()
    process, target = start(data_dir, workdir), begun + rng.randint(1, 9)
    # A table of before still has the steps that will be taken again, until this life has cut it back.
    while process.poll() is None and not (logged(workdir) >= began and steps_done(workdir) >= target):
        time.sleep(0.01)
    time.sleep(rng.random() * 0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    return said, process.returncode, began


@pytest.fixture(scope='module')
def whole(tiny_digit_scenes, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    runs.finish(start(tiny_digit_scenes, workdir))
    return workdir


def same_bits(run, whole):
    for name in STAGES:
        assert runs.losses(run / name / 'metrics.csv') == runs.losses(whole / name / 'metrics.csv'), name
        assert runs.scores(run, name) == runs.scores(whole, name)
        one, other = (flat(load_weights(w / name / 'bundle')) for w in (run, whole))
        assert sorted(one) == sorted(other)
        for path in one:
            np.testing.assert_array_equal(one[path], other[path], err_msg=f'{name}: {path}')


def test_sigkill(whole, tiny_digit_scenes, tmp_path):
    rng, torn, repeated = random.Random(), 0, []
    for number in range(1, KILLS + 1):
        said, code, began = live(tiny_digit_scenes, tmp_path, rng, signal.SIGKILL)
        assert code == -signal.SIGKILL, said
        (newest, writing), done = saved(tmp_path, began), steps_done(tmp_path)
        torn, repeated = torn + writing, [*repeated, done - newest]
        print(f'kill {number}: step {done} of {2 * STEPS}, checkpoint {newest}{", writing one" if writing else ""}')
    runs.finish(start(tiny_digit_scenes, tmp_path))
    same_bits(tmp_path, whole)
    print(f'{KILLS} kills, {torn} while a checkpoint was being written, {sum(repeated)} steps repeated: same bits')


def test_sigterm(whole, tiny_digit_scenes, tmp_path):
    rng, repeated = random.Random(), []
    for number in range(1, STOPS + 1):
        said, code, _ = live(tiny_digit_scenes, tmp_path, rng, signal.SIGTERM)
        assert code == INTERRUPTED and 'Traceback' not in said, said
        (newest, _), done = saved(tmp_path), steps_done(tmp_path)
        repeated.append(max(done - newest, 0))
        told = re.search(r'stopped and saved at step \d+', said)
        print(f'stop {number}: step {done} of {2 * STEPS}, {told[0] if told else "between two stages"}')
    assert max(repeated) <= 1
    runs.finish(start(tiny_digit_scenes, tmp_path))
    same_bits(tmp_path, whole)
    print(f'{STOPS} stops, {sum(repeated)} steps repeated: same bits')
