"""Stages that start from public checkpoints: Hugging Face folders and big_vision's `.npz`, whole or in part."""

import dataclasses
import json
import shutil
from pathlib import Path

import einops
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from big_vlm import bundle, config, interop, tasks
from big_vlm.checkpoints import trees
from big_vlm.config import UserError
from big_vlm.data.contract import Contract
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import big_vision
from big_vlm.ops import position_resize
from big_vlm.training import initial_weights
from big_vlm.training import step as steps

GOLDENS = Path(__file__).parents[1] / 'goldens'
SIGLIP = GOLDENS / 'siglip2'


def stage_of(model, task='', **init):
    """A stage whose model has the sizes of a public one."""
    stage = config.Stage(
        task=task or model.task,
        total=config.Duration(steps=1),
        model=model.model,
        contract=model.settings,
        tokenizer=config.Tokenizer(path=str(model.tokenizer)),
        init_from=config.InitFrom(**init),
    )
    tokenizer = Tokenizer.load(model.tokenizer)
    task = tasks.make(stage, Contract.make(stage.contract, tokenizer, tasks.image_slots(stage)))
    return stage, task


def loaded(stage, task):
    """(fresh, first) parameters by path, after the check that comes before training."""
    initial_weights.check({'train': stage}, {'train': steps.param_shapes(task)}, 'train', 'config')
    fresh = jax.jit(task.init)(jax.random.key(0))[0]
    first = initial_weights.make(stage.init_from, {}, 'config')(fresh)
    return trees.flat(fresh), trees.flat(first)


@pytest.mark.parametrize('source', ['hugging_face', 'bundle'])
def test_a_dual_encoder_whole(tmp_path, source):
    """Its table ends before the location tokens: their rows stay fresh."""
    model, path = interop.read(SIGLIP), SIGLIP
    if source == 'bundle':
        path = tmp_path / 'bundle'
        bundle.convert(SIGLIP, path)
    stage, task = stage_of(model, path=str(path))
    fresh, first = loaded(stage, task)
    table = 'txt/Embed_0/embedding'
    shapes = steps.param_shapes(task)
    assert initial_weights.overwritten(stage.init_from, {}, shapes, 'config') == set(first) - {table}
    assert first[table].shape == (300 + 1152, 24)
    np.testing.assert_array_equal(first[table][:300], model.weights.read(table))
    np.testing.assert_array_equal(first[table][300:], fresh[table][300:])
    for name in set(first) - {table}:
        np.testing.assert_array_equal(first[name], model.weights.read(name), err_msg=name)


def test_sentinels_have_no_rows(tmp_path):
    """mT5's file ends with a hundred pieces for T5's gaps, and the tables of multilingual SigLIPs before them."""
    folder = shutil.copytree(GOLDENS / 'siglip', tmp_path / 'siglip')
    file = folder / 'spiece.model'
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    for i in reversed(range(100)):
        proto.pieces.add(piece=f'▁<extra_id_{i}>', score=0.0, type=4)
    file.write_bytes(proto.SerializeToString())
    model = interop.read(folder)
    text = 'a red three <extra_id_7>'
    ids = Tokenizer.load(GOLDENS / 'siglip' / 'spiece.model').encode(text)
    assert model.contract(model.own_tokenizer()).vocab_size == 34 and model.own_tokenizer().encode(text) == ids
    stage, task = stage_of(model, path=str(folder))
    shapes = steps.param_shapes(task)
    initial_weights.check({'train': stage}, {'train': shapes}, 'train', 'config')
    taken = initial_weights.overwritten(stage.init_from, {}, shapes, 'config')
    assert set(trees.flat(shapes)) - taken == {'txt/Embed_0/embedding'}
    bundle.convert(folder, tmp_path / 'again', to='hugging_face')
    assert interop.read(tmp_path / 'again').own_tokenizer().base == 34


