"""A batch is a function of config, seed and step: whoever loads it, from wherever, with whatever goes wrong."""

import dataclasses
import io
import itertools
import logging

import numpy as np
import pytest
import tensorflow_datasets as tfds

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.data import eval_loader, fields, images, loader, sources, transforms
from big_vlm.data.contract import Contract
from big_vlm.data.failures import Failures
from big_vlm.data.tokenizer import Tokenizer

CAPTIONS = "decode | resize(32) | prefix('caption en') | suffix('{caption}') | tokenize"
QUESTIONS = 'decode | resize(32) | question | tokenize'
UNTOUCHED = {'replaced': np.zeros(4, bool), 'cut': np.zeros(4, bool)}  # what the iterator keeps of a batch of 4


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory, tiny_digit_scenes) -> Tokenizer:
    texts = loader.training_texts(mixture(tiny_digit_scenes))
    return Tokenizer.train(texts, 420, tmp_path_factory.mktemp('t') / 't.model')


@pytest.fixture(scope='module')
def contract(tokenizer) -> Contract:
    return Contract.make(config.Contract(image_size=32, text_length=80), tokenizer, image_tokens=4)


def mixture(data_dir: str, **changes) -> config.Data:
    return config.Data(
        sources={
            'captions': config.Source(dataset='digit_scenes/cells_tiny', pipeline=CAPTIONS),
            'questions': config.Source(dataset='digit_scenes/free_tiny', pipeline=QUESTIONS, weight=3.0),
        }
        | changes,
        data_dir=data_dir,
    )


def one(data_dir: str, pipeline: str = "decode | resize(32) | text('caption')", split: str = 'train') -> config.Data:
    source = config.Source(dataset='digit_scenes/cells_tiny', split=split, pipeline=pipeline)
    return config.Data(sources={'only': source}, data_dir=data_dir)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.smoke
def test_a_batch_of_each_task(tiny_digit_scenes, tokenizer, contract):
    batch = loader.train_batches(mixture(tiny_digit_scenes), contract, tokenizer, 8, seed=0)[0]
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    row = ((8, 84), 'int32')
    assert shapes == {
        'image': ((8, 1, 32, 32, 3), 'uint8'),
        'image_mask': ((8, 1), 'bool'),
        **{key: row for key in ('text', 'segment', 'position', 'mask_ar')},
        'mask_loss': (row[0], 'float32'),
        'id': ((8, 2), 'int32'),
        'replaced': ((8,), 'bool'),
        'cut': ((8,), 'bool'),
    }
    batch = loader.train_batches(one(tiny_digit_scenes), contract, tokenizer, 8, seed=0)[0]
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        'image': ((8, 32, 32, 3), 'uint8'),
        'text': ((8, 80), 'int32'),
        'text_mask': ((8, 80), 'bool'),
        'id': ((8, 2), 'int32'),
        'replaced': ((8,), 'bool'),
    }


def test_ids_say_which_record_a_row_is(tiny_digit_scenes, tokenizer, contract):
    source = sources.load('digit_scenes/cells_tiny', 'train', tiny_digit_scenes)
    batch = loader.train_batches(one(tiny_digit_scenes), contract, tokenizer, 8, seed=0)[2]
    for row in range(8):
        record = source[batch['id'][row, 1]]
        assert tokenizer.decode(batch['text'][row]) == record['caption']
        expected = images.resize(images.decode(record['image']), 32, 'bilinear', True)
        assert np.array_equal(batch['image'][row], expected)


def test_batches_repeat_and_seeds_differ(tiny_digit_scenes, tokenizer, contract):
    data = mixture(tiny_digit_scenes)
    first, again, other = (loader.train_batches(data, contract, tokenizer, 8, seed) for seed in (1, 1, 2))
    for step in (5, 0, 1_000_000):
        assert same(first[step], again[step])
        assert not np.array_equal(first[step]['id'], other[step]['id'])


@pytest.mark.parametrize('count', [2, 4, 8])
def test_shards_put_together_are_the_whole_batch(tiny_digit_scenes, tokenizer, contract, count):
    data = mixture(tiny_digit_scenes)
    whole = loader.train_batches(data, contract, tokenizer, 8, seed=3)
    parts = [loader.train_batches(data, contract, tokenizer, 8, seed=3, shard=(i, count)) for i in range(count)]
    for step in (0, 7):
        loaded = [part[step] for part in parts]
        assert same({key: np.concatenate([p[key] for p in loaded]) for key in loaded[0]}, whole[step])


