"""The loop's order, what it writes, and what it refuses."""

import os
import signal

import jax
import numpy as np
import pytest
from toy import BATCH, Toy, batches, stage

from big_vlm.checkpoints import load_weights
from big_vlm.config import UserError
from big_vlm.reports.writers import CsvWriter, read_csv
from big_vlm.sharding.mesh import make_mesh
from big_vlm.training import loop, signals


class Events:
    """A writer that remembers the order in which things happen."""

    def __init__(self):
        self.seen = []

    def write(self, step, values):
        self.seen.append(('log' if 'loss' in values else 'write', step))
        assert all(type(value) is float for value in values.values())

    def rewind(self, step, again=()):
        self.seen.append(('rewind', step, *again))

    def batches(self, first):
        for i, batch in enumerate(batches(first)):
            self.seen.append(('fetch', first + i))
            yield batch

    def evaluate(self, name, step, state):
        assert state.step == step
        self.seen.append((name, step))
        return {name: float(step)}


def train_to_csv(config, path, mesh, source=batches):
    writer = CsvWriter(path)
    state = loop.train(config, Toy(), source, path.parent, writer, mesh=mesh)
    writer.close()
    return state, read_csv(path)


@pytest.fixture
def mesh():
    return make_mesh(devices=jax.devices()[:1])


EVALS = {
    'often': {'kind': 'retrieval', 'every': 2},
    'last': {'kind': 'retrieval'},
}


def test_order_is_evaluate_save_fetch_step_log(tmp_path, mesh, monkeypatch):
    events = Events()
    save = loop.Checkpointer.save
    monkeypatch.setattr(
        loop.Checkpointer, 'save', lambda self, step, *a: (events.seen.append(('save', step)), save(self, step, *a))
    )
    config = stage(4, evals=EVALS, checkpoint={'every': 2}, log_every=3)
    loop.train(config, Toy(), events.batches, tmp_path, events, mesh=mesh, evaluate=events.evaluate)
    assert events.seen == [
        ('rewind', 0),
        *[('fetch', 0), ('log', 1), ('fetch', 1)],
        *[('often', 2), ('write', 2), ('save', 2), ('fetch', 2), ('log', 3), ('fetch', 3), ('log', 4)],
        *[('often', 4), ('write', 4), ('last', 4), ('write', 4), ('save', 4)],
    ]