@pytest.mark.slow
@pytest.mark.parametrize('naflex', [True, False])
def test_naflex_from_a_fixed_resolution_and_back(tmp_path, naflex):
    """On a square of the resolution that the positions are of, both towers see the same."""
    model = interop.read(SIGLIP)
    square = dataclasses.replace(model, settings=dataclasses.replace(model.settings, image_size=64))
    rows = dataclasses.replace(model, settings=config.Contract(max_patches=256, text_length=7))
    params = trees.nested({name: model.weights.read(name) for name in model.weights.shapes})
    first = position_resize.antialiased(params['img']['pos_embedding'], (16, 16))
    params['img']['pos_embedding'] = np.asarray(first)
    if not naflex:
        params['img']['pos_embedding'] = params['img']['pos_embedding'].reshape(16, 16, 16)
        params['img']['embedding']['kernel'] = params['img']['embedding']['kernel'].reshape(48, 16)
    np.savez(tmp_path / 'x.npz', **trees.flat(params))
    stage, task = stage_of(rows if naflex else square, path=f'{tmp_path}/x.npz')
    taken = trees.nested(loaded(stage, task)[1])
    ours = taken if naflex else params
    theirs = params if naflex else taken
    image = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    patches = einops.rearrange(image, 'B (h p) (w q) C -> B (h w) (p q C)', p=4, q=4)
    grid, mask = np.full((2, 2), 16, np.int32), np.ones((2, 256), bool)
    one = square.build().img.apply({'params': theirs['img']}, image)[0]
    other = rows.build().img.apply({'params': ours['img']}, patches, mask, grid)[0]
    np.testing.assert_allclose(other, one, rtol=0, atol=2e-5 * np.abs(one).max())


@pytest.mark.parametrize('kind', ['gguf', 'padded folder'])
def test_a_decoder_from_a_file_or_a_folder_with_padding(tmp_path, kind):
    """Gemma 3 has 64 rows more than pieces from 4B on: they are read and written, and left out of a stage's table."""
    model, table = interop.read(GOLDENS / 'gemma'), 'llm/embedder/input_embedding'
    path = tmp_path / 'x.gguf' if kind == 'gguf' else tmp_path / 'padded'
    if kind == 'gguf':
        bundle.convert(GOLDENS / 'gemma', path)
    else:
        shutil.copytree(GOLDENS / 'gemma', path)
        tensors, description = load_file(path / 'model.safetensors'), json.loads((path / 'config.json').read_text())
        (path / 'config.json').write_text(json.dumps(description | {'vocab_size': 320}))
        rows = tensors['model.embed_tokens.weight']
        tensors['model.embed_tokens.weight'] = np.pad(rows, ((0, 20), (0, 0)), constant_values=9.0)
        save_file(tensors, path / 'model.safetensors')
        bundle.convert(path, tmp_path / 'again', to='hugging_face')
        again = interop.read(tmp_path / 'again')
        assert (again.vocab_size, again.own_tokenizer().base) == (320, 300)
        np.testing.assert_array_equal(again.weights.read(table), interop.read(path).weights.read(table))
    sections = dataclasses.replace(model.model, image=config.ImageTower('mu/4', pool='none'))
    whole = dataclasses.replace(
        interop.read(GOLDENS / 'paligemma'), model=sections, settings=config.Contract(image_size=8, lower=False)
    )
    stage, task = stage_of(whole, path=str(path), parts={'llm': 'llm'})
    fresh, first = loaded(stage, task)
    expected = model.weights.read(table)
    np.testing.assert_array_equal(first[table][:300], expected)
    np.testing.assert_array_equal(first[table][300:], fresh[table][300:])
    name = 'llm/layers/mlp/linear'
    np.testing.assert_array_equal(first[name], model.weights.read(name))


def test_a_language_model_as_text_tower():
    """Its table ends before the location tokens here too."""
    model = interop.read(GOLDENS / 'gemma')
    sections = config.Model(
        image=config.ImageTower('mu/4', pool='gap'),
        text=config.TextTower('gemma', causal=True, mask=True),
        decoder=model.model.decoder,
    )
    small = dataclasses.replace(model, model=sections, settings=dataclasses.replace(model.settings, image_size=8))
    init = dict(path=str(GOLDENS / 'gemma'), parts={'txt/llm': 'llm'})
    fresh, first = loaded(*stage_of(small, 'contrastive', **init))
    table, rows = 'txt/llm/embedder/input_embedding', model.vocab_size
    np.testing.assert_array_equal(first[table][:rows], model.weights.read('llm/embedder/input_embedding'))
    np.testing.assert_array_equal(first[table][rows:], fresh[table][rows:])
    for name in set(first) - {table}:
        expected = model.weights.read(name.removeprefix('txt/')) if name.startswith('txt/llm/') else fresh[name]
        np.testing.assert_array_equal(first[name], expected, err_msg=name)


