"""What the inspector shows of a batch is the batch; what it refuses was planted."""

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import small_bundle
from PIL import Image

from big_vlm import config
from big_vlm.checks import inspector
from big_vlm.data import loader, naflex, operations
from big_vlm.reports import inspection
from big_vlm.training import stages
from tools.inspect import __main__ as tool

SIZE, TEXT = small_bundle.SIZE, small_bundle.TEXT
ROW = 'prefix("{prefix}") | suffix("{suffix}") | tokenize'


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return small_bundle.train_tokenizer(tmp_path_factory.mktemp('tokenizer'))


def raw(data_dir, pipelines, task='generative', dataset='digit_scenes/cells_tiny', batch_size=6, **contract):
    made = copy.deepcopy(small_bundle.GENERATIVE if task == 'generative' else small_bundle.CONTRASTIVE)
    looks = f'decode | naflex({contract["max_patches"]})' if 'max_patches' in contract else f'decode | resize({SIZE})'
    sources = {name: dict(dataset=dataset, pipeline=f'{looks} | {rest}') for name, rest in pipelines.items()}
    made |= dict(data=dict(data_dir=str(data_dir), sources=sources), batch_size=batch_size)
    made['contract'] |= contract
    if 'max_patches' in contract:
        del made['contract']['image_size']
    return made


def oracle(arrays):
    """The rule of docs/design.md, pair by pair."""
    segment, block = arrays['segment'], np.cumsum(arrays['mask_ar'])
    count = len(segment)
    sees = np.zeros((count, count), bool)
    for q, k in np.ndindex(count, count):
        sees[q, k] = segment[q] and segment[k] in (segment[q], -1) and block[k] <= block[q]
    return sees


class Spans(HTMLParser):
    """(kind, carries loss, text) of the tokens of every row."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.kind, self.images = [], '', []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get('class') == 'toks':
            self.rows.append([])
        if tag == 'img':
            self.images.append(attributes['src'])
        self.kind = attributes.get('class', '') if tag == 'span' else ''

    def handle_endtag(self, tag):
        self.kind = ''

    def handle_data(self, data):
        if self.kind.startswith('tok ') and self.rows:
            _, kind, *loss = self.kind.split()
            self.rows[-1].append((kind, bool(loss), data))


@pytest.mark.parametrize(
    ('pipelines', 'contract'),
    [
        ({'caption': 'prefix("caption en") | suffix("{caption}") | tokenize', 'ask': 'question | tokenize'}, {}),
        ({'talk': 'prefix("ocr") | suffix("{reading}") | also | dialogue(2) | tokenize'}, {}),
        ({'talk': 'prefix("ocr") | suffix("{reading}") | also | dialogue(2) | tokenize'}, {'image_alone': True}),
        ({'talk': 'prefix("ocr") | suffix("{reading}") | also | dialogue(2) | tokenize'}, {'causal_prompt': True}),
        ({'ask': 'question | tokenize'}, {'max_patches': 6}),
    ],
    ids=['plain', 'dialogue', 'image alone', 'causal prompt', 'naflex'],
)
def test_what_is_shown_is_the_batch(pipelines, contract, tokenizer, tiny_digit_scenes):
    stage = config.parse_stage(raw(tiny_digit_scenes, pipelines, text_length=64, **contract))
    found = inspector.inspect(stage, tokenizer, batches=1)
    assert found.problems == []
    made = stages.make_contract(stage, tokenizer)
    batch = loader.train_batches(stage.data, made, tokenizer, stage.batch_size, stage.seed)[0]
    names = list(stage.data.sources)
    assert {row.source for row in found.rows} == set(names) and len(found.rows) == stage.batch_size
    turns = 0
    for row in found.rows:
        [at, *_] = np.flatnonzero((batch['id'] == [names.index(row.source), row.record]).all(axis=1))
        arrays = {key: value[at] for key, value in batch.items()}
        slots = [token.slots for token in row.tokens]
        spread = {name: np.repeat([getattr(t, name) for t in row.tokens], slots) for name in ('kind', 'loss')}
        np.testing.assert_array_equal(spread['loss'].astype(np.float32), arrays['mask_loss'])
        np.testing.assert_array_equal(np.repeat(np.repeat(row.sees, slots, 0), slots, 1), oracle(arrays))
        np.testing.assert_array_equal(spread['kind'] == 'padding', arrays['segment'] == 0)
        np.testing.assert_array_equal(spread['kind'] == 'image', (arrays['text'] < 0) & (arrays['segment'] != 0))
        np.testing.assert_array_equal(spread['kind'] == 'suffix', arrays['mask_loss'] > 0)
        said = [tokenizer.piece(int(i)) for i, s in zip(arrays['text'], arrays['segment'], strict=True) if i >= 0 and s]
        assert [token.text for token in row.tokens if token.kind in ('prefix', 'suffix')] == said
        turns = max(turns, said.count('</s>'))
        shown = naflex.picture(arrays['patches'], arrays['patch_grid']) if 'patches' in arrays else arrays['image'][0]
        np.testing.assert_array_equal(row.images[0], shown)
    assert turns == (3 if 'talk' in pipelines else 1)
    page = Spans(inspection.render(found))
    told = [[(t.kind, t.loss > 0, inspection.spelt(t)) for t in row.tokens] for row in found.rows]
    assert page.rows == told and len(page.images) == len(told)


@pytest.mark.parametrize('tower', [{'mask': True}, {'causal': True}, {'kind': 'bag'}], ids=str)
def test_a_dual_encoders_text(tower, tokenizer, tiny_digit_scenes):
    """Cut texts are counted and shown, not refused: SigLIP's are cut."""
    made = raw(tiny_digit_scenes, {'captions': 'text("caption")'}, 'contrastive', text_length=6)
    made['model']['text'] = made['model']['text'] | tower
    found = inspector.inspect(config.parse_stage(made), tokenizer, batches=1)
    assert found.problems == []
    assert (found.counts['captions'].cut, found.counts['captions'].texts) == (6, 6) and len(found.worst) == 5
    first, row = found.worst[0], found.rows[0]
    whole = tokenizer.encode(first.kept + first.left_out)
    assert (first.length, first.lost) == (len(whole), len(whole) - 5)
    assert [token.kind for token in row.tokens] == ['text'] * 6
    if 'kind' in tower:
        assert row.sees is None
    else:
        np.testing.assert_array_equal(row.sees, np.tri(6, dtype=bool) if 'causal' in tower else np.ones((6, 6), bool))


