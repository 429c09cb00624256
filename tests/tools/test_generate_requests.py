"""Files of requests: what is wrong with one is said in its place, and whatever is stopped goes on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import big_vlm
from big_vlm import bundle
from big_vlm.bundle import requests
from big_vlm.config import UserError
from tools import generate

ROOT = pathlib.Path(__file__).parents[2]
COUNT = 24
# Programs that are started in the background are born deaf to Ctrl-C.
HEARS = (
    'import signal, sys; from tools import generate; '
    'signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(generate.main())'
)


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
    """A folder of pictures, and a file of requests elsewhere."""
    folder = tmp_path_factory.mktemp('requests')
    (folder / 'photos' / 'deep').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ('a.png', 'deep/b.png'):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / 'photos' / name)
    prompts = ('caption en', 'detect red three', 'how many digits are there?', 'ocr')
    records = [{'image': ('a.png', 'deep/b.png')[i % 2], 'prompt': prompts[i % 4]} for i in range(COUNT)]
    (folder / 'asked.jsonl').write_text('\n'.join(map(json.dumps, records)) + '\n\n')
    return folder


def words(micro_run, asked, out, *more):
    where = [f'--requests={asked / "asked.jsonl"}', f'--images={asked / "photos"}', f'--out={out}']
    return [str(micro_run / 'multimodal' / 'bundle'), *where, '--max_new_tokens=3', '--temperature=1', *more]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line]


@pytest.fixture(scope='module')
def whole(micro_run, asked, tmp_path_factory):
    """The answers of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp('answers') / 'whole.jsonl'
    assert generate.main(words(micro_run, asked, out, '--batch_size=4')) == 0
    return out


def test_every_request_is_answered_in_order(micro_run, asked, whole):
    given = rows(asked / 'asked.jsonl')[:COUNT]
    said = rows(whole)
    assert [{key: row[key] for key in ('image', 'prompt')} for row in said] == given
    assert [row['line'] for row in said] == list(range(1, COUNT + 1))
    model = big_vlm.load(micro_run / 'multimodal' / 'bundle')
    images = [asked / 'photos' / record['image'] for record in given]
    expected = model.generate(images, [r['prompt'] for r in given], max_new_tokens=3, temperature=1, batch_size=4)
    assert [row['ids'] for row in said] == [answer.ids for answer in expected]


@pytest.mark.slow
def test_stopped_and_started_again_it_ends_as_if_nothing_had_happened(micro_run, asked, whole, tmp_path):
    """By Ctrl-C, then without a warning, in the middle of a line."""
    out, done = tmp_path / 'answers.jsonl', 0
    command = [sys.executable, '-c', HEARS, *words(micro_run, asked, out, '--batch_size=1')]
    for stop, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before, least = out.read_bytes() if out.exists() else b'', done + 3
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            if out.exists() and out.read_bytes().count(b'\n') >= least:
                process.send_signal(stop)
                break
            time.sleep(0.002)
        said = process.communicate()[1]
        assert process.returncode == status and 'Traceback' not in said, said
        if stop is signal.SIGINT:
            assert f'of {COUNT}; the same command goes on' in said.splitlines()[-1], said
        assert out.read_bytes().startswith(before)
        done = out.read_bytes().count(b'\n')
        assert least <= done < COUNT
    first = out.read_bytes()
    first = first[: first.rfind(b'\n') + 1]
    with open(out, 'ab') as file:
        file.write(b'{"line": 99, "ima')  # as if it had been killed in the middle of a line
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f'answers {done}/{COUNT} ' in again.stderr.splitlines()[0] and f'{COUNT} answers' in again.stderr
    assert out.read_bytes().startswith(first)
    assert [row['ids'] for row in rows(out)] == [row['ids'] for row in rows(whole)]


