"""StableHLO: what another process reads back computes what the bundle does, at any batch size."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import big_vlm
from big_vlm.data import prompts
from big_vlm.data.images import prepare
from tools import export


def read(folder, name):
    return jax.export.deserialize(bytearray((folder / f'{name}.stablehlo').read_bytes()))


@pytest.fixture(scope='module')
def exported(micro_run, tmp_path_factory):
    """A dual encoder, by the command."""
    folder = tmp_path_factory.mktemp('exported')
    assert export.main([str(micro_run / 'pretrain' / 'bundle'), f'--stablehlo={folder / "pretrain"}']) == 0
    return folder


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 40, 40, 3), np.uint8)


@pytest.mark.parametrize('count', [1, 3])
def test_a_dual_encoder(exported, micro_run, count):
    model = big_vlm.load(micro_run / 'pretrain' / 'bundle')
    weights = load_file(exported / 'pretrain' / 'weights' / 'model.safetensors')
    texts = ['a red three in the center', 'two', 'a blue one']
    rows = [prompts.contrastive_text(model.tokenizer.encode(text), model.contract) for text in texts[:count]]
    expected = model.embed(images=list(images(count)), texts=texts[:count])
    image = np.stack([prepare(x, model.contract) for x in images(count)])
    got = read(exported / 'pretrain', 'embed_image').call(weights, {'image': image})['embedding']
    np.testing.assert_allclose(got, expected['image'], atol=1e-5)
    text = dict(zip(('text', 'text_mask'), map(np.stack, zip(*rows, strict=True)), strict=True))
    got = read(exported / 'pretrain', 'embed_text').call(weights, text)['embedding']
    np.testing.assert_allclose(got, expected['text'], atol=1e-5)


@pytest.mark.slow
def test_a_decoder(micro_run, tmp_path):
    """The greedy tokens of the bundle, and their log-probabilities, one call after another."""
    model = big_vlm.load(micro_run / 'multimodal' / 'bundle')
    asked = ['caption en', 'how many digits are there?']
    expected = model.generate(list(images(2)), asked, max_new_tokens=6)
    folder = tmp_path / 'exported'
    words = [str(micro_run / 'multimodal' / 'bundle'), f'--stablehlo={folder}', '--max_new_tokens=8']
    assert export.main([*words, '--text_length=12']) == 0
    weights = load_file(folder / 'weights' / 'model.safetensors')
    rows = [prompts.generative_row(model.tokenizer.encode(prompt), None, model.contract) for prompt in asked]
    manifest = json.loads((folder / 'manifest.json').read_text())
    wanted = manifest['functions']['prefill']['inputs']
    slots = model.contract.image_tokens + manifest['contract']['text_length']
    assert manifest['contract']['text_length'] == 12
    batch = {name: np.stack([row[name][:slots] for row in rows]) for name in wanted if name in rows[0]}
    batch['image'] = np.stack([prepare(x, model.contract) for x in images(2)])[:, None]
    batch['image_mask'] = np.ones((2, 1), bool)
    assert batch.keys() == wanted.keys()
    state, step = read(folder, 'prefill').call(weights, batch), read(folder, 'decode_step')
    for t in range(max(len(answer.ids) for answer in expected)):
        logits = np.asarray(state.pop('logits'), np.float64)
        token = logits.argmax(-1).astype(np.int32)
        for row, answer in enumerate(expected):
            if t < len(answer.ids):
                assert token[row] == answer.ids[t]
                log_prob = logits[row, token[row]] - np.logaddexp.reduce(logits[row])
                np.testing.assert_allclose(log_prob, answer.log_probs[t], atol=1e-4)
        state = step.call(weights, state | {'token': token})


def test_the_manifest_and_the_platforms(exported):
    manifest = json.loads((exported / 'pretrain' / 'manifest.json').read_text())
    assert manifest['functions']['embed_image']['inputs']['image'].startswith('uint8[batch, ')
    assert manifest['weights'] == ['weights/model.safetensors']
    assert manifest['contract']['value_range'] == [-1.0, 1.0]
    assert read(exported / 'pretrain', 'embed_text').platforms == ('cpu', 'cuda', 'tpu')


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--stablehlo={there}'], 'exists: choose another name'),
        (['--stablehlo={free}', '--platforms=cpu,gpu'], "unknown platform 'gpu'"),
        (['--stablehlo={free}', '--max_new_tokens=8'], 'is a dual encoder'),
        (['--stablehlo={free}', '--text_length=8'], 'is a dual encoder'),
    ],
)
def test_what_cannot_be(exported, micro_run, words, message, capsys):
    places = dict(there=exported / 'pretrain', free=exported / 'other')
    assert export.main([str(micro_run / 'pretrain' / 'bundle'), *(word.format(**places) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert not (exported / 'other').exists()


def test_help_needs_no_jax():
    code = (
        'import sys; from tools import export\n'
        'try: export.main(["--help"])\n'
        'except SystemExit as stop: assert stop.code == 0\n'
        'assert not {"jax", "numpy"} & set(sys.modules)'
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0