def lines(folder, records, name='mine.jsonl'):
    Image.new('RGB', (SIZE, SIZE), 'red').save(folder / 'a.png')
    (folder / name).write_text('\n'.join(json.dumps({'image': 'a.png'} | record) for record in records))


@pytest.fixture
def inspect(tmp_path, tokenizer, capsys):
    """Runs the tool on these records: (exit code, what it said on stderr, lines of stdout)."""

    def run(records, *flags, pipeline=ROW, **settings):
        name = f'{len(list(tmp_path.iterdir()))}.jsonl'  # a file is read once, whatever becomes of it
        lines(tmp_path, records, name)
        stage = raw(tmp_path, {'mine': pipeline}, dataset=name, batch_size=len(records), **settings)
        stage['tokenizer'] = {'path': tokenizer.path}
        (tmp_path / 'run.py').write_text(f'def get_config():\n    return {stage!r}\n')
        code = tool.main([f'--config={tmp_path}/run.py', f'--out={tmp_path}/out', '--batches=1', *flags])
        said = capsys.readouterr()
        return code, said.err, said.out.splitlines()

    return run


GOOD = [dict(prefix='caption en', suffix='red three'), dict(prefix='is it red or blue?', suffix='red')] * 4


def test_a_good_config_passes(inspect, tmp_path):
    before = set(tmp_path.iterdir())
    code, error, [line] = inspect(GOOD)
    assert (code, error) == (0, '') and line.startswith('train: 1 batches of 8, 8 examples; ')
    made = {path.name for path in set(tmp_path.iterdir()) - before}
    assert made == {'a.png', '0.jsonl', 'run.py', 'out'}, 'no workdir is left'
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['train.html', 'train.png']
    with Image.open(tmp_path / 'out' / 'train.png') as sheet:
        colors = {color for _, color in sheet.convert('RGB').getcolors(2**20)}
    assert {(224, 138, 30), (47, 127, 208), (255, 0, 0)} <= colors  # suffix, prefix, the picture
    text = (tmp_path / 'out' / 'train.html').read_text()
    assert 'http' not in text and '<script' not in text


@pytest.mark.parametrize('causal', [False, True])
def test_an_answer_in_its_prompt_is_refused(causal, inspect, tmp_path):
    leak = dict(prefix='caption: a red three on top', suffix='a red three on top')
    code, error, _ = inspect([*GOOD, leak], text_length=64, causal_prompt=causal)
    assert code == 2 and error.count('\n') == 1
    assert error.startswith("error: config.data.sources.mine: record 8: the answer 'a red three on top' stands in its")
    assert 'where it is seen without loss' in (tmp_path / 'out' / 'train.html').read_text()


def test_an_answer_that_a_template_repeats_is_refused(inspect):
    records = [dict(prefix=f'number {i}?', suffix=color) for i, color in enumerate(['red', 'blue'] * 5)]
    assert inspect(records)[0] == 0
    pipeline = 'prefix("{prefix} {suffix}") | suffix("{suffix}") | tokenize'
    code, error, _ = inspect(records, pipeline=pipeline)
    assert code == 2 and re.search(r"record (\d): the answer '(\w+)' stands in its prompt 'number \1\? \2'", error)