def test_what_is_wrong_with_a_request_is_said_in_its_place(micro_run, asked, tmp_path, capsys):
    lines = [
        '{"image": "a.png", "prompt": "ocr"}',
        '{"image": "a.png", "prompt": ',
        '{"image": "none.png", "prompt": "ocr"}',
        '',
        '{"image": "../asked.jsonl", "prompt": "ocr"}',
        '{"image": "a.png"}',
        '{"prompt": "ocr"}',
        '{"image": "text.png", "prompt": "ocr"}',
        '{"image": "a.png", "prompt": " "}',
        json.dumps({'image': 'a.png', 'prompt': 'red three ' * 40}),
        '[1]',
        '{"image": "a.png", "prompt": "\\ud800"}',
        '{"image": "deep/b.png", "prompt": "ocr"}',
    ]
    (tmp_path / 'asked.jsonl').write_text('\n'.join(lines))
    (tmp_path / 'photos' / 'deep').mkdir(parents=True)
    for name in ('a.png', 'deep/b.png'):
        (tmp_path / 'photos' / name).write_bytes((asked / 'photos' / name).read_bytes())
    (tmp_path / 'photos' / 'text.png').write_text('no picture')
    out = tmp_path / 'out' / 'answers.jsonl'
    for _ in range(2):  # an error is an answer too: it is not tried again
        assert generate.main(words(micro_run, tmp_path, out)) == 1
        assert '2 answers, 10 errors' in capsys.readouterr().err
    said = rows(out)
    assert [row['line'] for row in said] == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    errors = [row.get('error', '') for row in said]
    for error, message in zip(
        errors,
        [
            '',
            'not JSON',
            'none.png',
            'not below',
            "no text in 'prompt'",
            "line 7: no 'image', and this model answers about one",
            'text.png',
            'empty',
            '32',
            'object',
            'half',
            '',
        ],
        strict=True,
    ):
        assert message in error and bool(message) == bool(error), error
    model = big_vlm.load(micro_run / 'multimodal' / 'bundle')
    for row, place in ((said[0], 0), (said[-1], 11)):
        ask = model.generate_each(
            tmp_path / 'photos' / row['image'], 'ocr', max_new_tokens=3, temperature=1, first=place
        )
        assert [answer.ids for answer in ask] == [row['ids']]


def test_other_requests_and_other_settings_do_not_go_on(micro_run, asked, whole, tmp_path, monkeypatch, capsys):
    model = big_vlm.load(micro_run / 'multimodal' / 'bundle')
    monkeypatch.setattr(generate, 'load', lambda *_: model)
    monkeypatch.chdir(asked)
    out, beside = tmp_path / 'answers.jsonl', tmp_path / 'answers.jsonl.settings.json'
    out.write_bytes(whole.read_bytes())
    beside.write_bytes(whole.with_name(f'{whole.name}.settings.json').read_bytes())
    assert generate.main(words(micro_run, asked, out, '--batch_size=2', '--images=photos')) == 0  # nothing to do
    assert out.read_bytes() == whole.read_bytes()
    for other in ('--seed=1', '--images=.'):
        assert generate.main(words(micro_run, asked, out, other)) == 2
        assert 'begun with other settings' in capsys.readouterr().err
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(''.join([lines[1], lines[0], *lines[2:]]))
    assert generate.main(words(micro_run, asked, out)) == 2
    assert 'answers.jsonl:1 does not answer request 1' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (None, 'config.json holds no answers'),
        ('{}', 'config.json:1 does not answer request 1'),
        ('{"seed": 1}', 'other settings'),
    ],
)
def test_what_is_no_answers_is_left_as_it_is(tmp_path, settings, message):
    out = tmp_path / 'config.json'
    out.write_text('{"width": 64}\n{"depth": 2}')
    if settings:
        (tmp_path / 'config.json.settings.json').write_text(settings)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        requests.finished([requests.Request({'line': 1})], out, {})
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--requests={0}/asked.jsonl'], '--out=OUT.jsonl is missing'),
        (['--requests={0}/asked.jsonl', '--out=o.jsonl', '--prompt=ocr'], '--prompt does not go with --requests'),
        (['--requests={0}/asked.jsonl', '--out=o.jsonl', '--images={0}/none'], 'none: no such folder'),
        (['--requests={0}/none.jsonl', '--out=o.jsonl'], 'cannot read'),
        (['--out=o.jsonl', '--prompt=ocr', '--image=a.png'], 'go with --requests'),
    ],
)
def test_mistakes(asked, arguments, message, capsys):
    assert generate.main(['BUNDLE', *(word.format(asked) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and err.startswith('error: ') and err.count('\n') == 1


def test_choices_and_grammar_reach_the_model(micro_run, asked, tmp_path, capsys):
    model, picture = str(micro_run / 'multimodal' / 'bundle'), f'--image={asked / "photos" / "a.png"}'
    assert generate.main([model, picture, '--prompt=ocr', '--prompt=caption en', '--choices=red,blue', '--json']) == 0
    assert {json.loads(line)['text'] for line in capsys.readouterr().out.splitlines()} <= {'red', 'blue'}
    assert generate.main([model, picture, '--prompt=ocr', '--grammar=boxs']) == 2
    assert "did you mean 'boxes'" in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / 'folder').mkdir()
    with pytest.raises(UserError, match='cannot write .*folder'):
        list(requests.answer(None, [requests.Request({'line': 1}, error='x')], tmp_path / 'folder', {}))
    assert bundle.requests is requests and os.listdir(tmp_path / 'folder') == []
