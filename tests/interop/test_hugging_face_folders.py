"""Hugging Face folders: the goldens give what transformers computed from them.

`tests/goldens` is written by `tools/make_goldens.py`; nothing here needs torch or transformers.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from big_vlm import bundle, config, interop
from big_vlm.checkpoints import trees
from big_vlm.config import UserError
from big_vlm.data import naflex
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import big_vision, hugging_face, pretrained, safetensors_files
from big_vlm.interop.lazy import LazyWeights
from big_vlm.models import gemma

GOLDENS = Path(__file__).parents[1] / 'goldens'
DECODERS = ('gemma', 'gemma2', 'gemma3')
PALIGEMMAS = ('paligemma', 'paligemma2')
NAMES = ('siglip', 'siglip2', 'siglip2_naflex', *PALIGEMMAS, *DECODERS)
TOLERANCE = 2e-5


def close(got, expected):
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def params(model):
    return trees.nested({name: model.weights.read(name) for name in model.weights.shapes})


def outputs(name):
    with np.load(GOLDENS / name / 'outputs.npz', allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize('name', ['siglip', 'siglip2'])
def test_siglip_computes_what_transformers_does(name):
    model, golden = interop.read(GOLDENS / name), outputs(name)
    weights = params(model)
    zimg, ztxt, out = jax.jit(model.build().apply)(weights, golden['image'], golden['text'])
    close(out['img/blocks'], golden['image_blocks'])
    close(out['txt/blocks'], golden['text_blocks'])
    close(zimg, golden['image_embeds'])
    close(ztxt, golden['text_embeds'])
    close(zimg @ ztxt.T * jnp.exp(weights['t']) + weights['b'], golden['logits'])


def test_naflex_computes_what_transformers_does():
    """From pictures of three shapes on, through the preprocessing that the folder's files describe."""
    model, golden = interop.read(GOLDENS / 'siglip2_naflex'), outputs('siglip2_naflex')
    assert (model.settings.max_patches, model.settings.resample, model.settings.antialias) == (10, 'bilinear', True)
    contract = model.contract(Tokenizer.load(model.tokenizer))
    rows = [naflex.rows(golden[f'picture_{i}'], contract) for i in range(3)]
    patches, mask, grid = (np.stack([row[name] for row in rows]) for name in ('patches', 'patch_mask', 'patch_grid'))
    np.testing.assert_array_equal(grid, golden['spatial_shapes'])
    np.testing.assert_array_equal(mask, golden['pixel_attention_mask'])
    np.testing.assert_allclose(patches[mask] / 127.5 - 1, golden['pixel_values'][mask], atol=1e-6)
    weights = params(model)
    images = golden['pixel_values'], mask, grid
    zimg, ztxt, out = jax.jit(model.build().apply)(weights, images, golden['text'])
    close(out['img/blocks'][:, mask], golden['image_blocks'][:, mask])
    close(out['txt/blocks'], golden['text_blocks'])
    close(zimg, golden['image_embeds'])
    close(ztxt, golden['text_embeds'])
    close(zimg @ ztxt.T * jnp.exp(weights['t']) + weights['b'], golden['logits'])


@pytest.mark.parametrize('name', PALIGEMMAS)
def test_paligemma_computes_what_transformers_does(name):
    model, golden = interop.read(GOLDENS / name), outputs(name)
    text, suffix = golden['text'], golden['suffix']
    position = np.broadcast_to(np.arange(text.shape[1], dtype=np.int32), text.shape)
    rows = text, np.ones_like(text), position, suffix
    first = model.build().image_tokens - 1
    logits, out = jax.jit(lambda p: model.build().apply(p, golden['image'][:, None], None, *rows, logits_from=first))(
        params(model)
    )
    close(out['blocks'][:-1], golden['blocks'])
    close(logits, golden['logits'])


@pytest.mark.parametrize('name', DECODERS)
def test_gemma_computes_what_transformers_does(name):
    model, golden = interop.read(GOLDENS / name), outputs(name)
    decoder, llm, text = model.build(), params(model)['llm'], golden['text']
    position = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    mask = np.broadcast_to(np.tril(np.ones((9, 9), bool)), (2, 9, 9))

    @jax.jit
    def forward(llm):
        x, out = decoder.apply({'params': llm}, gemma.embed(decoder, llm, text), position, mask)
        return gemma.logits(decoder, llm, x), out['blocks']

    logits, blocks = forward(llm)
    close(blocks[:-1], golden['blocks'])
    close(logits, golden['logits'])


