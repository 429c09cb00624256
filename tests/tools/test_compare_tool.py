"""Two runs that differ in known ways, and what the page says of them."""

import json
from html.parser import HTMLParser

import pytest

from big_vlm.reports import comparison, writers
from tools import compare


def make_run(folder, lr, losses, score=None, **more):
    stage = {'optimizer': {'lr': lr, 'name': 'adamw'}, 'seed': 3, **more}
    (folder / 'pretrain').mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps({'pretrain': stage}))
    table = writers.CsvWriter(folder / 'pretrain' / 'metrics.csv')
    for step, loss in enumerate(losses, 1):
        table.write(step, {'loss': loss, 'lr': lr})
    table.close()
    if score is not None:
        scores = {'color': {'accuracy': {'score': score, 'chance': 0.1, 'n': 9}}}
        (folder / 'pretrain' / 'evals.json').write_text(json.dumps(scores))
    return folder


class Cells(HTMLParser):
    """The texts of the table rows."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == 'tr':
            self.rows.append([])

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ('td', 'th'):
            self.rows[-1].append(data)


def test_the_page(tmp_path, capsys):
    a = make_run(tmp_path / 'plain', 0.001, [3.0, 2.0, 1.0], 0.5)
    b = make_run(tmp_path / '<warm>', 0.002, [3.0, 1.5], 0.75, note='a & b')
    assert compare.main([str(a), str(b), f'--out={tmp_path}/out/page.html']) == 0
    assert capsys.readouterr().out == f'{tmp_path}/out/page.html\n'
    text = (tmp_path / 'out' / 'page.html').read_text()
    page = Cells(text)
    assert ['pretrain.optimizer.lr', '0.001', '0.002'] in page.rows
    assert ['pretrain.note', '—', '"a & b"'] in page.rows
    assert not any('seed' in row[0] or 'name' in row[0] for row in page.rows if row), 'what is the same is left out'
    assert ['pretrain: color: accuracy', '0.5', '0.75', '+0.25'] in page.rows
    assert ['loss', '1 at 3', '1.5 at 2'] in page.rows
    assert text.count('<svg') == 2 and '<warm>' not in text
    assert not {'script', 'link', 'img'} & {tag for tag, _ in page.tags}
    assert not any('http' in str(value) for _, attributes in page.tags for value in attributes.values())


def test_a_run_that_has_only_begun(tmp_path):
    a, b = make_run(tmp_path / 'a', 0.1, [1.0]), make_run(tmp_path / 'b', 0.1, [])
    comparison.write(tmp_path / 'page.html', a, b)
    text = (tmp_path / 'page.html').read_text()
    assert ['loss', '1 at 1', '—'] in Cells(text).rows


def test_differences():
    assert list(comparison.differences({'a': {'b': 1, 'c': 2}}, {'a': {'b': 1, 'd': [3]}})) == [
        ('a.c', 2, None),
        ('a.d', None, [3]),
    ]


@pytest.mark.parametrize('make', [False, True])
def test_no_run_is_one_line(tmp_path, capsys, make):
    a = make_run(tmp_path / 'a', 0.1, [1.0])
    if make:
        (tmp_path / 'b').mkdir()
        (tmp_path / 'b' / 'config.json').write_text('{')
    assert compare.main([str(a), str(tmp_path / 'b')]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: {tmp_path}/b is no working directory')


@pytest.mark.parametrize(
    ('file', 'text'),
    [
        ('evals.json', '{"color": {'),
        ('evals.json', '{"color": {"accuracy": {}}}'),
        ('metrics.csv', 'step,loss\n1,abc\n'),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, capsys, file, text):
    a, b = make_run(tmp_path / 'a', 0.1, [1.0]), make_run(tmp_path / 'b', 0.1, [1.0])
    (b / 'pretrain' / file).write_text(text)
    assert compare.main([str(a), str(b)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: {b}/pretrain/{file} is damaged: ')