def test_a_batch_that_does_not_divide(tiny_digit_scenes, tokenizer, contract):
    with pytest.raises(UserError, match='batch_size 8 does not divide among 3 data shards'):
        loader.train_batches(mixture(tiny_digit_scenes), contract, tokenizer, 8, seed=0, shard=(0, 3))


def test_examples_of_each_source_are_counted(tiny_digit_scenes, tokenizer, contract):
    data = mixture(tiny_digit_scenes)
    ds = loader.train_batches(data, contract, tokenizer, 8, seed=0)
    names = loader.source_names(data)
    batches = loader.iterate(ds, names=names)
    ids = np.concatenate([next(batches)['id'][:, 0] for _ in range(3)])
    assert len(names) > 1 and batches.by_source == {
        **{f'examples_of_{name}': int((ids == n).sum()) for n, name in enumerate(names)},
        **{f'replaced_of_{name}': 0 for name in names},
    }
    assert not loader.iterate(ds, names=names[:1]).by_source


@pytest.mark.smoke
@pytest.mark.parametrize('threads', [1, 3])
def test_resuming_is_slicing(tiny_digit_scenes, tokenizer, contract, threads):
    ds = loader.train_batches(mixture(tiny_digit_scenes), contract, tokenizer, 4, seed=0)
    straight = loader.iterate(ds, 0, threads=threads)
    expected = [next(straight) for _ in range(7)]
    resumed = loader.iterate(ds, 4, threads=threads, prefetch=3)
    for step in range(4, 7):
        batch = next(resumed)
        assert same(batch, expected[step]) and not UNTOUCHED.keys() & batch.keys()
        assert same(batch | UNTOUCHED, ds[step])


def test_worker_processes_make_the_same_batches(tiny_digit_scenes, tokenizer, contract):
    ds = loader.train_batches(mixture(tiny_digit_scenes), contract, tokenizer, 4, seed=0)
    batches = loader.iterate(ds, 3, workers=1, prefetch=1)
    for step in (3, 4):
        assert same(next(batches) | UNTOUCHED, ds[step])


@pytest.mark.slow
def test_an_error_in_a_worker_process_reads_the_same(tiny_digit_scenes, tokenizer, contract):
    data = one(tiny_digit_scenes, "decode | text('captoin')")
    batches = loader.iterate(loader.train_batches(data, contract, tokenizer, 4, seed=0), workers=1)
    with pytest.raises(UserError, match="^data.sources.only: unknown field 'captoin'"):
        next(batches)


def test_an_epoch_holds_every_record_once_and_each_epoch_has_its_own_order(tiny_digit_scenes, tokenizer, contract):
    ds = loader.train_batches(one(tiny_digit_scenes), contract, tokenizer, 32, seed=0)
    epochs = [np.concatenate([ds[3 * epoch + k]['id'][:, 1] for k in range(3)]) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(96))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.arange(96))


def test_the_mixture_has_its_weights(tiny_digit_scenes, tokenizer, contract):
    ds = loader.train_batches(mixture(tiny_digit_scenes), contract, tokenizer, 16, seed=0)
    numbers = np.concatenate([ds[step]['id'][:, 0] for step in range(4)])
    assert abs((numbers == 1).mean() - 0.75) < 0.02


def test_a_record_seen_twice_gets_another_question(tiny_digit_scenes, tokenizer, contract):
    ds = loader.train_batches(one(tiny_digit_scenes, QUESTIONS), contract, tokenizer, 32, seed=0)
    prompts: dict[int, list] = {}
    for step in range(6):
        batch = ds[step]
        for row in range(32):
            prompts.setdefault(int(batch['id'][row, 1]), []).append(batch['text'][row].tolist())
    assert all(len(seen) == 2 for seen in prompts.values())
    assert sum(a != b for a, b in prompts.values()) > 60


class Damaged:
    """A source some of whose pictures are cut short, or whose records cannot be read at all."""

    def __init__(self, source, broken, unreadable=False):
        self.source, self.broken, self.name, self.features = source, set(broken), 'damaged', source.features
        self.unreadable = unreadable

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        record = self.source[index]
        if index in self.broken and self.unreadable:
            raise IndexError('no value')
        return record | {'image': record['image'][:100]} if index in self.broken else record

    def __getitems__(self, indices):
        return [self[index] for index in indices]

    def original(self, index):
        return index