def test_what_config_json_and_its_neighbours_say():
    siglip, siglip2 = interop.read(GOLDENS / 'siglip'), interop.read(GOLDENS / 'siglip2')
    assert (siglip.family, siglip.vocab_size, siglip.settings.text_length) == ('siglip', 34, 7)
    assert (siglip2.model.text.width, siglip2.model.image.width, siglip2.model.image.num_heads) == (24, 16, 4)
    assert (siglip2.settings.image_size, siglip2.settings.resample, siglip2.settings.antialias) == (14, 'bicubic', True)
    assert siglip.settings.lower and siglip.settings.value_range == (-1.0, 1.0)
    paligemma = interop.read(GOLDENS / 'paligemma')
    # 1472 rows are in the file: 1452 tokens, `<image>`, padding.
    assert (paligemma.vocab_size, paligemma.weights.shapes['llm/embedder/input_embedding'].shape) == (1452, (1452, 16))
    assert not paligemma.settings.lower and paligemma.model.image.pool == 'none'
    assert paligemma.tokenizer == GOLDENS / 'paligemma' / 'tokenizer.model'
    gemma2, gemma3 = (interop.read(GOLDENS / name) for name in ('gemma2', 'gemma3'))
    assert (gemma2.family, gemma3.family) == ('gemma2', 'gemma3_text')
    # The 27B scales queries by the width, the 4B divides positions: what the sizes do not say, the variant does.
    assert (gemma2.model.decoder.variant, gemma3.model.decoder.variant) == ('gemma2_27b', 'gemma3_4b')
    assert (gemma2.model.decoder.window, gemma2.model.decoder.final_softcap) == (4, 0.05)
    assert interop.read(GOLDENS / 'paligemma2').model.decoder == gemma2.model.decoder


def test_published_configs_with_nothing_but_defaults(tmp_path):
    """google/siglip-base-patch16-224 says no more than this; the sizes are found without its weights."""
    content = {'model_type': 'siglip', 'text_config': {'model_type': 'siglip_text_model'}, 'vision_config': {}}
    (tmp_path / 'config.json').write_text(json.dumps(content))
    pixels = {'resample': 2, 'size': {'height': 224, 'width': 224}, 'image_mean': [0.0] * 3, 'image_std': [1.0] * 3}
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(pixels))
    settings = hugging_face.hugging_face_config.read(tmp_path)
    assert (settings.model.image.variant, settings.model.text.variant, settings.vocab_size) == ('B/16', 'B', 32_000)
    assert settings.model.image.width == 0, 'the variant says it'
    assert (settings.contract.resample, settings.contract.value_range) == ('bilinear', (0.0, 1.0))


G2 = {'model_type': 'gemma2'}
G3 = {'model_type': 'gemma3_text', 'hidden_size': 640, 'num_hidden_layers': 18, 'intermediate_size': 2048}
G3 |= {'num_attention_heads': 4, 'num_key_value_heads': 1, 'sliding_window': 512}
PUBLISHED_4B = {'hidden_size': 2560, 'num_hidden_layers': 34, 'intermediate_size': 10_240, 'sliding_window': 1024}
G3_4B = PUBLISHED_4B | {'model_type': 'gemma3_text', 'num_attention_heads': 8, 'num_key_value_heads': 4}
SCALED = {'rope_type': 'linear', 'factor': 8.0}


