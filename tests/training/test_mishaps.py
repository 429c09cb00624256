"""What goes wrong on the way: a full disk, a picture that cannot be read."""

import itertools
import logging
import re
from types import SimpleNamespace

import jax
import micro_config
import micro_run as runs
import numpy as np
import pytest

from big_vlm import config
from big_vlm.data import loader, sources
from big_vlm.reports.writers import read_csv
from big_vlm.sharding import mesh as meshes
from big_vlm.training import evaluation, stages, tokenizers

BAD = (3, 17, 40, 66)


class Damaged:
    """A split some of whose pictures were cut off on their way."""

    def __init__(self, source):
        self.name, self.features, self._source = source.name, source.features, source

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        record = dict(self._source[index])
        return record | ({'image': record['image'][:100]} if index in BAD else {})

    def __getitems__(self, indices):
        return [self[index] for index in indices]

    def original(self, index):
        return index


@pytest.fixture
def damaged(monkeypatch):
    load = sources.load
    monkeypatch.setattr(sources, 'load', lambda *args: Damaged(load(*args)))


def prepare(data_dir, workdir, **changes):
    workdir.mkdir(exist_ok=True)
    raw = micro_config.pretrain(data_dir, steps=12) | {'evals': {}} | changes
    made = config.validate(raw)
    return made['train'], tokenizers.make(workdir, made)['train']


def train(data_dir, workdir, **changes):
    stage, tokenizer = prepare(data_dir, workdir, **changes)
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    stages.run_stage('train', stage, workdir / 'train', tokenizer, {}, mesh=mesh)
    return read_csv(workdir / 'train' / 'metrics.csv')


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while(tiny_digit_scenes, tmp_path, monkeypatch, file_limit, capsys):
    """From the sixth batch to the ninth nothing can be written: no checkpoint, no row, no score, no event."""
    draw, number = loader.Batches.__next__, itertools.count(1)

    def filling(self):
        n = next(number)
        file_limit(0 if 6 <= n < 10 else -1)
        return draw(self)

    monkeypatch.setattr(loader.Batches, '__next__', filling)
    scored = dict(
        micro_config.SCENES, kind='retrieval', pipeline='decode | resize(32)', label='caption', examples=16, every=4
    )
    table = train(tiny_digit_scenes, tmp_path, evals={'pairs': scored})
    assert [step for step, _ in table['loss']] == list(range(1, 13))
    assert [step for step, _ in table['pairs/image_to_text/R@1']] == [4, 8, 12]
    last = table['pairs/image_to_text/R@1'][-1][1]
    assert runs.scores(tmp_path, 'train')['pairs']['image_to_text/R@1']['score'] == last
    assert (tmp_path / 'train' / 'bundle' / 'bundle.json').is_file()
    told = capsys.readouterr().err
    for what in ('metrics.csv', 'evals.json', 'checkpoint'):
        assert re.search(rf'{what}.* not written: .*The run goes on', told), told


@pytest.mark.slow
def test_training_replaces_and_counts_it(damaged, tiny_digit_scenes, tmp_path, caplog):
    """12 batches of 8 are one epoch of the 96 scenes: each bad one comes up once."""
    with caplog.at_level(logging.WARNING):
        table = train(tiny_digit_scenes, tmp_path)
    counts = [count for _, count in table['images_replaced']]
    assert counts == sorted(counts) and counts[-1] >= len(BAD)
    assert np.isfinite([loss for _, loss in table['loss']]).all()
    for index in BAD:
        assert f'data.sources.captions: record {index} replaced' in caplog.text


def test_evaluation_leaves_it_out(damaged, tiny_digit_scenes, tmp_path, caplog, capsys):
    """Named, and counted beside the scores of the others. Embeddings are a few numbers of what there is."""
    shared = {**micro_config.SCENES, 'pipeline': 'decode | resize(32) | first("objects/color", "color")'}
    evals = {
        'pairs': {**shared, 'kind': 'retrieval', 'label': 'caption'},
        'probe': {**shared, 'kind': 'linear_probe', 'label': 'color', 'fit_split': 'train', 'shots': 9},
    }
    stage, tokenizer = prepare(tiny_digit_scenes, tmp_path, evals=evals)
    with caplog.at_level(logging.WARNING):
        stages.rehearse(stage, tokenizer, 'config')
    assert 'validation: record 3 left out: cannot decode' in caplog.text
    embed = {
        f'embed_{kind}': lambda params, batch, kind=kind: batch[kind].reshape(8, -1)[:, :9] * params
        for kind in ('image', 'text')
    }
    contract, mesh = stages.make_contract(stage, tokenizer), meshes.make_mesh(devices=jax.devices()[:1])
    evaluator = evaluation.Evaluator(stage, SimpleNamespace(predict=embed), contract, tokenizer, mesh)
    pairs, probe = evaluator('pairs', 1.0), evaluator('probe', 1.0)
    assert [entry['unreadable'] for entry in pairs.values()] == [2] * len(pairs)
    assert probe['accuracy']['n'] == 30 and probe['accuracy']['unreadable'] == len(BAD) + 2
    few = evaluator.batches(stage.evals['pairs'], 6)  # as a report draws
    assert [record['caption'] for _, records in few for record in records]
    said = capsys.readouterr().out
    assert 'pairs  2 records left out: unreadable\n' in said and 'probe  6 records left out: unreadable\n' in said
