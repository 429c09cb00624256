"""Hugging Face folders that are refused: each in one line that names what is wrong with which file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from big_vlm import interop
from big_vlm.config import UserError

GOLDENS = Path(__file__).parents[1] / 'goldens'


def copied(tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(GOLDENS / name, folder)
    return folder


def change_config(folder, **changes):
    file = folder / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_pixels(folder, **changes):
    file = folder / 'preprocessor_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_section(folder, section, **changes):
    content = json.loads((folder / 'config.json').read_text())
    change_config(folder, **{section: content[section] | changes})


def cut_short(folder):
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])


def shard_gone(folder):
    next(folder.glob('*-00003-*')).unlink()


def index_leads_away(folder):
    file = folder / 'model.safetensors.index.json'
    file.write_text(file.read_text().replace('model-00003-of-00005', '../gemma/model'))


def tensors(change):
    def make(folder):
        loaded = load_file(folder / 'model.safetensors')
        change(loaded)
        save_file(loaded, folder / 'model.safetensors')

    return make


POST = 'language_model.model.layers.2.post_feedforward_layernorm.weight'
BIAS = 'vision_model.post_layernorm.bias'


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        (
            'gemma',
            lambda f: change_config(f, model_type='llama'),
            "unknown model_type 'llama'.*valid: gemma, gemma2, gemma3, gemma3_text, paligemma, siglip, siglip2",
        ),
        ('gemma', lambda f: change_config(f, model_type='siglip'), 'not the siglip that its config.json describes'),
        ('gemma', lambda f: change_config(f, num_hidden_layers='two'), 'damaged'),
        ('gemma', lambda f: change_config(f, rms_norm_eps=1e-5), 'rms_norm_eps is 1e-05'),
        ('gemma', lambda f: change_config(f, rope_parameters={'rope_theta': 5e5}), 'rope_theta is 500000.0'),
        ('gemma', lambda f: change_config(f, vocab_size=299), r'of another shape .*\[300, 16\] instead of \[299, 16\]'),
        (
            'siglip2_naflex',
            lambda f: change_pixels(f, do_rescale=False),
            'processor_config.json: do_rescale is False',
        ),
        ('siglip2_naflex', lambda f: change_pixels(f, rescale_factor=1 / 127.5), 'only 1/255 is read'),
        ('gemma2', lambda f: change_config(f, model_type='gemma3_text'), 'no published Gemma is computed so'),
        ('gemma2', lambda f: change_config(f, model_type='gemma'), r'6 missing|9 not expected|not expected'),
        ('gemma3', lambda f: change_config(f, model_type='gemma2'), 'layer_types must be 1 of sliding_attention'),
        (
            'paligemma2',
            lambda f: change_section(f, 'text_config', model_type='gemma3_text'),
            "unknown text_config.model_type 'gemma3_text'.*Valid: gemma, gemma2",
        ),
        ('paligemma2', tensors(lambda t: t.pop(POST)), '1 missing .*post_feedforward_layernorm'),
        ('siglip', lambda f: change_section(f, 'vision_config', hidden_act='gelu'), "hidden_act is 'gelu'"),
        ('siglip', lambda f: (f / 'config.json').unlink(), 'config.json: cannot be read'),
        ('siglip', lambda f: (f / 'config.json').write_text('{'), 'config.json: damaged'),
        ('siglip', lambda f: (f / 'model.safetensors').unlink(), 'neither model.safetensors nor'),
        ('siglip', cut_short, 'damaged or cut short'),
        ('siglip', tensors(lambda t: t.pop(BIAS)), f'1 missing .{BIAS}'),
        ('siglip', tensors(lambda t: t.update(extra=np.zeros(1))), '1 not expected .extra'),
        ('siglip', tensors(lambda t: t.update({BIAS: np.zeros(15, np.float32)})), r'\[15\] instead of \[16\]'),
        ('siglip', tensors(lambda t: t.update({BIAS: np.zeros(16, np.int32)})), 'is I32'),
        (
            'siglip2_naflex',
            lambda f: change_section(f, 'vision_config', num_patches=64),
            'num_patches is 64, and this family is computed with 256',
        ),
        ('siglip2_naflex', lambda f: change_config(f, model_type='siglip'), 'not the siglip that its config.json desc'),
        ('siglip2_naflex', lambda f: change_pixels(f, patch_size=16), "patch_size 16 is not the model's, 4"),
        ('siglip2_naflex', lambda f: change_pixels(f, max_num_patches=0), 'max_num_patches 0: must be at least 1'),
        ('siglip2', shard_gone, 'model-00003-of-00005.safetensors'),
        ('siglip2', index_leads_away, 'is no safetensors file of this folder'),
    ],
)
def test_refused_in_one_line(tmp_path, name, change, message):
    folder = copied(tmp_path, name)
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        interop.read(folder)
    assert '\n' not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({'resample': 1}, 'resample 1'),
        ({'size': {'height': 28, 'width': 28}}, "not the model's image_size, 14"),
        ({'image_mean': [0.4, 0.5, 0.6]}, 'colours must share one range'),
        ({'size': 14}, 'damaged'),
        ({'size': {'shortest_edge': 14}}, 'size has shortest_edge: only height and width are read'),
        ({'size': {'height': 14}}, 'size has height: only height and width'),
        ({'do_center_crop': True}, 'do_center_crop is True'),
        ({'do_pad': True}, 'do_pad is True'),
    ],
)
def test_pixels_that_the_contract_cannot_say_are_refused(tmp_path, content, message):
    folder = copied(tmp_path, 'siglip')
    (folder / 'preprocessor_config.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        interop.read(folder)


def test_neither_file_nor_folder(tmp_path):
    with pytest.raises(UserError, match='no such file or folder'):
        interop.read(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='Hub: hf download google/siglip-x --local-dir siglip-x$'):
        interop.read('google/siglip-x')
    with pytest.raises(UserError, match='neither an .npz or .gguf file nor a folder'):
        interop.read(tmp_path)