@pytest.mark.parametrize(
    ('content', 'variant'),
    [
        ({'model_type': 'gemma'}, 'gemma_7b'),
        (G2, 'gemma2_2b'),
        (G2 | {'layer_types': None, 'rope_theta': 10_000, 'cache_implementation': 'hybrid'}, 'gemma2_2b'),
        (G3 | {'rope_theta': 1e6, 'rope_local_base_freq': 1e4, 'rope_scaling': None}, 'gemma3_270m'),
        (G3 | {'sliding_window_pattern': 6}, 'gemma3_270m'),
        (G3_4B | {'rope_scaling': SCALED}, 'gemma3_4b'),
        # As google/gemma-3-4b-pt has it, an image tower beside.
        ({'model_type': 'gemma3', 'text_config': PUBLISHED_4B | {'rope_scaling': SCALED}}, 'gemma3_4b'),
        (G3_4B | {'rope_parameters': {'full_attention': SCALED | {'rope_theta': 1e6}}}, 'gemma3_4b'),
    ],
)
def test_published_decoders_by_their_names(tmp_path, content, variant):
    (tmp_path / 'config.json').write_text(json.dumps(content))
    settings = hugging_face.hugging_face_config.read(tmp_path)
    softcap = 30.0 if variant == 'gemma2_2b' else 0.0
    assert settings.model.decoder == config.Decoder(variant=variant, final_softcap=softcap), 'the variant says the rest'
    assert settings.vocab_size == {'gemma3': 262_208}.get(variant[:6], 256_000)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (G2 | {'query_pre_attn_scalar': 100}, 'is 100: must be head_dim, 256, or .* 288'),
        (G2 | {'sliding_window': 0}, 'sliding_window is 0'),
        (G2 | {'layer_types': ['full_attention'] * 26}, 'layer_types must be 1 of sliding_attention to one of full'),
        (G2 | {'rope_scaling': SCALED}, 'rope_scaling is .*factor'),
        (G3 | {'sliding_window_pattern': 4}, 'sliding_window_pattern is 4'),
        (G3 | {'use_bidirectional_attention': True}, 'use_bidirectional_attention is True'),
        (G3 | {'rope_local_base_freq': 1e5}, 'local layers: rope_theta is 100000.0'),
        (G3 | {'rope_scaling': SCALED | {'factor': 4.0}}, 'of base 1e.06 divided by 4 .* no published Gemma'),
        (G3 | {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}}, "rope_type is 'yarn'"),
    ],
)
def test_decoders_that_are_computed_otherwise_are_refused(tmp_path, content, message):
    (tmp_path / 'config.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        hugging_face.hugging_face_config.read(tmp_path)
    assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize('name', ['siglip2_naflex', 'gemma2', 'gemma3', 'paligemma2'])
def test_what_is_written_reads_as_the_same_model(tmp_path, name):
    model = interop.read(GOLDENS / name)
    hugging_face.write(tmp_path / 'folder', model)
    again = interop.read(tmp_path / 'folder')
    assert (again.family, again.model, again.settings) == (model.family, model.model, model.settings)


@pytest.mark.parametrize(('said', 'read'), [(None, 0.0), (30.0, 30.0), (50.0, None)])
def test_the_cap_of_the_attention_logits(tmp_path, said, read):
    """It is computed with, and written back; Gemma 2's own is not repeated."""
    shutil.copytree(GOLDENS / 'gemma2', tmp_path / 'in')
    file = tmp_path / 'in' / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'attn_logit_softcapping': said}))
    model = interop.read(tmp_path / 'in')
    assert model.model.decoder.attn_softcap == read and model.build().generation.softcap == (said or 0)
    hugging_face.write(tmp_path / 'out', model)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['attn_logit_softcapping'] == said


def test_big_visions_paligemma_2_has_no_window(tmp_path):
    """The published one is kept where the row is shorter; its output logits have no cap."""
    model = interop.read(GOLDENS / 'paligemma2')
    big_vision.write(tmp_path / 'x.npz', model.weights)
    decoder = interop.read(tmp_path / 'x.npz').model.decoder
    assert (decoder.variant, decoder.window, decoder.final_softcap) == ('gemma2_2b', 0, 0.0)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in model.weights.shapes.items()}
    # 896 pixels of patches of 14: 4096 patches, as many as the window.
    shapes['img/pos_embedding'] = jax.ShapeDtypeStruct((1, 4096, 16), np.float32)
    assert pretrained.from_shapes(LazyWeights(shapes, None, 'here')).model.decoder.window == 8192


def test_a_projector_without_bias_has_no_place_in_transformers(tmp_path):
    weights = interop.read(GOLDENS / 'paligemma').weights
    bare = weights.renamed({name: name for name in weights.shapes if name != 'img/head/bias'})
    big_vision.write(tmp_path / 'x.npz', bare)
    model = interop.read(tmp_path / 'x.npz')
    assert not model.model.image.head_bias
    with pytest.raises(UserError, match=r'model\.image\.head_bias is False, .* write an \.npz instead'):
        hugging_face.write(tmp_path / 'folder', model)