def test_a_row_without_loss_is_refused(inspect, monkeypatch):
    real = operations.prompts.generative_row

    def masked(prefix, suffix, *rest):
        row = real(prefix, suffix, *rest)
        return row | {'mask_loss': row['mask_loss'] * (len(suffix) > 2)}

    monkeypatch.setattr(operations.prompts, 'generative_row', masked)
    # Of the answers 'seven' and ' three …' one is short; the longer one keeps its loss.
    code, error, _ = inspect([dict(prefix='which?', suffix=suffix) for suffix in ('red three in the top left', 'red')])
    assert code == 2
    assert error.startswith('error: config.data.sources.mine: record 1: no token of its row carries loss')


def test_answers_that_are_cut(inspect, tokenizer, tmp_path):
    """One of a hundred is told, two are refused."""
    long = dict(prefix='caption en', suffix=' three in the top left' * 8)
    length, given = len(tokenizer.encode(long['suffix'])) + 1, len(tokenizer.encode('caption en')) + 2
    short = dict(prefix='caption en', suffix='red')
    code, error, _ = inspect([long] + [short] * 99)
    assert (code, error) == (0, '')
    lost = length - (TEXT - given)
    assert f'{lost} of {length} tokens cut' in (tmp_path / 'out' / 'train.html').read_text()
    told = f'its answer loses {lost} of {length} tokens, and 2 of 100 answers (2.0%) are cut'
    for causal in (False, True):
        code, error, _ = inspect([short, long, short, long] + [short] * 96, causal_prompt=causal)
        assert code == 2
        assert f'record 1: {told}' in error or f'record 3: {told}' in error
        assert f'to {TEXT + lost} for all of them' in error
    assert inspect([long] * 3, text_length=TEXT + lost)[0] == 0


def test_prompts_that_do_not_fit_are_counted(inspect, tmp_path):
    code, error, _ = inspect([dict(prefix='which? ' * 30, suffix='red'), *GOOD])
    assert (code, error) == (0, '')
    text = (tmp_path / 'out' / 'train.html').read_text()
    assert 'the prompt takes' in text and 'in the place of record 0' in text


def test_a_decoder_alone_has_no_pictures(tmp_path, tokenizer, capsys):
    lines(tmp_path, [{'caption': f'a red {name} of {n}'} for n in range(9) for name in ('three', 'seven')])
    stage = raw(tmp_path, {'mine': 'prefix("caption en") | suffix("{caption}") | tokenize'}, dataset='mine.jsonl')
    stage['model'] = {'projector': 'none', 'decoder': stage['model']['decoder']}
    stage['tokenizer'] = {'vocab_size': 300}
    (tmp_path / 'run.py').write_text(f'def get_config():\n    return {stage!r}\n')
    assert tool.main([f'--config={tmp_path}/run.py', f'--out={tmp_path}/out', '--batches=1']) == 0
    page = Spans((tmp_path / 'out' / 'train.html').read_text())
    assert len(page.rows) == 6 and not page.images


def test_a_tokenizer_stays_where_it_is_asked_for(tmp_path, capsys, tokenizer):
    lines(tmp_path, GOOD)
    stage = raw(tmp_path, {'mine': ROW}, dataset='mine.jsonl', text_length=64)
    stage['tokenizer'] = {'vocab_size': 300}
    (tmp_path / 'run.py').write_text(f'def get_config():\n    return {stage!r}\n')
    asked = [f'--config={tmp_path}/run.py', f'--out={tmp_path}/out', '--batches=1']
    assert tool.main(asked) == 0 and not list(tmp_path.rglob('tokenizer.model'))
    assert tool.main([*asked, f'--workdir={tmp_path}/run']) == 0
    assert (tmp_path / 'run' / 'tokenizer.model').is_file()


@pytest.mark.parametrize(
    ('flags', 'pipeline', 'message'),
    [
        (['--stage=trian'], ROW, "unknown stage 'trian' (--stage): did you mean 'train'?"),
        (['--batches=0'], ROW, '--batches=0: must be at least 1'),
        ([], 'prefix("{prefx}") | suffix("x") | tokenize', "unknown field 'prefx'"),
        ([], 'text("prefix")', 'makes no mask_loss, which a generative model takes: add tokenize'),
        (['--out={}/run.py'], ROW, 'train.html: not written: '),
    ],
)
def test_mistakes_are_one_line(inspect, tmp_path, flags, pipeline, message):
    code, error, _ = inspect(GOOD, *[flag.format(tmp_path) for flag in flags], pipeline=pipeline)
    assert code == 2 and error.count('\n') == 1 and message in error