@pytest.fixture
def damage(monkeypatch):
    def apply(broken, unreadable=False):
        load = sources.load
        monkeypatch.setattr(sources, 'load', lambda *names: Damaged(load(*names), broken, unreadable))

    return apply


@pytest.mark.parametrize('unreadable', [False, True])
def test_a_bad_picture_is_replaced_counted_and_named(
    tiny_digit_scenes, tokenizer, contract, damage, caplog, unreadable
):
    clean = loader.train_batches(one(tiny_digit_scenes), contract, tokenizer, 32, seed=0)
    damage([10, 50], unreadable)
    ds = loader.train_batches(one(tiny_digit_scenes), contract, tokenizer, 32, seed=0)
    with caplog.at_level(logging.WARNING):
        batches = [ds[step] for step in range(3)]
    replaced = 0
    for step, batch in enumerate(batches):
        before = clean[step]
        bad = np.isin(before['id'][:, 1], [10, 50])
        assert np.array_equal(batch['replaced'], bad)
        replaced += bad.sum()
        # The other rows are what they were.
        assert np.array_equal(batch['image'][~bad], before['image'][~bad])
        assert not np.isin(batch['id'][:, 1], [10, 50]).any()
    assert replaced == 2
    assert 'record 10 replaced' in caplog.text and 'record 50 replaced' in caplog.text
    # In whatever order and by whichever shard, the same records come in.
    again = loader.train_batches(one(tiny_digit_scenes), contract, tokenizer, 32, seed=0, shard=(1, 2))
    assert same(again[1], {key: value[16:] for key, value in batches[1].items()})
    iterator = loader.iterate(ds, 0)
    for _ in range(3):
        next(iterator)
    assert iterator.replaced == 2


def test_a_source_that_mostly_fails_stops_the_run(tiny_digit_scenes, tokenizer, contract, damage):
    damage(range(0, 96, 5))
    iterator = loader.iterate(loader.train_batches(one(tiny_digit_scenes), contract, tokenizer, 32, seed=0))
    with pytest.raises(UserError, match=r'data.sources.only: \d+ of \d+ examples failed, the last one, record \d+'):
        for _ in range(20):
            next(iterator)


def test_a_source_that_wholly_fails_stops_at_once(tiny_digit_scenes, tokenizer, contract, damage, monkeypatch):
    damage(range(96))
    ds = loader.train_batches(one(tiny_digit_scenes), contract, tokenizer, 4, seed=0)
    with pytest.raises(
        UserError, match='21 of 21 examples failed, the last one, record .*, with: cannot decode the image'
    ):
        ds[0]
    monkeypatch.setattr(loader, '_ATTEMPTS', 5)  # as where a disk goes away after many examples
    ds = loader.train_batches(one(tiny_digit_scenes), contract, tokenizer, 4, seed=0)
    with pytest.raises(UserError, match='5 records in a row failed, the last one with: cannot decode the image'):
        ds[0]


@pytest.mark.parametrize(
    ('pipeline', 'message'),
    [
        ("decode | text('captoin')", r"data.sources.only: unknown field 'captoin'.*did you mean 'caption'"),
        ("prefix('a')", 'the pipeline makes no arrays'),
        ("decode | resize(16) | text('caption')", 'contract.image_size is 32'),
        (
            "decode | central_crop(64) | text('caption')",
            r'\d+ of \d+ examples failed, .* a crop of 64 from 48×48 pixels',
        ),
        ("decode | resize(32) | text('questions/answer')", r'\d+ of \d+ examples failed, .* has several items'),
    ],
)
def test_a_wrong_pipeline_is_an_error_not_a_bad_example(tiny_digit_scenes, tokenizer, contract, pipeline, message):
    iterator = loader.iterate(loader.train_batches(one(tiny_digit_scenes, pipeline), contract, tokenizer, 4, seed=0))
    with pytest.raises(UserError, match=message):
        next(iterator)