@pytest.mark.parametrize(
    ('decoder', 'sections', 'message'),
    [
        (
            {'variant': 'gemma3_1b'},
            {},
            r"decoder.variant is 'gemma3_text', .*'gemma or gemma2': write an \.npz instead",
        ),
        ({'attn_softcap': 50.0}, {}, r'attn_softcap is 50, .* Gemma 2 alone: write an \.npz instead'),
        ({'final_softcap': 30.0}, {}, r'final_softcap is 30\.0, .*: write an \.npz instead'),
        ({}, {'projector': 'cls'}, r"model\.projector is 'cls', .*: write an \.npz instead"),
    ],
)
def test_nothing_of_ours_is_left_behind(tmp_path, decoder, sections, message):
    """A PaliGemma of another kind is refused, not written without the arrays that make it one."""
    model = interop.read(GOLDENS / 'paligemma')
    sections = {'decoder': dataclasses.replace(model.model.decoder, **decoder), **sections}
    model = dataclasses.replace(model, model=dataclasses.replace(model.model, **sections))
    shapes = model.expected()
    model = dataclasses.replace(model, weights=LazyWeights(shapes, lambda n: np.zeros(shapes[n].shape), 'mine')).check()
    with pytest.raises(UserError, match=message):
        hugging_face.write(tmp_path / 'folder', model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('tower', 'change', 'message'),
    [
        ('text', {'causal': True}, r'model\.text\.causal is True, and transformers computes a siglip with False'),
        (
            'image',
            {'variant': 'R50'},
            "model.image.variant is 'R50', a ResNet, and transformers has no siglip with one",
        ),
    ],
)
def test_towers_that_transformers_has_not(tmp_path, tower, change, message):
    model = interop.read(GOLDENS / 'siglip')
    changed = dataclasses.replace(getattr(model.model, tower), **change)
    model = dataclasses.replace(model, model=dataclasses.replace(model.model, **{tower: changed}))
    with pytest.raises(UserError, match=message):
        hugging_face.write(tmp_path / 'folder', model)
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_mix_dtypes(tmp_path):
    model = interop.read(GOLDENS / 'siglip')
    leaf = model.weights.shapes['t']
    shapes = {**model.weights.shapes, 't': jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)}
    lazy = LazyWeights(shapes, lambda n: np.asarray(model.weights.read(n), shapes[n].dtype), 'mixed')
    hugging_face.write(tmp_path / 'folder', dataclasses.replace(model, weights=lazy))
    assert json.loads((tmp_path / 'folder' / 'config.json').read_text())['dtype'] == 'float32'
    again = interop.read(tmp_path / 'folder').weights
    assert again.shapes == shapes
    np.testing.assert_array_equal(again.read('t'), lazy.read('t'))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('per_layer', [False, True])
def test_round_trip_is_bit_identical(tmp_path, name, per_layer):
    """big_vision → ours → Hugging Face → ours → big_vision."""
    start, end, folder = tmp_path / 'start.npz', tmp_path / 'end.npz', tmp_path / 'folder'
    big_vision.write(start, interop.read(GOLDENS / name).weights, per_layer=per_layer)
    hugging_face.write(folder, interop.read(start))
    assert len(load_file(folder / 'model.safetensors')) == len(load_shards(GOLDENS / name))
    big_vision.write(end, interop.read(folder).weights, per_layer=per_layer)
    with np.load(start, allow_pickle=False) as a, np.load(end, allow_pickle=False) as b:
        assert sorted(a) == sorted(b)
        for key in a:
            assert a[key].tobytes() == b[key].tobytes(), key
    assert start.read_bytes() == end.read_bytes()


@pytest.mark.parametrize('name', NAMES)
def test_an_exported_tensor_is_the_imported_one(tmp_path, name):
    """Under the published names, bit for bit but for the padding rows of a token table."""
    hugging_face.write(tmp_path / 'folder', interop.read(GOLDENS / name))
    mine, theirs = load_file(tmp_path / 'folder' / 'model.safetensors'), load_shards(GOLDENS / name)
    for key, expected in theirs.items():
        key = key.replace('vision_tower.', 'vision_tower.vision_model.')
        assert mine[key].shape == expected.shape
        tokens = 1452 if key.endswith('embed_tokens.weight') else None
        np.testing.assert_array_equal(mine[key][:tokens], expected[:tokens], err_msg=key)


def load_shards(folder):
    return {name: x for file in sorted(folder.glob('*.safetensors')) for name, x in load_file(file).items()}


