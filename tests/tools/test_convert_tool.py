"""`tools.convert`: the goldens in all directions, the folders it writes, what it refuses without leaving a trace."""

import json
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import big_vlm
from big_vlm import bundle, interop
from big_vlm.config import UserError
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.ops import position_resize
from tools import convert

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / 'tests' / 'goldens'
MODELS = ('siglip', 'siglip2', 'siglip2_naflex', 'paligemma', 'paligemma2')


def test_help_shows_examples_and_imports_nothing_heavy():
    code = (
        'import sys, tools.convert as tool\n'
        'try: tool.main(["--help"])\n'
        'except SystemExit as stop: assert stop.code == 0\n'
        'heavy = {"jax", "numpy", "tqdm", "safetensors"} & set(sys.modules)\n'
        'assert not heavy, heavy'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'python -m tools.convert' in result.stdout


@pytest.fixture(scope='module')
def bundles(tmp_path_factory):
    """Every golden that is a whole model, converted."""
    folder = tmp_path_factory.mktemp('bundles')
    for name in MODELS:
        assert convert.main([str(GOLDENS / name), str(folder / name)]) == 0
    return folder


def same(a, b):
    a, b = interop.read(a).weights, interop.read(b).weights
    assert a.shapes == b.shapes
    for name in a.shapes:
        np.testing.assert_array_equal(a.read(name), b.read(name), err_msg=name)


@pytest.mark.parametrize('name', MODELS)
def test_out_of_a_bundle_comes_what_went_in(bundles, tmp_path, capsys, name):
    assert convert.main([str(bundles / name), str(tmp_path / 'folder')]) == 0
    assert convert.main([str(bundles / name), str(tmp_path / 'file.npz'), '--per_layer']) == 0
    assert capsys.readouterr().out.splitlines() == [f'{tmp_path}/folder: hugging_face', f'{tmp_path}/file.npz: npz']
    same(GOLDENS / name, tmp_path / 'folder')
    same(GOLDENS / name, tmp_path / 'file.npz')


@pytest.mark.parametrize('name', ['gemma', 'gemma2', 'gemma3'])
def test_a_decoder_alone_in_all_directions(tmp_path, name):
    assert convert.main([str(GOLDENS / name), str(tmp_path / 'bundle')]) == 0
    stage, contract, *_ = bundle.read(tmp_path / 'bundle')
    assert stage.model.projector == 'none' and (contract.image_tokens, contract.causal_prompt) == (0, True)
    card = (tmp_path / 'bundle' / 'README.md').read_text()
    assert 'A decoder alone' in card and 'photo.png' not in card and 'B/16' not in card
    assert convert.main([str(tmp_path / 'bundle'), str(tmp_path / 'back')]) == 0
    same(GOLDENS / name, tmp_path / 'back')
    assert interop.read(tmp_path / 'back').model == interop.read(GOLDENS / name).model
    assert convert.main([str(tmp_path / 'bundle'), str(tmp_path / 'g.npz')]) == 0
    assert convert.main([str(tmp_path / 'g.npz'), str(tmp_path / 'g'), '--to=hugging_face']) == 0
    same(GOLDENS / name, tmp_path / 'g')


def test_case_and_end_of_texts_come_along(tmp_path):
    shutil.copytree(GOLDENS / 'siglip', tmp_path / 'in')
    (tmp_path / 'in' / 'tokenizer_config.json').write_text('{"do_lower_case": false, "add_eos_token": false}')
    assert convert.main([str(tmp_path / 'in'), str(tmp_path / 'bundle')]) == 0
    assert convert.main([str(tmp_path / 'bundle'), str(tmp_path / 'out')]) == 0
    for folder in ('in', 'out'):
        settings = interop.read(tmp_path / folder).settings
        assert not settings.lower and not settings.eos


def test_rows_beyond_the_tokens_hold_no_locations(tmp_path):
    shutil.copytree(GOLDENS / 'gemma', tmp_path / 'padded')
    tensors = load_file(tmp_path / 'padded' / 'model.safetensors')
    name = 'model.embed_tokens.weight'
    tensors[name] = np.concatenate([tensors[name], np.zeros((20, 16), tensors[name].dtype)])
    save_file(tensors, tmp_path / 'padded' / 'model.safetensors')
    settings = json.loads((tmp_path / 'padded' / 'config.json').read_text())
    (tmp_path / 'padded' / 'config.json').write_text(json.dumps(settings | {'vocab_size': 320}))
    assert convert.main([str(tmp_path / 'padded'), str(tmp_path / 'bundle')]) == 0
    tokenizer = bundle.read(tmp_path / 'bundle')[2]
    assert tokenizer.vocab_size == tokenizer.base == 300


def test_a_converted_bundle_embeds_as_transformers_did(bundles):
    """Through the bundle's own tokenizer and pixels: texts are lower-cased, end in eos, and are padded."""
    towers = big_vlm.load(bundles / 'siglip')
    assert towers.contract.pad_id == towers.contract.eos_id == 1
    assert (towers.contract.vocab_size, towers.tokenizer.vocab_size) == (34, 34)
    with np.load(GOLDENS / 'siglip' / 'outputs.npz', allow_pickle=False) as golden:
        z = towers.task.predict['embed_text'](towers.params, {'text': golden['text']})
        np.testing.assert_allclose(z, golden['text_embeds'], atol=2e-5)
    image = np.zeros((20, 20, 3), np.uint8)
    z = towers.embed(images=[image], texts=['Two blue circles', 'two blue circles', 'a <loc0001>'])
    np.testing.assert_array_equal(z['text'][0], z['text'][1])
    assert np.isfinite(z['image']).all() and np.isfinite(z['text']).all()
    card = (bundles / 'siglip' / 'README.md').read_text()
    assert f'converted from {GOLDENS}/siglip' in card


def test_a_converted_bundle_answers(bundles):
    model = big_vlm.load(bundles / 'paligemma')
    assert (model.contract.image_tokens, model.contract.vocab_size, model.contract.lower) == (9, 1452, False)
    [answer] = model.generate(np.zeros((14, 14, 3), np.uint8), 'caption en', max_new_tokens=2)
    assert 1 <= len(answer.ids) <= 2


def test_what_transformers_reads_beside_the_weights(bundles, tmp_path):
    assert convert.main([str(bundles / 'paligemma'), str(tmp_path / 'p')]) == 0
    files = {file.name for file in (tmp_path / 'p').iterdir()}
    settings = {f'{name}config.json' for name in ('', 'generation_', 'preprocessor_', 'tokenizer_')}
    assert files == settings | {'tokenizer.model', 'model.safetensors'}
    content = json.loads((tmp_path / 'p' / 'config.json').read_text())
    assert (content['image_token_index'], content['text_config']['vocab_size']) == (1452, 1472)
    table = load_file(tmp_path / 'p' / 'model.safetensors')['language_model.model.embed_tokens.weight']
    np.testing.assert_allclose(table[1452:], np.repeat(table[:1452].mean(axis=0, keepdims=True), 20, axis=0), atol=1e-6)
    added = json.loads((tmp_path / 'p' / 'tokenizer_config.json').read_text())['added_tokens_decoder']
    base = Tokenizer.load(tmp_path / 'p' / 'tokenizer.model').base
    assert [added[str(base + i)]['content'] for i in (0, 1024, 1152)] == ['<loc0000>', '<seg000>', '<image>']


def test_a_model_in_use_has_float32_weights(tmp_path):
    """Whatever its file has: opened directly, it computes the same numbers as the bundle made of it."""
    shutil.copytree(GOLDENS / 'siglip2_naflex', tmp_path / 'half')
    tensors = load_file(tmp_path / 'half' / 'model.safetensors')
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    save_file(tensors, tmp_path / 'half' / 'model.safetensors')
    assert convert.main([str(tmp_path / 'half'), str(tmp_path / 'bundle')]) == 0
    stored, _ = bundle.open_model(tmp_path / 'bundle')
    assert {leaf.dtype for leaf in stored.weights.shapes.values()} == {np.dtype(ml_dtypes.bfloat16)}
    model, directly = big_vlm.load(tmp_path / 'bundle'), bundle.load_any(tmp_path / 'half')
    assert {x.dtype for x in jax.tree.leaves(directly.params)} == {np.dtype(np.float32)}
    assert (directly.stage.model, directly.contract) == (model.stage.model, model.contract)
    picture = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
    np.testing.assert_array_equal(*(one.embed(images=picture)['image'] for one in (model, directly)))


def test_resizing_without_antialias_is_told_and_comes_back(tmp_path, capsys):
    """From big_vision through a folder of transformers, which always low-passes."""
    assert convert.main([str(GOLDENS / 'siglip'), str(tmp_path / 'x.npz')]) == 0
    assert convert.main([str(tmp_path / 'x.npz'), str(tmp_path / 'folder'), '--to=hugging_face']) == 0
    told = 'its images are to be resized without antialias, and transformers resizes with it'
    assert capsys.readouterr().out.splitlines()[1:] == [
        f'{tmp_path}/folder: hugging_face',
        f'{tmp_path}/folder: {told}',
    ]
    for folder in ('x.npz', 'folder'):
        settings = interop.read(tmp_path / folder).settings
        assert (settings.resample, settings.antialias) == ('bilinear', False)


@pytest.mark.parametrize(('how', 'used'), [('', 'bicubic'), ('bilinear', 'bilinear'), ('antialiased', 'antialiased')])
def test_another_resolution(tmp_path, how, used):
    before = interop.read(GOLDENS / 'siglip').weights.read('img/pos_embedding')
    flags = ['--image_size=20', *([f'--resize={how}'] if how else [])]
    assert convert.main([str(GOLDENS / 'siglip'), str(tmp_path / 'x.npz'), *flags]) == 0
    after = interop.read(tmp_path / 'x.npz')
    assert after.settings.image_size == 20
    expected = position_resize.RESIZES[used](before, (5, 5))
    np.testing.assert_array_equal(after.weights.read('img/pos_embedding'), expected)


def other_tokenizer(tmp_path):
    path = tmp_path / 'other.model'
    Tokenizer.train(['other words', 'and more of them'], 290, path)
    return [str(GOLDENS / 'siglip2'), '{dst}', f'--tokenizer={path}']


def cut_short(tmp_path):
    shutil.copytree(GOLDENS / 'siglip', tmp_path / 'cut')
    file = tmp_path / 'cut' / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-9])
    return [str(tmp_path / 'cut'), '{dst}']


