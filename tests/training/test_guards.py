"""Bad batches leave no trace but their line; spikes and a stuck run are told."""

import itertools
import json
import mmap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import BATCH, Toy, batches, stage

from big_vlm.checkpoints import trees
from big_vlm.config import Duration, Optimizer, UserError
from big_vlm.reports.writers import CsvWriter, read_csv
from big_vlm.sharding.mesh import make_mesh, put_batch
from big_vlm.training import guards, loop, memory, optimizer, step


class Edge:
    """Its loss is infinite where y is, its gradient alone is no number where x is 0; its stats count the batches."""

    flops_per_example = 1

    def init(self, rng):
        return {'w': jax.random.normal(rng, (8, 4)), 'bias': jnp.ones(3)}, {'mean': jnp.zeros(4)}

    def loss(self, params, stats, batch, rng):
        out = batch['x'] @ params['w']
        length = jnp.sqrt(jnp.sum(out**2))
        loss = jnp.mean((out - batch['y']) ** 2) + 0.01 * length
        return loss, ({}, {'mean': stats['mean'] + out.mean(axis=0)})


GOOD = [{'x': b['x'], 'y': b['y']} for b, _ in zip(batches(0), range(3), strict=False)]
BAD = {
    'no number in': GOOD[0] | {'x': np.full((BATCH, 8), np.nan, np.float32)},
    'infinite loss': GOOD[0] | {'y': np.full((BATCH, 4), np.inf, np.float32)},
    'gradient alone': {'x': np.zeros((BATCH, 8), np.float32), 'y': GOOD[0]['y']},
}


@pytest.fixture(scope='module', params=['adamw', 'adafactor'])
def run(request):
    """(batches → state, rows of metrics) on two devices, with all that a state can hold and a rate that moves."""
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    config = Optimizer(name=request.param, lr=0.1, weight_decay=0.1, warmup=Duration(steps=3), ema_decay=0.9)
    tx, info = optimizer.make(config, 10, step.param_shapes(Edge()))
    abstract = step.abstract_state(Edge(), tx, mesh, averaged=info.trainable)
    train_step = step.make_train_step(Edge(), tx, info, mesh, abstract, 0, ema_decay=0.9)

    def run(some):
        state, rows = step.init_state(Edge(), tx, mesh, seed=1, averaged=info.trainable), []
        for batch in some:
            state, metrics = train_step(state, put_batch(batch, mesh))
            rows.append({name: float(value) for name, value in metrics.items()})
        return state, rows

    return run


@pytest.mark.parametrize('kind', BAD)
def test_a_bad_batch_might_as_well_not_have_come(run, kind):
    without, rows = run(GOOD)
    state, others = run([GOOD[0], BAD[kind], *GOOD[1:]])
    assert (int(without.step), int(state.step)) == (3, 4)
    for path, leaf in trees.flat(without.replace(step=state.step)).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(trees.flat(state)[path]), err_msg=path)
    bad = others.pop(1)
    assert np.isfinite(bad['loss']) == (kind == 'gradient alone') and not np.isfinite(bad['grad_norm'])
    assert others == rows and bad['update_norm'] == 0 and bad['param_norm'] == rows[0]['param_norm']
    assert bad['lr'] == rows[1]['lr'], 'its rate was not used up'


def poisoned(*bad):
    """The toy's batches; the targets of some steps, counted as in metrics.csv, are no numbers."""

    def source(first):
        for number, batch in enumerate(batches(first), first + 1):
            yield {**batch, 'y': batch['y'] * (np.nan if number in bad else 1)}

    return source


def train(workdir, config, source):
    writer = CsvWriter(workdir / 'metrics.csv')
    try:
        mesh = make_mesh(devices=jax.devices()[:1])
        return loop.train(config, Toy(), source, workdir, writer, mesh=mesh), read_csv(writer.path)
    finally:
        writer.close()