@pytest.mark.slow
def test_a_decoder_with_eyes_from_two_places_of_an_npz(tmp_path):
    model = interop.read(GOLDENS / 'paligemma')
    big_vision.write(tmp_path / 'x.npz', model.weights)
    model = dataclasses.replace(model, settings=dataclasses.replace(model.settings, image_size=22))
    stage, task = stage_of(model, path=f'{tmp_path}/x.npz', fresh=('img/head/.*',), resize_method='bicubic')
    fresh, first = loaded(stage, task)
    position = model.weights.read('img/pos_embedding')
    np.testing.assert_array_equal(first['img/pos_embedding'], position_resize.bicubic(position, (5, 5)))
    np.testing.assert_array_equal(first['img/head/kernel'], fresh['img/head/kernel'])
    for name in set(first) - {'img/pos_embedding', 'img/head/kernel', 'img/head/bias'}:
        np.testing.assert_array_equal(first[name], model.weights.read(name), err_msg=name)
    # The image tower alone, named as a subtree of the file.
    stage, task = stage_of(
        model, path=f'{tmp_path}/x.npz:img', parts={'img/Transformer': 'Transformer'}, resize_method='bicubic'
    )
    fresh, first = loaded(stage, task)
    name = 'img/Transformer/encoder_norm/scale'
    np.testing.assert_array_equal(first[name], model.weights.read(name))
    np.testing.assert_array_equal(first['llm/final_norm/scale'], fresh['llm/final_norm/scale'])


@pytest.mark.slow
def test_a_decoder_and_its_eyes_from_two_checkpoints(tmp_path):
    """As PaliGemma's first stage begins; of what both have, the later one's counts."""
    model = interop.read(GOLDENS / 'paligemma')
    big_vision.write(tmp_path / 'x.npz', model.weights)
    other = {name: model.weights.read(name) + 1 for name in model.weights.shapes}
    np.savez(tmp_path / 'y.npz', **{f'params/{name}': value for name, value in other.items()})
    init = dict(
        path=f'{tmp_path}/x.npz', parts={'img': 'img', 'llm/final_norm': 'llm/final_norm'}, fresh=('img/head/.*',)
    )
    also = config.Weights(path=f'{tmp_path}/y.npz', parts={'llm': 'llm'})
    stage, task = stage_of(model, **init, also=(also,))
    fresh, first = loaded(stage, task)
    for name, value in first.items():
        if name.startswith('llm/'):
            expected = other[name]
        else:
            expected = fresh[name] if name.startswith('img/head/') else model.weights.read(name)
        np.testing.assert_array_equal(value, expected, err_msg=name)
    taken = {name for name in first if not name.startswith('img/head/')}
    assert initial_weights.overwritten(stage.init_from, {}, steps.param_shapes(task), 'config') == taken
    wrong = config.Weights(path=f'{tmp_path}/y.npz', parts={'lm': 'llm'})
    with pytest.raises(UserError, match=r"unknown part 'lm' \(config\.init_from\.also\[0\]\.parts\)"):
        loaded(*stage_of(model, **init, also=(wrong,)))


def test_what_does_not_fit_is_refused_before_training(tmp_path):
    model = interop.read(SIGLIP)
    stage, task = stage_of(model, path=str(GOLDENS / 'siglip'))
    with pytest.raises(UserError, match='its text weights belong to its tokenizer'):
        loaded(stage, task)
    stage, task = stage_of(model, path=str(GOLDENS / 'gemma'), parts={'img': 'img'})
    with pytest.raises(UserError, match="unknown part 'img'"):
        loaded(stage, task)
    (tmp_path / 'x.npz').write_bytes(b'PK')
    stage, task = stage_of(model, path=f'{tmp_path}/x.npz')
    with pytest.raises(UserError, match=r'config.init_from.path: .*damaged or not an .npz'):
        loaded(stage, task)