def test_pipelines_that_do_not_go_together(tiny_digit_scenes, tokenizer, contract):
    other = config.Source(dataset='digit_scenes/cells_tiny', pipeline="decode | resize(32) | text('caption')")
    ds = loader.train_batches(mixture(tiny_digit_scenes, other=other), contract, tokenizer, 8, seed=0)
    with pytest.raises(UserError, match='the pipelines make different arrays'):
        ds[0]
    free = config.Source(dataset='digit_scenes/free_tiny', pipeline="decode | text('caption')")
    cells = config.Source(dataset='digit_scenes/cells_tiny', pipeline="decode | text('caption')")
    data = config.Data(sources={'a': free, 'b': cells}, data_dir=tiny_digit_scenes)
    with pytest.raises(UserError, match=r'image has shapes \[64, 64, 3\] and \[48, 48, 3\].*add resize'):
        loader.train_batches(data, contract, tokenizer, 8, seed=0)[0]


def test_where(tiny_digit_scenes, tokenizer, contract):
    settings = dataclasses.replace(one(tiny_digit_scenes).sources['only'], where={'num_digits': 2})
    data = dataclasses.replace(one(tiny_digit_scenes), sources={'only': settings})
    source = sources.load(settings.dataset, settings.split, data.data_dir)
    ids = loader.train_batches(data, contract, tokenizer, 8, seed=0)[1]['id']
    assert all(source[index]['num_digits'] == 2 for _, index in ids)
    assert loader.num_examples(data) == sum(record['num_digits'] == 2 for record in source) < len(source)


def test_no_sources(tokenizer, contract):
    with pytest.raises(UserError, match='data.sources is empty'):
        loader.train_batches(config.Data(), contract, tokenizer, 8, seed=0)


def test_examples_and_texts(tiny_digit_scenes):
    data = mixture(tiny_digit_scenes)
    assert loader.num_examples(data) == 192
    texts = list(loader.training_texts(data))
    captions = [r['caption'] for r in sources.load('digit_scenes/cells_tiny', 'train', tiny_digit_scenes)]
    assert texts[:192] == [text for caption in captions for text in ('caption en', caption)]
    assert 'how many digits are there?' in texts
    assert len(list(loader.training_texts(one(tiny_digit_scenes), records=10))) == 11  # every ninth of 96


def evaluation(tiny_digit_scenes, contract, tokenizer, pipeline=QUESTIONS, **options):
    source = sources.load('digit_scenes/cells_tiny', 'test', tiny_digit_scenes)
    parsed = transforms.parse(pipeline, where='evals.x.pipeline')
    return source, list(eval_loader.eval_batches(source, parsed, contract, tokenizer, **options))


def test_evaluation_sees_every_record_once_and_pads_the_last_batch(tiny_digit_scenes, tokenizer, contract):
    source, batches = evaluation(tiny_digit_scenes, contract, tokenizer, batch_size=12)
    assert [batch['_mask'].sum() for batch, _ in batches] == [12, 12, 8]
    assert all(len(value) == 12 for batch, _ in batches for value in batch.values())
    assert [len(records) for _, records in batches] == [12, 12, 8]
    records = [record for _, some in batches for record in some]
    assert [record['id'] for record in records] == [source[i]['id'] for i in range(32)]
    for record in records:
        pairs = list(zip(record['questions']['question'], record['questions']['answer'], strict=True))
        assert (record['prefix'], record['suffix']) in pairs
        assert not {'image', 'instances', 'text'} & record.keys()
    batch, _ = batches[-1]
    assert np.array_equal(batch['image'][8:], np.repeat(batch['image'][:1], 4, 0))
    assert batch['mask_loss'].sum() == 0
    prompt = [i for i in batch['text'][0] if i > 3 and i != 4]
    assert tokenizer.decode(prompt) == batches[-1][1][0]['prefix']


def test_evaluation_repeats_and_a_subset_asks_the_same_questions(tiny_digit_scenes, tokenizer, contract):
    source, batches = evaluation(tiny_digit_scenes, contract, tokenizer, batch_size=8)
    asked = {record['id']: record['prefix'] for _, records in batches for record in records}
    single = sources.subset(source, {'num_digits': 1})
    pipeline = transforms.parse(QUESTIONS, where='')
    for batch, records in eval_loader.eval_batches(single, pipeline, contract, tokenizer, 8):
        assert all(asked[record['id']] == record['prefix'] for record in records)
        assert all(source[i]['num_digits'] == 1 for i in batch['id'][batch['_mask'], 1])


