"""A checkpoint that was damaged is found out before it is restored, and a disk that is full ends no run at once."""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from big_vlm.checkpoints import Checkpointer, abstract, manifest
from big_vlm.config import UserError


def state(step, devices=1):
    mesh = jax.make_mesh((devices,), ('fsdp',), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    w = np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32)
    return {'w': jax.device_put(w, NamedSharding(mesh, PartitionSpec('fsdp'))), 'step': jnp.int32(step)}


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp('two') / 'c'
    with Checkpointer(folder, keep=2) as saver:
        for step in (1, 2):
            saver.save(step, state(step))
    return folder


def restore(folder, devices=1, **options):
    """(step that counts, its w)."""
    with Checkpointer(folder, keep=9, **options) as saver:
        restored, _ = saver.restore(abstract(state(0, devices)))
        return saver.latest_step(), np.asarray(restored['w'])


def test_the_manifest_lists_every_file(two):
    told = json.loads((two / '2' / manifest.NAME).read_text())
    files = {str(f.relative_to(two / '2')) for f in (two / '2').rglob('*') if f.is_file()}
    assert files - set(told['files']) == {manifest.NAME, '_CHECKPOINT_METADATA', 'commit_success.txt'}
    assert told['step'] == 2 and manifest.problem(two / '2') is None


def damage(kind, folder):
    largest = max((f for f in (folder / 'state').rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)
    if kind == 'cut short':
        os.truncate(largest, largest.stat().st_size // 2)
    elif kind == 'a flipped bit':
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    elif kind == 'a deleted file':
        largest.unlink()
    elif kind == 'half deleted':
        shutil.rmtree(folder / 'state')
    elif kind == 'a torn manifest':
        os.truncate(folder / manifest.NAME, 40)
    elif kind.startswith('no manifest'):
        (folder / manifest.NAME).unlink()
        shutil.rmtree(folder / kind.rpartition(' ')[2])


@pytest.mark.parametrize(
    ('kind', 'said'),
    [
        ('cut short', ' bytes of '),
        ('a flipped bit', ' has changed'),
        ('a deleted file', ' is missing'),
        ('half deleted', ' is missing'),
        ('a torn manifest', 'manifest.json cannot be read'),
        ('no manifest and no state/d', 'manifest.json is missing'),
        ('no manifest and no extra', 'manifest.json is missing'),
    ],
)
def test_a_damaged_one_is_set_aside_and_the_one_before_counts(two, tmp_path, capfd, kind, said):
    """Onto another number of devices besides."""
    folder = shutil.copytree(two, tmp_path / 'c')
    damage(kind, folder / '2')
    step, w = restore(folder, devices=4)
    assert step == 1
    np.testing.assert_array_equal(w, state(1)['w'])
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line and '2.damaged now; 1 counts' in line
    assert sorted(f.name for f in folder.iterdir()) == ['1', '2.damaged']
    with Checkpointer(folder, keep=9) as saver:  # The run comes to step 2 again.
        saver.save(2, state(2))
    assert restore(folder)[0] == 2
    damage(kind, folder / '2')
    assert restore(folder)[0] == 1
    assert sorted(f.name for f in folder.iterdir()) == ['1', '2.damaged', '2.damaged2']


def test_the_only_one_is_left_where_it_is(two, tmp_path):
    """To begin again from nothing is for a person to decide."""
    folder = shutil.copytree(two, tmp_path / 'c')
    for step in ('1', '2'):
        damage('a flipped bit', folder / step)
    with pytest.raises(UserError, match=r'c/1 is damaged: state/.* has changed\. Delete this folder'):
        restore(folder)
    assert sorted(f.name for f in folder.iterdir()) == ['1', '2.damaged']


def test_an_older_one_is_verified_when_it_is_asked_for(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / 'c')
    damage('a flipped bit', folder / '1')
    with Checkpointer(folder, keep=9) as saver, pytest.raises(UserError, match='c/1 is damaged: state/'):
        saver.restore(abstract(state(0)), 1)


def test_no_roll_back_to_a_damaged_one(two, tmp_path, capfd):
    folder = tmp_path / 'c'
    with Checkpointer(folder, keep=9) as saver:
        for step in (1, 2, 3):
            saver.save(step, state(step))
        saver.wait()
        damage('a flipped bit', folder / '2')
        assert saver.go_back(3) == 1
        assert '2.damaged now; 1 counts' in capfd.readouterr().err
        np.testing.assert_array_equal(saver.restore(abstract(state(0)))[0]['w'], state(1)['w'])
        saver.save(2, state(2))
        saver.wait()
        damage('a flipped bit', folder / '1')
        assert saver.go_back(2) is None and saver.latest_step() == 2, 'nothing is deleted'
        assert 'c/1 is damaged: state/' in capfd.readouterr().err
    assert sorted(f.name for f in folder.iterdir()) == ['1', '2', '2.damaged']


def test_versions(two, tmp_path):
    """One without a manifest, as all before it, is restored; one of a newer version is refused, not set aside."""
    folder = shutil.copytree(two, tmp_path / 'c')
    file = folder / '2' / manifest.NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {'format': 2}))
    with pytest.raises(UserError, match='made by a newer version'):
        Checkpointer(folder)
    for step in ('1', '2'):
        (folder / step / manifest.NAME).unlink()
    assert restore(folder)[0] == 2
    with Checkpointer(folder, keep=9) as saver:  # One of now does not speak against those before it.
        saver.save(3, state(3))
        saver.wait()
        assert saver.go_back(3) == 2