def wrong_family(tmp_path):
    shutil.copytree(GOLDENS / 'gemma', tmp_path / 'wrong')
    shutil.copy(GOLDENS / 'siglip' / 'config.json', tmp_path / 'wrong')
    return [str(tmp_path / 'wrong'), '{dst}']


def wrong_shape(tmp_path):
    shutil.copytree(GOLDENS / 'siglip', tmp_path / 'shape')
    file = tmp_path / 'shape' / 'model.safetensors'
    tensors = load_file(file)
    tensors['vision_model.post_layernorm.bias'] = np.zeros(3, np.float32)
    save_file(tensors, file)
    return [str(tmp_path / 'shape'), '{dst}']


def pickled(tmp_path):
    np.savez(tmp_path / 'p.npz', **{'params/img/embedding/bias': np.array([{}, []], object)})
    return [str(tmp_path / 'p.npz'), '{dst}']


def no_tokenizer(tmp_path):
    convert.main([str(GOLDENS / 'siglip'), str(tmp_path / 'x.npz')])
    return [str(tmp_path / 'x.npz'), '{dst}']


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda tmp: ['/nowhere/at/all', '{dst}'], 'no such file or folder'),
        (lambda tmp: [str(GOLDENS / 'siglip'), str(GOLDENS)], 'exists: choose another name'),
        (lambda tmp: [str(GOLDENS / 'siglip'), '{dst}', '--to=onnx'], "unknown format 'onnx'"),
        (lambda tmp: [str(GOLDENS / 'siglip2'), '{dst}.gguf'], 'is a siglip: GGUF files are written of Gemmas'),
        (lambda tmp: [str(GOLDENS / 'siglip'), '{dst}', '--image_size=3'], 'holds no patch'),
        (lambda tmp: [str(GOLDENS / 'gemma'), '{dst}', '--image_size=28'], 'no learned position embedding'),
        (lambda tmp: [str(GOLDENS / 'siglip'), '{dst}', '--image_size=28', '--resize=x'], 'unknown position resize'),
        (
            lambda tmp: [str(GOLDENS / 'siglip'), '{dst}', '--resize=bicubic'],
            'resize=bicubic has no effect: .*image_size',
        ),
        (lambda tmp: [str(GOLDENS / 'siglip'), '{dst}', '--per_layer'], 'per_layer=True has no effect: only an .npz'),
        (lambda tmp: [str(GOLDENS / 'siglip'), '{dst}.npz', '--tokenizer=x'], 'tokenizer=x has no effect'),
        (cut_short, 'damaged or cut short'),
        (wrong_family, 'is not the siglip that its config.json describes: .* missing'),
        (wrong_shape, r'1 of another shape .vision_model.post_layernorm.bias \[3\] instead of \[16\]'),
        (pickled, 'params/img/embedding/bias.npy holds pickled Python objects'),
        (other_tokenizer, 'has 290 pieces .* 300 rows'),
        (no_tokenizer, 'comes without a SentencePiece tokenizer'),
    ],
)
def test_refused_in_one_line_and_nothing_is_left(tmp_path, capsys, make, message):
    arguments = [x.format(dst=tmp_path / 'dst') for x in make(tmp_path)]
    before = sorted(tmp_path.rglob('*'))
    capsys.readouterr()
    assert convert.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and err.startswith('error: ')
    assert re.search(message, err), err
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.slow
@pytest.mark.parametrize('destination', ['dst', 'dst.npz', 'dst.gguf', '--to=hugging_face'])
def test_a_disk_that_fills_up(tmp_path, destination):
    """No file may grow beyond 20 kB: every writer fails in the middle, as on a full disk."""
    code = (
        'import sys, resource\n'
        'from tools import convert\n'
        'from big_vlm import bundle\n'
        'resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n'
        'sys.exit(convert.main(sys.argv[1:]))'
    )
    flags = [destination] if destination.startswith('--') else []
    target = tmp_path / ('dst' if flags else destination)
    arguments = [str(GOLDENS / 'paligemma'), str(target), *flags]
    result = subprocess.run([sys.executable, '-c', code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    # Threads of Orbax may still complain, in the same line too; nothing of ours does.
    assert len(re.findall('error: .*not written', result.stderr)) == 1, result.stderr
    assert f'{ROOT}/big_vlm' not in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def test_too_little_room_for_a_bundle(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match='make room'):
        bundle.convert(GOLDENS / 'siglip', tmp_path / 'a' / 'dst')
    assert list(tmp_path.iterdir()) == []
