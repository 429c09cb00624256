"""Goldens written as GGUF files: what went in comes out, under llama.cpp's names; refusals."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from big_vlm import bundle, interop
from big_vlm.config import UserError
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import gguf_files, gguf_gemma, hugging_face, pretrained
from tools import convert

gguf = pytest.importorskip('gguf', reason='needs the package gguf')

GOLDENS = Path(__file__).parents[1] / 'goldens'
DECODERS = ('gemma', 'gemma2', 'gemma3')
TABLE = 'llm/embedder/input_embedding'


def golden(name, **decoder):
    """As `interop` reads it; Gemma 2's queries scaled by head_dim, as llama.cpp's are unless it has a 27B's layers."""
    model = interop.read(GOLDENS / name)
    if name.endswith('2'):
        decoder = dict(variant='gemma2_2b') | decoder
    changed = dataclasses.replace(model.model.decoder, **decoder)
    return dataclasses.replace(model, model=dataclasses.replace(model.model, decoder=changed))


def write(file, model, precision='F32'):
    gguf_gemma.write(file, model, model.fitted(model.own_tokenizer()), precision)
    return interop.read(file)


def same(got, expected):
    """Bit for bit; of norms, 1 and the scale, which is what they compute with."""
    for name in got.shapes:
        a, b = got.read(name), expected.read(name)
        one = np.float32(1 if name.endswith('norm/scale') else 0)
        np.testing.assert_array_equal(a + one, b + one, err_msg=name)


@pytest.mark.parametrize('name', DECODERS)
def test_what_was_written_is_read(tmp_path, name):
    model = golden(name)
    got = write(tmp_path / 'x.gguf', model)
    assert (got.family, got.vocab_size, got.settings) == (model.family, model.vocab_size, model.settings)
    assert got.model.decoder == dataclasses.replace(
        model.model.decoder, final_softcap=pytest.approx(model.model.decoder.final_softcap)
    )
    assert got.weights.shapes == model.weights.shapes
    same(got.weights, model.weights)
    # And again: what a file says comes back whole, norms too.
    again = write(tmp_path / 'y.gguf', dataclasses.replace(got, tokenizer=model.tokenizer))
    for key in got.weights.shapes:
        np.testing.assert_array_equal(again.weights.read(key), got.weights.read(key), err_msg=key)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ['x.gguf', 'y.gguf']


@pytest.mark.parametrize('name', DECODERS)
def test_names_and_keys_are_llama_cpps(tmp_path, name):
    """As the reader of the package `gguf` sees them, and its table of names."""
    model = golden(name)
    write(tmp_path / 'x.gguf', model)
    reader = gguf.GGUFReader(tmp_path / 'x.gguf')
    known = gguf.MODEL_TENSORS[getattr(gguf.MODEL_ARCH, name.upper())]
    names = {gguf.TENSOR_NAMES[kind].format(bid=i) + '.weight' for kind in known for i in range(7)}
    assert {tensor.name for tensor in reader.tensors} <= names
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    decoder = model.model.decoder
    keys = {
        'context_length': 131_072 if name == 'gemma3' else 8192,
        'embedding_length': 16,
        'block_count': decoder.depth,
        'feed_forward_length': 24,
        'attention.head_count': 4,
        'attention.head_count_kv': decoder.num_kv_heads or 4,
        'attention.key_length': 8,
        'attention.value_length': 8,
        'attention.layer_norm_rms_epsilon': pytest.approx(1e-6),
        'vocab_size': 300,
    }
    keys |= {
        'gemma': {},
        'gemma2': {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': pytest.approx(0.05)},
        'gemma3': {'rope.freq_base': 1e6, 'rope.freq_base_swa': 1e4, 'rope.scaling.factor': 8.0},
    }[name]
    if name != 'gemma':
        keys['attention.sliding_window'] = 4
    found = {key: field.contents() for key, field in reader.fields.items()}
    assert {key: found[f'{name}.{key}'] for key in keys} == keys
    general = ('architecture', 'type', 'file_type')
    assert [found[f'general.{key}'] for key in general] == [name, 'model', 0]
    pieces = [found[f'tokenizer.ggml.{key}'] for key in ('tokens', 'scores', 'token_type')]
    assert {len(values) for values in pieces} == {300} and found['tokenizer.ggml.add_bos_token']
    assert pieces[2][:4] == [3, 3, 3, 2] and pieces[0][:4] == ['<pad>', '</s>', '<s>', '<unk>']


@pytest.mark.parametrize('text', ['a red three', 'two  blue circles', '\nwhat is green ?', 'naïve ☃', '<loc0007>'])
def test_the_tokenizer_comes_back(tmp_path, text):
    for name in ('gemma3', 'paligemma'):
        model = golden(name)
        theirs, ours = write(tmp_path / f'{name}.gguf', model), model.fitted(model.own_tokenizer())
        back = theirs.fitted(theirs.own_tokenizer())
        assert (back.base, back.vocab_size, back.pad_id) == (ours.base, ours.vocab_size, ours.pad_id)
        assert back.pieces() == ours.pieces() and back.encode(text) == ours.encode(text)


def test_the_decoder_of_a_bundle(tmp_path, capsys):
    """Its location tokens are pieces there; the image tower and its projection stay behind."""
    bundle.convert(GOLDENS / 'paligemma', tmp_path / 'bundle')
    assert convert.main([str(tmp_path / 'bundle'), str(tmp_path / 'x.gguf')]) == 0
    assert capsys.readouterr().out == f'{tmp_path}/x.gguf: gguf\n'
    got, whole = interop.read(tmp_path / 'x.gguf'), interop.read(GOLDENS / 'paligemma')
    assert (got.family, got.vocab_size, got.model.decoder) == ('gemma', 1452, whole.model.decoder)
    assert set(got.weights.shapes) == {name for name in whole.weights.shapes if name.startswith('llm/')}
    same(got.weights, whole.weights)
    tokens = gguf_files.read(tmp_path / 'x.gguf').said['tokenizer.ggml.tokens']
    assert tokens[300] == b'<loc0000>' and tokens[1451] == b'<seg127>'
    assert convert.main([str(tmp_path / 'x.gguf'), str(tmp_path / 'folder')]) == 0
    assert interop.read(tmp_path / 'folder').own_tokenizer().base == 300


@pytest.mark.parametrize(('precision', 'bound'), [('F16', 2**-11), ('BF16', 2**-8), ('Q8_0', 1 / 127)])
def test_matrices_in_fewer_bits(tmp_path, precision, bound):
    """Of o_proj, which alone has rows as long as a block of 32; norms stay float32."""
    model = golden('gemma')
    got = write(tmp_path / 'x.gguf', model, precision)
    name = 'llm/layers/attn/attn_vec_einsum/w'
    a, b = got.weights.read(name), model.weights.read(name)
    assert 0 < np.abs(a - b).max() <= bound * np.abs(b).max()
    for norm in ('llm/final_norm/scale', 'llm/layers/pre_ffw_norm/scale'):
        np.testing.assert_array_equal(got.weights.read(norm) + 1, model.weights.read(norm) + 1)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / 'x.gguf').tensors}
    assert kinds['blk.1.attn_output.weight'] == precision and kinds['blk.1.ffn_norm.weight'] == 'F32'
    assert gguf_files.read(tmp_path / 'x.gguf').said['general.file_type'] == gguf_files.PRECISIONS[precision]


