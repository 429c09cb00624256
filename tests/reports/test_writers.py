"""The record of a run that was cut off and went on must read like that of one that was not."""

import io
import math
import sys
import types

import pytest

from big_vlm.config import UserError
from big_vlm.data import tfrecord
from big_vlm.reports import writers


def test_csv_rows(tmp_path):
    writer = writers.CsvWriter(tmp_path / 'stage' / 'metrics.csv')
    writer.write(50, {'loss': 2.5, 'lr': 1e-3})
    writer.write(100, {'loss': 0.1 + 0.2, 'lr': 5e-4})
    writer.close()
    lines = (tmp_path / 'stage' / 'metrics.csv').read_text().splitlines()
    assert lines == ['step,loss,lr', '50,2.5,0.001', '100,0.30000000000000004,0.0005']
    assert writers.read_csv(writer.path)['loss'] == [(50, 2.5), (100, 0.1 + 0.2)]  # Every bit comes back.
    assert writers.read_csv(tmp_path / 'absent.csv') == {}


def test_csv_columns_grow(tmp_path):
    writer = writers.CsvWriter(tmp_path / 'm.csv')
    writer.write(1, {'loss': 2.0})
    writer.write(2, {'loss': 1.0, 'val, "R@1"': 0.5})
    writer.write(3, {'lr': 0.25})
    writer.write(4, {'loss': math.nan})
    table = writers.read_csv(writer.path)
    assert list(table) == ['loss', 'val, "R@1"', 'lr']
    assert table['loss'][:2] == [(1, 2.0), (2, 1.0)] and math.isnan(table['loss'][2][1])
    assert table['val, "R@1"'] == [(2, 0.5)] and table['lr'] == [(3, 0.25)]
    assert [p.name for p in tmp_path.iterdir()] == ['m.csv']  # No half-written file is left.


def test_csv_goes_on_after_a_restart_as_if_nothing_had_happened(tmp_path):
    whole = writers.CsvWriter(tmp_path / 'whole.csv')
    for step in (10, 20, 30, 40):
        whole.write(step, {'loss': 1 / step})

    first = writers.CsvWriter(tmp_path / 'cut.csv')
    for step in (10, 20, 30):
        first.write(step, {'loss': 1 / step})
    with first.path.open('a') as file:
        file.write('40,0.0')  # The run died while it wrote this line.
    second = writers.CsvWriter(first.path)
    second.rewind(20)
    for step in (30, 40):
        second.write(step, {'loss': 1 / step})
    assert first.path.read_bytes() == whole.path.read_bytes()


def test_csv_of_an_evaluation_that_is_made_again(tmp_path):
    writer = writers.CsvWriter(tmp_path / 'm.csv')
    for step in (2, 4):
        for values in ({'loss': 1.0}, {'often/accuracy': 0.5}, {'last/accuracy': 0.25}):
            writer.write(step, values)
    writer.rewind(4, again=('often', 'la'))
    assert writers.read_csv(writer.path) == {
        'loss': [(2, 1.0), (4, 1.0)],
        'often/accuracy': [(2, 0.5)],
        'last/accuracy': [(2, 0.25), (4, 0.25)],
    }


def test_a_full_disk_damages_nothing_and_costs_no_row_of_the_table(tmp_path, file_limit, capsys):
    table = writers.CsvWriter(tmp_path / 'm.csv')
    both = writers.MultiWriter(table, writers.TensorBoardWriter(tmp_path / 'tb'))
    both.write(1, {'loss': 1.0})
    file_limit(table.path.stat().st_size + 3)
    both.write(2, {'loss': 2.0})
    both.write(2, {'often/accuracy': 0.5})
    both.close()
    assert table.path.read_text() == 'step,loss\n1,1.0\n'
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(': not written: File too large. The run')[0] for line in told] == [
        f'big_vlm: {path}' for path in (table.path, *(tmp_path / 'tb').iterdir())
    ]
    file_limit(-1)
    both.write(3, {'loss': 3.0})
    assert table.path.read_text() == 'step,loss,often/accuracy\n1,1.0,\n2,2.0,\n2,,0.5\n3,3.0,\n'
    assert read_events(tmp_path / 'tb') == [(1, 'loss', 1.0), (3, 'loss', 3.0)]


def test_csv_that_was_moved_away_begins_anew(tmp_path):
    writer = writers.CsvWriter(tmp_path / 'm.csv')
    writer.write(1, {'loss': 1.0, 'lr': 0.5})
    writer.path.unlink()
    writer.write(2, {'loss': 2.0})
    assert writer.path.read_text() == 'step,loss\n2,2.0\n'


def test_csv_rewind_before_anything(tmp_path):
    writer = writers.CsvWriter(tmp_path / 'm.csv')
    writer.rewind(0)
    assert not writer.path.exists()
    writer.write(5, {'loss': 1.0})
    writer.rewind(0)
    assert writer.path.read_text() == 'step,loss\n'