def test_it_is_counted_and_its_examples_are_named(tmp_path, capsys):
    """Also when the run comes by again, from a checkpoint before and from one after it."""
    config = stage(6, checkpoint={'every': 2})
    _, table = train(tmp_path, config, poisoned(3))
    state, table = train(tmp_path, stage(9, checkpoint={'every': 2}), poisoned(3, 7))
    assert table['updates_skipped'] == [(n, float((n >= 3) + (n >= 7))) for n in range(1, 10)]
    assert [n for n, loss in table['loss'] if not np.isfinite(loss)] == [3, 7]
    assert np.isfinite(state.params['w']).all() and int(optimizer.updates_made(state.opt_state)) == 7
    lines = [json.loads(line) for line in (tmp_path / 'bad_batches.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [3, 7]
    assert lines[0] == {
        'step': 3,
        'batch': 3,
        'loss': 'nan',
        'grad_norm': 'nan',
        'sources': ['toy'],
        'ids': [[2, 2]] * BATCH,
    }
    assert 'big_vlm: step 7: the loss is nan' in capsys.readouterr().err
    dump = guards.BadBatches(tmp_path / 'bad_batches.jsonl', ['toy'], 3)
    dump.rewind(6)
    assert len((tmp_path / 'bad_batches.jsonl').read_text().splitlines()) == 1


def test_a_full_disk_ends_no_run_and_damages_no_line(tmp_path, file_limit, capsys):
    file = tmp_path / 'bad.jsonl'
    bad = guards.BadBatches(file, ['toy'], 9)
    bad.see(1, np.nan, 1.0, None)
    file_limit(file.stat().st_size + 3)
    assert not bad.see(2, np.nan, 1.0, None)
    assert 'step 2: the loss is nan' in (err := capsys.readouterr().err) and f'{file}: not written: File too' in err
    file_limit(-1)
    bad.see(3, np.nan, 1.0, None)
    assert [json.loads(line)['step'] for line in file.read_text().splitlines()] == [1, 3]
    file_limit(3)
    with pytest.raises(UserError, match='not written'):
        bad.rewind(1)
    assert [json.loads(line)['step'] for line in file.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize(
    ('limit', 'bad', 'told'),
    [
        (3, (2, 3, 5, 6, 7), 'step 7: the loss is nan, its gradient nan, and so 3 steps in a row; lower optimizer.lr'),
        (1, (2,), 'step 2: the loss is nan, its gradient nan; lower optimizer.lr'),
        (0, (2,), 'step 2: the loss is nan, its gradient nan; lower optimizer.lr'),
    ],
)
def test_too_many_in_a_row_end_the_run(tmp_path, limit, bad, told):
    with pytest.raises(UserError, match=told) as error:
        train(tmp_path, stage(9, guards={'bad_steps': limit}), poisoned(*bad))
    path = tmp_path / 'bad_batches.jsonl'
    assert str(path) in str(error.value) and len(path.read_text().splitlines()) == len(bad)


def diverging(bad=(), loud=()):
    """As `poisoned`, and the targets of the `loud` batches are far off."""

    def source(first):
        for number, batch in enumerate(poisoned(*bad)(first), first + 1):
            yield {**batch, 'y': batch['y'] + (1e3 if number in loud else 0)}

    return source


ASTRAY = {
    'bad': (
        {'bad_steps': 3, 'every': 4},
        {'bad': (5, 6, 7, 10, 11, 13)},
        (7, 4, 12),
        'step 7: the loss is nan, its gradient nan, and so 3 steps in a row: back to the checkpoint of step 4, past '
        'the 3 batches since; roll-back 1 of 2\n',
        (6, 8, 12),
    ),
    'spikes': (
        {'spike_steps': 2, 'every': 16},
        {'loud': (29, 33, 34)},
        (34, 32, 36),
        'a spike for 2 steps: back to the checkpoint of step 32, past the 2 batches since; roll-back 1 of 2\n',
        (33,),
    ),
}


@pytest.mark.parametrize('kind', ['bad', pytest.param('spikes', marks=pytest.mark.slow)])
def test_a_run_that_has_gone_astray_goes_back(tmp_path, capsys, kind):
    """It ends as one that never saw the batches since that checkpoint, also if it was cut off on its way."""
    settings, planted, (astray, step, total), told, cuts = ASTRAY[kind]
    source = diverging(**planted)
    settings = dict(settings, rollbacks=2)
    config = stage(total, checkpoint={'every': settings.pop('every'), 'keep': 3}, guards=settings)
    state, table = train(tmp_path / 'whole', config, source)
    said = capsys.readouterr()
    assert told in said.err and said.out.count('memory per device') == 1

    def without(first):
        return itertools.chain(itertools.islice(source(first), step), source(astray))

    other, others = train(tmp_path / 'other', stage(total, checkpoint={'every': 100}), without)
    assert_same(state, other)
    assert str(table['loss']) == str(others['loss']), 'as text, where nan is nan'
    assert table['rollbacks'] == [(n, float(n > step)) for n in range(1, total + 1)]
    # A deletion that was killed. Then it is cut off before it went back, after it did, and after it saved again.
    left = tmp_path / 'cut' / 'checkpoints' / '6.left_behind'
    left.mkdir(parents=True)
    for last in cuts:
        with pytest.raises(UserError, match='ended before'):
            train(tmp_path / 'cut', config, cut(source, last))
    again, repeated = train(tmp_path / 'cut', config, source)
    assert_same(state, again)
    assert sorted(path.name for path in left.parent.iterdir() if path.is_dir()) == sorted(
        path.name for path in (tmp_path / 'whole' / 'checkpoints').iterdir() if path.is_dir()
    )
    for name in ('loss', 'rollbacks', 'updates_skipped'):
        assert str(repeated[name]) == str(table[name])
    for run in ('whole', 'cut') if kind == 'bad' else ():
        lines = [json.loads(line) for line in (tmp_path / run / 'bad_batches.jsonl').read_text().splitlines()]
        assert [line['batch'] for line in lines] == list(planted['bad'])
        assert [line['step'] for line in lines] == [5, 6, 7, 7, 8, 10]


def cut(source, last):
    """Ends behind batch `last`."""

    def until(first):
        yield from (batch for number, batch in zip(range(first + 1, last + 1), source(first), strict=False))

    return until


def assert_same(state, other):
    for path, leaf in trees.flat(state).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(trees.flat(other)[path]), err_msg=path)


@pytest.mark.parametrize(
    ('bad', 'told'),
    [
        (range(5, 99), 'and so 2 steps in a row; .*; 2 roll-backs did not help'),
        ((2, 3), 'There is no checkpoint from before it to go back to: raise checkpoint.keep, or lower'),
    ],
)
def test_it_goes_back_so_often_and_no_more(tmp_path, bad, told):
    config = stage(9, checkpoint={'every': 4, 'keep': 1}, guards={'bad_steps': 2, 'rollbacks': 2})
    with pytest.raises(UserError, match=told):
        train(tmp_path, config, poisoned(*bad))


def test_spikes(capsys):
    """The median of 1.0 to 1.4 taking turns is 1.2, the deviation 0.148."""
    spikes = guards.Spikes(10.0)
    seen = [spikes.see(n, 1.0 + 0.1 * (n % 5) if n != 15 else 99.0) for n in range(40)]
    assert not any(seen), 'the first twenty have too little behind them'
    assert not spikes.see(40, 2.6) and spikes.see(41, 2.8) and not guards.Spikes(0).see(42, 1e9)
    assert capsys.readouterr().err == (
        'big_vlm: step 41: a spike, the loss is 2.8, 11 deviations above its median 1.2\n'
    )
    with pytest.raises(guards.Astray, match='step 47: the loss is 9, a spike for 3 steps; lower') as astray:
        steady = [1.0 + 0.1 * (n % 5) for n in range(40)]
        few = guards.Spikes(10.0, 3, steady)
        for n, loss in enumerate((9, 9, 1, 9, 9), 42):
            few.see(n, loss)
        guards.Spikes(10.0, 3, few.losses, few.row).see(47, 9)
    assert (astray.value.since, astray.value.step) == (45, 47)
    capsys.readouterr()
    flat = guards.Spikes(10.0)
    assert not any(flat.see(n, 2.0) for n in range(30))
    assert not flat.see(30, 2.1) and flat.see(31, 2.3)


def test_a_stuck_run_is_told_and_shown(capfd):
    with guards.Watchdog(0.3 / 60) as dog:
        for n in range(6):
            time.sleep(0.1)
            dog.beat(n)
        assert capfd.readouterr().err == ''
        time.sleep(0.5)
    first, *stacks = capfd.readouterr().err.splitlines()
    assert first.startswith('big_vlm: no step has ended for 0.00') and first.endswith(
        'since step 5; the threads are here:'
    )
    assert any('test_a_stuck_run_is_told_and_shown' in line for line in stacks)
    with guards.Watchdog(0):
        time.sleep(0.1)
    assert capfd.readouterr().err == ''


def test_memory(monkeypatch):
    told = memory.read()
    assert list(told) == ['host_gib'] and 0.05 < told['host_gib'] < 50

    class Device:
        def __init__(self, use):
            self.memory_stats = lambda: use and {'bytes_in_use': use * 2**30, 'peak_bytes_in_use': use * 2**31}

    monkeypatch.setattr(jax, 'local_devices', lambda: [Device(1), Device(3), Device(None)])
    told = memory.read()
    assert (told['device_gib'], told['device_peak_gib']) == (3.0, 6.0)
    block = mmap.mmap(-1, 2**27)  # numpy's would come from what earlier tests left to the process
    block.write(bytes(2**27))
    assert memory.read()['host_gib'] > told['host_gib'] + 0.1
    del block