def test_rows_of_padding_are_named_as_such(tmp_path):
    """A Gemma 3 of 4B has 64 rows more than pieces."""
    model = golden('gemma')
    rows = pretrained.padded(300)
    shapes = dict(model.weights.shapes)
    shapes[TABLE] = dataclasses.replace(model, vocab_size=rows).expected()[TABLE]
    table = np.pad(model.weights.read(TABLE), ((0, rows - 300), (0, 0)), constant_values=2.0)
    lazy = dataclasses.replace(
        model.weights, shapes=shapes, read=lambda name: table if name == TABLE else model.weights.read(name)
    )
    got = write(tmp_path / 'x.gguf', dataclasses.replace(model, vocab_size=rows, weights=lazy))
    np.testing.assert_array_equal(got.weights.read(TABLE), table)
    assert got.vocab_size == rows and got.own_tokenizer().base == 300
    assert gguf_files.read(tmp_path / 'x.gguf').said['tokenizer.ggml.tokens'][-1] == f'[PAD{rows - 1}]'.encode()


@pytest.mark.parametrize(
    ('name', 'decoder', 'message'),
    [
        ('siglip', {}, 'is a siglip: GGUF files are written of Gemmas'),
        ('gemma', {'final_softcap': 30.0}, 'final_softcap 30.0, and llama.cpp computes such a gemma with 0.0'),
        ('gemma2', {'attn_softcap': 0.0}, 'softcap 0.0, and llama.cpp computes such a gemma2 with 50.0'),
        ('gemma2', {'final_softcap': 0.0}, 'final_softcap 0.0, and llama.cpp computes such a gemma2 with 30.0'),
        ('gemma2', {'variant': 'gemma2_27b'}, 'scale_by_width True, and llama.cpp computes such a gemma2 with False'),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(tmp_path, name, decoder, message):
    model = golden(name, **decoder)
    with pytest.raises(UserError, match=message) as error:
        gguf_gemma.write(tmp_path / 'x.gguf', model, Tokenizer.load(GOLDENS / 'gemma' / 'tokenizer.model'))
    assert '\n' not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('field', 'value'), [('causal_prompt', False), ('separator', '\n')])
def test_a_decoder_alone_that_was_trained_with_other_prompts(tmp_path, field, value):
    model = golden('gemma')
    model = dataclasses.replace(model, settings=dataclasses.replace(model.settings, **{field: value}))
    said = re.escape(f'contract.{field} is {value!r}, and')
    with pytest.raises(UserError, match=f'{said} llama.cpp reads the prompt of a Gemma with .*: keep the bundle'):
        write(tmp_path / 'x.gguf', model)
    with pytest.raises(UserError, match=f'{said} transformers computes a gemma with .*: keep the bundle'):
        hugging_face.write(tmp_path / 'folder', model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('source', 'flags', 'message'),
    [
        ('gemma', ['--precision=Q2'], "unknown precision 'Q2'.*alid: BF16, F16, F32, Q8_0"),
        ('gemma', ['--to=npz', '--precision=F16'], 'precision=F16 has no effect: only a GGUF'),
        ('gemma.npz', [], 'comes without a SentencePiece tokenizer, and a GGUF has one: --tokenizer=FILE'),
        ('gemma', [f'--tokenizer={GOLDENS}/siglip/spiece.model'], 'has 34 pieces .* 300 rows'),
    ],
)
def test_refused_in_one_line_and_nothing_is_left(tmp_path, capsys, source, flags, message):
    bundle.convert(GOLDENS / 'gemma', tmp_path / 'gemma.npz')
    source = tmp_path / source if source.endswith('.npz') else GOLDENS / source
    assert convert.main([str(source), str(tmp_path / 'x.gguf'), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and re.search(message, err), err
    assert [file.name for file in tmp_path.iterdir()] == ['gemma.npz']


def test_a_tokenizer_of_another_kind(tmp_path):
    with pytest.raises(UserError, match="spiece.model is not of Gemma's kind: byte pairs"):
        Tokenizer.load(GOLDENS / 'siglip' / 'spiece.model').pieces()
