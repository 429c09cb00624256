"""A picture that cannot be read: replaced and counted in training, named in evaluation."""

import logging

import jax
import micro_config
import numpy as np
import pytest

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.data import sources
from big_vlm.reports.writers import read_csv
from big_vlm.sharding import mesh as meshes
from big_vlm.training import stages

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

    def original(self, index):
        return index


@pytest.fixture
def damaged(monkeypatch):
    load = sources.load
    monkeypatch.setattr(sources, 'load', lambda *args: Damaged(load(*args)))


def train(data_dir, workdir, **changes):
    raw = micro_config.pretrain(data_dir, steps=12) | {'evals': {}} | changes
    made = config.validate(raw)
    tokenizer = stages._tokenizers(workdir, made)['train']
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    stages.run_stage('train', made['train'], workdir / 'train', tokenizer, {}, mesh=mesh)
    return read_csv(workdir / 'train' / 'metrics.csv')


def test_training_replaces_and_counts_it(damaged, tiny_digit_scenes, tmp_path, caplog):
    """12 batches of 8 are one epoch of the 96 scenes: each bad one comes up once."""
    with caplog.at_level(logging.WARNING):
        table = train(tiny_digit_scenes, tmp_path)
    counts = [count for _, count in table['images_replaced']]
    assert counts == sorted(counts) and counts[-1] >= len(BAD)
    assert np.isfinite([loss for _, loss in table['loss']]).all()
    for index in BAD:
        assert f'data.sources.captions: record {index} replaced' in caplog.text


def test_evaluation_names_it(damaged, tiny_digit_scenes, tmp_path):
    evals = {
        'pairs': {**micro_config.SCENES, 'kind': 'retrieval', 'pipeline': 'decode | resize(32)', 'label': 'caption'}
    }
    with pytest.raises(UserError, match=r'evals\.pairs: .*validation: record 3 failed in evaluation'):
        train(tiny_digit_scenes, tmp_path, evals=evals)
    assert not (tmp_path / 'train' / 'checkpoints').exists(), 'before the first step'