def copied(tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(GOLDENS / name, folder)
    return folder


def rewritten(tmp_path, name, rename=lambda key: key, drop=(), **more):
    """The golden with other tensors in its one file."""
    folder = copied(tmp_path, name)
    tensors = {rename(key): x for key, x in load_file(folder / 'model.safetensors').items() if key not in drop}
    save_file(tensors | more, folder / 'model.safetensors')
    return folder


def version_4(key):
    return key.replace('vision_tower.', 'vision_tower.vision_model.')


def version_5_in_memory(key):
    key = key.replace('language_model.model.', 'language_model.')
    return f'model.{key}'


@pytest.mark.parametrize('rename', [version_4, version_5_in_memory])
@pytest.mark.parametrize('name', PALIGEMMAS)
def test_names_of_both_versions(tmp_path, name, rename):
    folder = rewritten(tmp_path, name, rename)
    got, expected = interop.read(folder).weights, interop.read(GOLDENS / name).weights
    assert got.shapes == expected.shapes
    for name in got.shapes:
        np.testing.assert_array_equal(got.read(name), expected.read(name))


@pytest.mark.parametrize('prefix', ['', 'model.'])  # as published, and version 5 in memory
def test_the_decoder_of_a_gemma_3_with_an_image_tower(tmp_path, prefix):
    at = f'{prefix}language_model.' + ('' if prefix else 'model.')
    tower = {f'{prefix}{name}': np.zeros(2) for name in ('vision_tower.x.bias', 'multi_modal_projector.mm_weight')}
    folder = rewritten(tmp_path, 'gemma3', lambda key: at + key.removeprefix('model.'), **tower)
    text = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({'model_type': 'gemma3', 'text_config': text, 'vision_config': {}}))
    got, expected = interop.read(folder), interop.read(GOLDENS / 'gemma3')
    assert dataclasses.replace(got, weights=None, tokenizer=None) == dataclasses.replace(
        expected, weights=None, tokenizer=None, decoder_of='gemma3'
    )
    assert got.weights.shapes == expected.weights.shapes
    for name in got.weights.shapes:
        np.testing.assert_array_equal(got.weights.read(name), expected.weights.read(name))
    told = []
    bundle.convert(folder, tmp_path / 'x.npz', say=told.append)
    assert told == [f'{tmp_path}/x.npz is the decoder of {folder}, a gemma3: its image tower is left out']


def test_a_tied_unembedding_may_be_repeated(tmp_path):
    table = load_file(GOLDENS / 'gemma' / 'model.safetensors')['model.embed_tokens.weight']
    folder = rewritten(tmp_path, 'gemma', **{'lm_head.weight': table})
    assert interop.read(folder).weights.shapes == interop.read(GOLDENS / 'gemma').weights.shapes
    with pytest.raises(UserError, match='lm_head.weight differs from model.embed_tokens.weight'):
        interop.read(rewritten(tmp_path / 'other', 'gemma', **{'lm_head.weight': table + 1}))


def test_buffers_of_old_releases_are_left_out(tmp_path):
    """Positions are whole numbers, which no weights are."""
    buffers = {f'{tower}_model.embeddings.position_ids': np.arange(9)[None] for tower in ('text', 'vision')}
    folder = rewritten(tmp_path, 'siglip', **buffers)
    assert interop.read(folder).weights.shapes == interop.read(GOLDENS / 'siglip').weights.shapes


def test_bfloat16_stays_bfloat16(tmp_path):
    folder = copied(tmp_path, 'gemma')
    tensors = load_file(folder / 'model.safetensors')
    save_file({key: x.astype(ml_dtypes.bfloat16) for key, x in tensors.items()}, folder / 'model.safetensors')
    model = interop.read(folder)
    assert {leaf.dtype for leaf in model.weights.shapes.values()} == {np.dtype(ml_dtypes.bfloat16)}
    hugging_face.write(tmp_path / 'out', model)
    again = load_file(tmp_path / 'out' / 'model.safetensors')
    for key, x in tensors.items():
        np.testing.assert_array_equal(again[key], x.astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['dtype'] == 'bfloat16'


def test_shards_and_their_index(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, 'SHARD_BYTES', 20_000)
    model = interop.read(GOLDENS / 'paligemma')
    hugging_face.write(tmp_path / 'folder', model)
    shards = sorted(file.name for file in (tmp_path / 'folder').glob('*.safetensors'))
    assert len(shards) > 2 and shards[0] == f'model-00001-of-{len(shards):05d}.safetensors'
    again = interop.read(tmp_path / 'folder').weights
    for name in model.weights.shapes:
        np.testing.assert_array_equal(again.read(name), model.weights.read(name))