def test_another_dtype_is_refused(two):
    target = abstract(state(0))
    target['w'] = jax.ShapeDtypeStruct(target['w'].shape, jnp.bfloat16, sharding=target['w'].sharding)
    with Checkpointer(two, keep=2) as saver, pytest.raises(UserError, match='w has dtype float32, not bfloat16'):
        saver.restore(target)


def test_what_is_kept(tmp_path):
    """The newest, multiples, and the best one, also of those that an earlier process saved."""
    scores = {10: 0.1, 20: 0.9, 30: None, 40: 0.9, 50: 0.3, 60: None}
    for steps in ((10, 20, 30, 40), (50, 60)):
        with Checkpointer(tmp_path / 'c', keep=1, keep_every=30, best='max') as saver:
            for step in steps:
                saver.save(step, {'w': jnp.zeros(3)}, score=scores[step])
    assert sorted(f.name for f in (tmp_path / 'c').iterdir()) == ['30', '40', '60']
    with Checkpointer(tmp_path / 'd', keep=1, best='min') as saver:
        for step in (10, 50):
            saver.save(step, {'w': jnp.zeros(3)}, score=scores[step])
    assert sorted(f.name for f in (tmp_path / 'd').iterdir()) == ['10', '50']


def test_a_score_that_comes_later(tmp_path):
    """To a step saved unscored, by this process or one before: it counts now and after a restart."""
    steps = [[(10, None)], [(10, 0.9), (20, 0.5), (30, None), (30, 0.6)], [(40, 0.1)]]
    for saved in steps:
        with Checkpointer(tmp_path / 'c', keep=1, best='max') as saver:
            for step, score in saved:
                saver.save(step, {'w': jnp.zeros(3)}, score=score)
        assert manifest.problem(tmp_path / 'c' / '10') is None
    assert sorted(f.name for f in (tmp_path / 'c').iterdir()) == ['10', '40']
    assert manifest.read(tmp_path / 'c' / '10')['score'] == 0.9


def test_scores_of_something_else(tmp_path):
    """They do not count, nor those that come later to such a step; where it is not said of what, they do."""
    for scored, saved, kept in (
        ('a', {10: 0.9, 20: 0.5}, [10, 20]),
        ('b', {30: 0.3, 40: 0.1}, [30, 40]),
        ('a', {40: 0.2, 50: 0.1}, [40, 50]),
        ('', {}, [40, 50]),
        ('c', {60: 0.1}, [40, 60]),
    ):
        with Checkpointer(tmp_path, keep=1, best='max', scored={'best': scored}) as saver:
            for step, score in saved.items():
                saver.save(step, {'w': jnp.zeros(3)}, score=score)
        assert sorted(int(f.name) for f in tmp_path.iterdir()) == kept
        if not saved:
            file = tmp_path / '40' / manifest.NAME
            told = json.loads(file.read_text())
            assert told.pop('scored') == {'best': 'a'}
            file.write_text(json.dumps(told))


PROGRAM = """
import resource, sys, jax, numpy as np
from big_vlm.checkpoints import Checkpointer
from big_vlm.config import UserError
rng = np.random.default_rng(0)
w = {f'w{i}': jax.numpy.asarray(rng.normal(size=5_000), np.float32) for i in range(100)}  # many writes fail, some late
def disk(full):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with Checkpointer(sys.argv[1], keep=2, grace=2) as saver:
    for step, full in enumerate(map(int, sys.argv[2])):
        disk(full)
        try:
            saver.save(step, w)
            saver.wait() if step == len(sys.argv[2]) - 1 else saver._settle()
        except UserError as error:
            sys.exit(f'ended at {step}: {error}')
"""


def full_disk(folder, pattern):
    """Saves step after step in a process of its own, on a disk that is full where `pattern` has a 1."""
    environment = {**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, '-c', PROGRAM, str(folder), pattern]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    names = sorted(f.name for f in folder.iterdir() if 'tmp' not in f.name)  # The next save sweeps.
    return result.returncode, result.stderr.splitlines(), names


@pytest.mark.skipif(sys.platform != 'linux', reason='a limit on the size of files stands for a quota')
@pytest.mark.slow
def test_a_full_disk_is_survived_until_the_grace_is_used_up(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    code, lines, names = full_disk(tmp_path / 'a', '0110110')
    assert code == 0 and names == ['3', '6'], lines
    assert [line.rpartition('. ')[2] for line in lines] == [
        'The run goes on; 1 more in a row may fail',
        'The run goes on; no more in a row may fail',
    ] * 2
    assert all('checkpoint not written: ' in line and 'File too large' in line for line in lines)
    code, lines, names = full_disk(tmp_path / 'b', '0111')
    assert code == 1 and names == ['0'] and len(lines) == 3 and lines[-1].startswith('ended at 3: '), lines
    # The last one of all has nothing after it that could do instead.
    code, lines, names = full_disk(tmp_path / 'c', '01')
    assert code == 1 and names == ['0'] and len(lines) == 2 and lines[-1].startswith('ended at 1: '), lines