def read_events(logdir):
    """(step, tag, value) and purge steps in the order of the files, as TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(logdir.iterdir()):
        for event in map(Event.FromString, tfrecord.read(path)):
            if event.HasField('session_log'):
                events.append(('purge', event.step))
            events += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return events


def test_tensorboard_purges_what_a_restart_repeats(tmp_path):
    writer = writers.TensorBoardWriter(tmp_path / 'tb')
    assert not (tmp_path / 'tb').exists()
    writer.write(10, {'loss': 2.0})
    writer.write(20, {'loss': 1.0})
    writer.close()
    again = writers.TensorBoardWriter(tmp_path / 'tb')  # Within the same second.
    again.rewind(10)
    again.write(20, {'loss': 0.5})
    again.close()
    assert read_events(tmp_path / 'tb') == [(10, 'loss', 2.0), (20, 'loss', 1.0), ('purge', 11), (20, 'loss', 0.5)]


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_off_a_terminal_is_one_short_line_per_call():
    stream, clock = io.StringIO(), Clock()
    writer = writers.ProgressWriter(400, 'pretrain', ('loss', 'acc'), stream, clock)
    writer.write(100, {'loss': 2.34567, 'lr': 1.0})
    clock.now += 50
    writer.write(150, {'loss': 1.0, 'acc': 0.5})
    writer.write(150, {'retrieval/R@1': 0.5})  # Printed by the evaluation itself.
    writer.close()
    assert stream.getvalue().splitlines() == [
        'pretrain 100/400 (25%)  loss 2.346  ? left',
        'pretrain 150/400 (38%)  loss 1  acc 0.5  4:10 left',  # 250 steps at one a second.
    ]


def test_progress_time_left_counts_this_process_only():
    stream, clock = io.StringIO(), Clock()
    writer = writers.ProgressWriter(10_000, 'train', (), stream, clock)
    writer.rewind(9_000)
    clock.now += 30  # Compilation.
    writer.write(9_001, {})
    clock.now += 20
    writer.write(9_011, {})  # 2 s a step: 989 steps left. Counted from step 0 it would be a few seconds.
    assert stream.getvalue().splitlines()[-1].endswith('32:58 left')


@pytest.mark.filterwarnings('error')
def test_progress_on_a_terminal():
    stream, clock = Terminal(), Clock()
    writer = writers.ProgressWriter(8_000, 'train', ('loss',), stream, clock)
    writer.write(4_000, {'loss': 0.5})
    clock.now += 1
    writer.write(4_001, {'loss': 0.25})
    writer.close()
    last = stream.getvalue().rstrip().split('\r')[-1]
    assert last.startswith('train') and '4001/8000' in last and 'loss 0.25' in last and '1:06:39 left' in last


def test_multi_writer_passes_all_on(tmp_path):
    a, b = writers.CsvWriter(tmp_path / 'a.csv'), writers.CsvWriter(tmp_path / 'b.csv')
    both = writers.MultiWriter(a, b)
    both.write(1, {'loss': 1.0})
    both.write(2, {'loss': 0.5})
    both.rewind(1)
    both.close()
    assert a.path.read_text() == b.path.read_text() == 'step,loss\n1,1.0\n'


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path, monkeypatch):
    """Against a module that takes the calls of theirs that we make."""
    calls = []

    class Run:
        def define_metric(self, name, step_metric):
            calls.append(('axis', name, step_metric))

        def log(self, values):
            calls.append(('log', values))

        def finish(self):
            calls.append(('finish',))

    def init(**options):
        calls.append(('init', options))
        return Run()

    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    for step in (1, 2):
        writer = writers.WandbWriter('vlm', 'mine/pretrain', tmp_path, {'seed': 3})
        writer.rewind(step - 1)
        writer.write(step, {'loss': 1.0})
        writer.close()
    assert [call[0] for call in calls] == ['init', 'axis', 'log', 'finish'] * 2
    first, second = calls[0][1], calls[4][1]
    assert first == second and len(first['id']) == 32 and first['resume'] == 'allow'
    assert (first['project'], first['name'], first['config']) == ('vlm', 'mine/pretrain', {'seed': 3})
    assert calls[1] == ('axis', '*', 'step') and calls[6] == ('log', {'step': 2, 'loss': 1.0})


def test_weights_and_biases_out_of_reach(tmp_path, monkeypatch, capsys):
    """At the start it is one line that names the fix; later it is told once, and the other writers go on."""

    def refuse(*args, **options):
        raise ConnectionAbortedError('api.wandb.ai:\n timed out') if args else RuntimeError('no API key')

    run = types.SimpleNamespace(define_metric=lambda *a, **k: None, log=refuse, finish=lambda: refuse('now'))
    module = types.SimpleNamespace(init=refuse)
    monkeypatch.setitem(sys.modules, 'wandb', module)
    with pytest.raises(
        UserError, match=r"^wandb: no API key\. Run 'wandb login', set WANDB_MODE=offline, or set wandb"
    ):
        writers.WandbWriter('vlm', 'mine/pretrain', tmp_path, {})
    module.init = lambda **options: run
    table = writers.CsvWriter(tmp_path / 'metrics.csv')
    both = writers.MultiWriter(writers.WandbWriter('vlm', 'mine/pretrain', tmp_path, {}), table)
    both.write(1, {'loss': 1.0})
    both.write(2, {'loss': 2.0})
    both.close()
    assert writers.read_csv(table.path) == {'loss': [(1, 1.0), (2, 2.0)]}
    assert capsys.readouterr().err == 'big_vlm: wandb: api.wandb.ai: timed out. The run goes on\n'