def test_an_accelerator_has_the_next_batches_before_the_host_asks_for_a_result(tmp_path, mesh, monkeypatch):
    """On CPU, whose devices share the host's threads, it does not: the order above."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    events, put = Events(), loop.meshes.put_batch
    monkeypatch.setattr(loop.meshes, 'put_batch', lambda *a: (events.seen.append('put'), put(*a))[1])
    loop.train(stage(4), Toy(), events.batches, tmp_path, events, mesh=mesh)
    assert events.seen[1:] == [
        *[('fetch', 0), 'put', ('fetch', 1), 'put', ('fetch', 2), 'put', ('log', 1)],
        *[('fetch', 3), 'put', ('log', 2), ('log', 3), ('log', 4)],
    ]


def test_goes_on_where_it_saved_without_repeating_evaluations(tmp_path, mesh):
    config = stage(4, evals=EVALS, checkpoint={'every': 2}, log_every=3)
    short = stage(2, evals=EVALS, checkpoint={'every': 2}, log_every=3)
    loop.train(short, Toy(), batches, tmp_path, Events(), mesh=mesh, evaluate=Events().evaluate)
    events = Events()
    loop.train(config, Toy(), events.batches, tmp_path, events, mesh=mesh, evaluate=events.evaluate)
    assert events.seen[:3] == [('rewind', 2), ('fetch', 2), ('log', 3)]
    assert ('often', 2) not in events.seen and ('often', 4) in events.seen


def test_an_evaluation_that_fails_costs_no_steps(tmp_path, mesh):
    """A memory too small for it, for instance: what was trained is saved, and evaluated when the run goes on."""
    config = stage(4, evals=EVALS, checkpoint={'every': 100})

    def failing(name, step, state):
        raise MemoryError(name)

    with pytest.raises(MemoryError, match='often'):
        loop.train(config, Toy(), batches, tmp_path, Events(), mesh=mesh, evaluate=failing)
    events = Events()
    loop.train(config, Toy(), events.batches, tmp_path, events, mesh=mesh, evaluate=events.evaluate)
    assert events.seen[:4] == [('rewind', 2, 'often'), ('often', 2), ('write', 2), ('fetch', 2)]


def test_a_stop_postpones_the_evaluation(tmp_path, mesh):
    config = stage(6, evals=EVALS, checkpoint={'every': 100})
    events = Events()

    def stopping(first):
        for i, batch in enumerate(events.batches(first)):
            if first + i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Interrupted, match='stopped and saved at step 4'):
        loop.train(config, Toy(), stopping, tmp_path, events, mesh=mesh, evaluate=events.evaluate)
    assert signal.getsignal(signal.SIGTERM) is before
    assert ('often', 2) in events.seen and ('often', 4) not in events.seen
    events = Events()
    loop.train(config, Toy(), batches, tmp_path, events, mesh=mesh, evaluate=events.evaluate)
    assert events.seen[:3] == [('rewind', 4, 'often'), ('often', 4), ('write', 4)]


@pytest.mark.parametrize(
    'where', ['last batch', 'batch of the first evaluation', 'first evaluation', 'last evaluation']
)
def test_a_stop_at_the_end_is_not_lost(tmp_path, mesh, where):
    """Or the next stage would start. It postpones what is due, unless the last batch of all is done."""
    config = stage(4, evals=EVALS, checkpoint={'every': 100})
    events = Events()

    def stopping(first):
        for i, batch in enumerate(events.batches(first)):
            if where == 'last batch' and first + i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def evaluate(name, step, state):
        if 'evaluation' in where and name == ('last' if where == 'last evaluation' else 'often'):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            if where == 'batch of the first evaluation':
                signals.check()
        return events.evaluate(name, step, state)

    with pytest.raises(loop.Interrupted, match='stopped and saved at step 4'):
        loop.train(config, Toy(), stopping, tmp_path, events, mesh=mesh, evaluate=evaluate)
    made = [('often', 4), ('write', 4), ('last', 4), ('write', 4)]
    seen = [event for event in events.seen if event in made]
    assert seen == made[: {'first evaluation': 2, 'last evaluation': 4}.get(where, 0)]
    events = Events()
    state = loop.train(config, Toy(), events.batches, tmp_path, events, mesh=mesh, evaluate=events.evaluate)
    assert state.step == 4
    again = [('rewind', 4)] if where == 'last evaluation' else [('rewind', 4, 'often', 'last'), *made]
    assert events.seen == again


def test_metrics_and_weights_it_leaves(tmp_path, mesh):
    state, table = train_to_csv(stage(5, log_every=2), tmp_path / 'm.csv', mesh)
    assert [step for step, _ in table['loss']] == [1, 2, 4, 5]
    assert table['first_id'] == [(1, 0.0), (2, 1.0), (4, 3.0), (5, 4.0)]
    assert {'lr', 'grad_norm', 'update_norm', 'param_norm'} <= set(table)
    assert [step for step, _ in table['examples_per_second']] == [2, 4, 5]
    assert all(0 < mfu < 1 for _, mfu in table['mfu'])
    weights = load_weights(tmp_path / 'checkpoints')
    np.testing.assert_array_equal(weights['w'], state.params['w'])


class Faulty:
    """Every batch has one replaced image."""

    def __init__(self, first):
        self._batches, self.replaced, self.by_source = batches(first), 0, {'examples_of_a': 0}

    def __iter__(self):
        return self

    def __next__(self):
        self.replaced += 1
        self.by_source['examples_of_a'] += 4
        return next(self._batches)


def test_replaced_images_are_counted_across_restarts(tmp_path, mesh):
    for total in (3, 5):
        _, table = train_to_csv(stage(total), tmp_path / 'm.csv', mesh, Faulty)
    assert table['images_replaced'] == [(step, float(step)) for step in range(1, 6)]
    assert table['examples_of_a'] == [(step, 4.0 * step) for step in range(1, 6)]
    assert all(0 <= share < 1 for _, share in table['data_wait'])


def test_initial_params_are_for_the_first_start_alone(tmp_path, mesh):
    calls = []

    def initial(params):
        calls.append(1)
        return jax.tree.map(lambda x: x * 0 + 7, params)

    frozen = {'lr': 0.0, 'ema_decay': 0.5}
    for total in (1, 2):
        config = stage(total, optimizer=frozen)
        state = loop.train(config, Toy(), batches, tmp_path, Events(), mesh=mesh, initial_params=initial)
    assert calls == [1]
    for tree in (state.params, state.ema):
        np.testing.assert_array_equal(tree['w'], np.full((8, 4), 7.0))


@pytest.mark.slow
def test_on_another_mesh(tmp_path):
    """A run goes on with other devices; sums in another order, nothing else."""
    losses = []
    for sizes in ((1, 1), (4, 2)):
        workdir = tmp_path / str(sizes[0])
        for total, mesh_sizes in ((4, (1, 1)), (8, sizes)):
            mesh_ = make_mesh(*mesh_sizes, devices=jax.devices()[: mesh_sizes[0] * mesh_sizes[1]])
            # A constant rate, as the shorter run does not know the longer one's schedule.
            config = stage(total, optimizer={'lr': 0.2, 'schedule': 'constant'})
            _, table = train_to_csv(config, workdir / 'm.csv', mesh_)
        losses.append([loss for _, loss in table['loss']])
    assert len(losses[0]) == 8
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'seed': 4}, r'made with another config \(seed: 3 → 4\): keep'),
        ({'batch_size': 32}, r'made with another config \(batch_size: 16 → 32\)'),
        ({'optimizer': {'name': 'adafactor'}}, 'does not fit this model or optimizer'),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, mesh, changes, message):
    loop.train(stage(1), Toy(), batches, tmp_path, Events(), mesh=mesh)
    with pytest.raises(UserError, match=message):
        loop.train(stage(2, **changes), Toy(), batches, tmp_path, Events(), mesh=mesh)


def test_extra_must_stay_the_same(tmp_path, mesh):
    contract = {'contract': {'value_range': (-1.0, 1.0)}}
    since = {'contract': contract['contract'] | {'images': 1}}  # a field that the first checkpoint knows nothing of
    for total, extra in ((1, contract), (2, since)):
        loop.train(stage(total), Toy(), batches, tmp_path, Events(), mesh=mesh, extra=extra)
    other = {'contract': {'images': 1, 'value_range': (0, 1)}}
    with pytest.raises(UserError, match=r'another config \(contract\.value_range: \[-1\.0, 1\.0\] → \[0, 1\]\)'):
        loop.train(stage(3), Toy(), batches, tmp_path, Events(), mesh=mesh, extra=other)


def test_mistakes(tmp_path, mesh):
    def ending(first):
        return list(batch for batch, _ in zip(batches(first), range(2), strict=False))

    with pytest.raises(UserError, match='the training data ended before step 2'):
        loop.train(stage(9), Toy(), ending, tmp_path / 'b', Events(), mesh=mesh)
    with pytest.raises(UserError, match=r'config\.pretrain\.total\.epochs: the number of examples'):
        loop.train(stage(total={'epochs': 1}), Toy(), batches, tmp_path, Events(), mesh=mesh, where='config.pretrain')
    with pytest.raises(UserError, match=f'batch_size={BATCH - 1} does not divide'):
        loop.train(stage(1, batch_size=BATCH - 1), Toy(), batches, tmp_path, Events(), mesh=make_mesh())


def test_total_steps():
    assert loop.total_steps(stage(total={'epochs': 2}), examples_per_epoch=100) == 13
    assert loop.total_steps(stage(9, profile=(9, 12))) == 9
    with pytest.raises(UserError, match=r'^config\.profile: step 10 is behind the last one, 9: trace earlier steps'):
        loop.total_steps(stage(9, profile=(10, 12)))
    with pytest.raises(UserError, match='less than one step'):
        loop.total_steps(stage(total={'epochs': 1}), examples_per_epoch=0)


def test_the_best_checkpoint_stays(tmp_path, mesh):
    scores = {1: 0.1, 2: 0.8, 3: 0.3, 4: 0.2, 5: 0.4}
    best = {'every': 100, 'keep': 1, 'best': 'often/accuracy'}
    config = stage(5, evals={'often': {'kind': 'retrieval', 'every': 1}}, checkpoint=best)

    def evaluate(name, step, state):
        return {f'{name}/accuracy': scores[step]}

    loop.train(config, Toy(), batches, tmp_path, Events(), mesh=mesh, evaluate=evaluate)
    assert sorted(f.name for f in (tmp_path / 'checkpoints').iterdir()) == ['2', '5']
    again = stage(6, evals={'often': {'kind': 'zero_shot', 'classes': ('a',), 'every': 1}}, checkpoint=best)
    scores[6] = 0.3  # the best of another evaluation
    loop.train(again, Toy(), batches, tmp_path, Events(), mesh=mesh, evaluate=evaluate)
    assert sorted(f.name for f in (tmp_path / 'checkpoints').iterdir()) == ['6']
    wrong = stage(7, evals=config.evals, checkpoint={**best, 'best': 'often/acuracy'})
    with pytest.raises(UserError, match=r"'often/acuracy' \(config.checkpoint.best\): did you mean 'often/accuracy'"):
        loop.train(wrong, Toy(), batches, tmp_path, Events(), mesh=mesh, evaluate=lambda *a: evaluate(*a[:1], 5, a[2]))


def test_a_stop_loses_no_score(tmp_path, mesh):
    """The step where it stopped is evaluated when the run goes on, and is the best then."""
    config = stage(
        6,
        evals={'often': {'kind': 'retrieval', 'every': 2}},
        checkpoint={'every': 100, 'keep': 1, 'best': 'often/accuracy'},
    )

    def stopping(first):
        for i, batch in enumerate(batches(first)):
            if first + i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def evaluate(name, step, state):
        return {'often/accuracy': {2: 0.5, 4: 0.9, 6: 0.7}[step]}

    with pytest.raises(loop.Interrupted, match='step 4'):
        loop.train(config, Toy(), stopping, tmp_path, Events(), mesh=mesh, evaluate=evaluate)
    loop.train(config, Toy(), batches, tmp_path, Events(), mesh=mesh, evaluate=evaluate)
    assert sorted(f.name for f in (tmp_path / 'checkpoints').iterdir()) == ['4', '6']


def test_a_trace_of_some_steps(tmp_path, mesh):
    """Also of a run that comes to them from a checkpoint in between, and of one that breaks off."""
    loop.train(stage(4, profile=(2, 3)), Toy(), batches, tmp_path, Events(), mesh=mesh)
    (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
    assert trace.stat().st_size > 1000 and b'jit_step' in trace.read_bytes()
    trace.unlink()  # One of the same second would have its name.

    def ending(first):
        return list(batch for batch, _ in zip(batches(first), range(2), strict=False))

    with pytest.raises(UserError, match='ended before step 6'):
        loop.train(stage(9, profile=(3, 9)), Toy(), ending, tmp_path, Events(), mesh=mesh)
    assert len(list((tmp_path / 'profile').rglob('*.xplane.pb'))) == 1