def test_evaluation_of_the_first_examples(tiny_digit_scenes, tokenizer, contract):
    source, batches = evaluation(tiny_digit_scenes, contract, tokenizer, batch_size=8, examples=18)
    assert [record['id'] for _, records in batches for record in records] == [source[i]['id'] for i in range(18)]
    assert [batch['_mask'].sum() for batch, _ in batches] == [8, 8, 2]


def test_evaluation_leaves_bad_examples_out(tiny_digit_scenes, tokenizer, contract, caplog):
    """Also a whole batch of them: the others stay in their batches, and a tenth of the split is too much."""
    source = sources.load('digit_scenes/cells_tiny', 'test', tiny_digit_scenes)
    pipeline = transforms.parse("decode | resize(32) | text('caption')", where='')

    def batches(broken, **options):
        return eval_loader.eval_batches(Damaged(source, broken), pipeline, contract, tokenizer, 2, **options)

    failures = Failures('split', 'left out', 32)
    with caplog.at_level(logging.WARNING):
        made = list(batches([8, 9, 21], failures=failures))
    assert (failures.tried, failures.failed) == (32, 3)
    for index in (8, 9, 21):
        assert f'split: record {index} left out: cannot decode the image' in caplog.text
    expected = [pair for i, pair in enumerate(batches([])) if i != 4]
    assert [batch['_mask'].sum() for batch, _ in made] == [1 if i == 9 else 2 for i in range(15)]
    for i, ((batch, records), (whole, all_records)) in enumerate(zip(made, expected, strict=True)):
        assert [r['id'] for r in records] == [r['id'] for r in (all_records[:1] if i == 9 else all_records)]
        np.testing.assert_array_equal(batch['id'][0], whole['id'][0])
        np.testing.assert_array_equal(batch['image'][1], whole['image'][0 if i == 9 else 1])
    with pytest.raises(
        UserError, match='^damaged: 4 of 13 examples failed, the last one, record 12, with: cannot decod'
    ):
        list(batches(range(9, 13)))
    for failed, told in ([8], 'cannot decode the image'), ([], 'another process cannot read it'):  # here, there
        caplog.clear()
        failures, asked = Failures('split', 'left out', 32), itertools.count()

        def anywhere(failed, asked=asked):
            return failed | (np.array([True, False]) if next(asked) == 4 else False)

        there = batches(failed, failures=failures, anywhere=anywhere)
        assert [batch['_mask'].sum() for batch, _ in there] == [1 if i == 4 else 2 for i in range(16)]
        assert (failures.tried, failures.failed) == (32, 1) and f'record 8 left out: {told}' in caplog.text
    with pytest.raises(UserError, match=r"^damaged: unknown field 'captoin'.* \(record 0\)"):
        list(batches([], check=lambda record: fields.get(record, 'captoin')))


def test_of_the_first_hundred_examples_one_is_good():
    failures = Failures('split', 'left out', 50_000)
    for record in range(99):
        failures.bad(record, ValueError('too small'))
    with pytest.raises(UserError, match='split: 100 of 100 examples failed, the last one, record 99, with: too small'):
        failures.bad(99, ValueError('too small'))


def test_any_dataset_prepared_as_array_record(tmp_path, tokenizer, contract):
    """A dataset that is not ours, written by TFDS's own means and read by name."""
    from PIL import Image

    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(None, None, 3)),
                    'title': tfds.features.Text(),
                }
            )
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            return {'train': self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                buffer = io.BytesIO()
                Image.fromarray(np.full((20 + i, 30, 3), 40 * i, np.uint8)).save(buffer, 'png')
                yield i, {'image': buffer.getvalue(), 'title': f'Pet {i}'}

    Pets(data_dir=tmp_path, file_format='array_record').download_and_prepare()
    source = config.Source(dataset='pets', pipeline="decode | resize(32) | text('title')")
    data = config.Data(sources={'pets': source}, data_dir=str(tmp_path))
    batch = loader.train_batches(data, contract, tokenizer, 6, seed=0)[0]
    titles = [tokenizer.decode(text) for text in batch['text']]
    assert sorted(titles) == [f'pet {i}' for i in range(6)]
    assert [int(image.mean()) for image in batch['image']] == [40 * int(title[-1]) for title in titles]
