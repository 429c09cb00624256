"""The doctor with transformers as the oracle: every family agrees, and every planted fault is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from doctor_faults import FAULTS, PROMPT

from big_vlm import bundle
from big_vlm.checks import doctor
from big_vlm.data.tokenizer import USER_DEFINED, Tokenizer
from big_vlm.interop import hugging_face
from tools import make_goldens

pytest.importorskip('torch')
pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

GOLDENS = Path(__file__).parents[1] / 'goldens'
WHOLE = ('siglip', 'siglip2', 'siglip2_naflex', 'paligemma', 'paligemma2')
DECODERS = ('gemma', 'gemma2', 'gemma3')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Of each golden the bundle NAME, and NAME_hf, a folder with processor and tokenizer."""
    folder = tmp_path_factory.mktemp('made')
    for name in WHOLE + DECODERS:
        bundle.convert(GOLDENS / name, folder / name)
        bundle.convert(folder / name, folder / f'{name}_hf')
    return folder


def causes(report):
    return [(finding.stage, [name for name, _ in finding.causes]) for finding in report.findings]


@pytest.mark.parametrize('name', WHOLE)
def test_a_converted_bundle_computes_what_transformers_does(made, name):
    report = doctor.examine(made / name, made / f'{name}_hf', prompt=PROMPT)
    assert report.oracle.startswith('transformers 5') and report.agrees and report.findings == ()
    assert all(error is not None for error in report.errors.values())


@pytest.mark.parametrize('name', DECODERS)
def test_a_decoder_alone_computes_what_transformers_does(made, name):
    report = doctor.examine(made / name, made / f'{name}_hf', prompt='a red three in the top left')
    assert report.agrees and report.errors['token ids'] == 0.0 and 'decoder layer 1' in report.errors


def test_the_decoder_of_a_gemma_3_with_an_image_tower(tmp_path):
    import transformers

    text = transformers.Gemma3TextConfig(**make_goldens.DECODER | make_goldens.GEMMA3, vocab_size=300)
    vision = make_goldens.VISION | dict(vision_use_head=False)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=9)
    model = make_goldens.randomize(transformers.Gemma3ForConditionalGeneration(config))
    model.save_pretrained(tmp_path / 'theirs')
    shutil.copy(GOLDENS / 'gemma3' / 'tokenizer.model', tmp_path / 'theirs')
    bundle.convert(tmp_path / 'theirs', tmp_path / 'bundle')
    report = doctor.examine(tmp_path / 'bundle', tmp_path / 'theirs', prompt='a red three in the top left')
    assert report.oracle.startswith('transformers') and report.agrees and 'decoder layer 6' in report.errors


def test_what_the_folder_has_no_files_for_is_not_compared(made):
    report = doctor.examine(made / 'siglip', GOLDENS / 'siglip', prompt=PROMPT)
    assert report.errors['pixels'] is None and report.errors['token ids'] is None
    assert report.agrees


@pytest.mark.parametrize('fault', FAULTS)
def test_a_planted_fault_is_named(made, tmp_path, fault):
    golden, plant, stage, cause = FAULTS[fault]
    plant(made / golden, tmp_path / 'bundle')
    report = doctor.examine(tmp_path / 'bundle', made / f'{golden}_hf', prompt=PROMPT)
    assert report.first == stage
    assert causes(report) == [(stage, [cause])]


def test_a_newline_tokenized_with_the_prompt(made, tmp_path):
    """With Gemma's pieces two newlines are one: a prompt that ends in one is read otherwise."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((GOLDENS / 'paligemma' / 'tokenizer.model').read_bytes())
    model.pieces[-1].piece, model.pieces[-1].type = '\n\n', USER_DEFINED
    (tmp_path / 'tokenizer.model').write_bytes(model.SerializeToString())
    assert len(Tokenizer.load(tmp_path / 'tokenizer.model').encode('\n\n')) == 1
    bundle.convert(GOLDENS / 'paligemma', tmp_path / 'bundle', tokenizer=tmp_path / 'tokenizer.model')
    bundle.convert(tmp_path / 'bundle', tmp_path / 'folder')
    assert doctor.examine(tmp_path / 'bundle', tmp_path / 'folder', prompt='red').agrees
    report = doctor.examine(tmp_path / 'bundle', tmp_path / 'folder', prompt='red\n')
    assert causes(report) == [('token ids', ['newline'])]
    assert report.findings[0].causes[0][1] == 'tokenized on its own here, together with the prompt in the oracle'


def test_punctuation(made):
    report = doctor.examine(made / 'siglip', made / 'siglip_hf', prompt='A  (red) three!')
    assert causes(report) == [('token ids', ['punctuation'])]


def test_siglip_2_with_gemmas_tokenizer_keeps_capitals(made, tmp_path):
    shutil.copytree(made / 'siglip2_hf', tmp_path / 'folder')
    file = tmp_path / 'folder' / 'tokenizer_config.json'
    content = json.loads(file.read_text())
    assert content['tokenizer_class'] == 'Siglip2Tokenizer'
    file.write_text(json.dumps(content | {'tokenizer_class': 'GemmaTokenizer'}))
    report = doctor.examine(made / 'siglip2', tmp_path / 'folder', prompt='Red')
    assert causes(report) == [('token ids', ['case'])]


@pytest.mark.parametrize(
    ('golden', 'name', 'change', 'stage', 'cause'),
    [
        (
            'siglip',
            'img/MAPHead_0/MultiHeadDotProductAttention_0/value/kernel',
            lambda w: w.reshape(16, 16).T.reshape(w.shape),
            'image pooled',
            'transposed projection',
        ),
        ('gemma3', 'llm/final_norm/scale', lambda w: w + 1, 'decoder norm', 'norm offset'),
        ('paligemma', 'img/head/kernel', lambda w: w.T, 'image projected', 'transposed projection'),
        ('paligemma', 'img/embedding/kernel', lambda w: w.swapaxes(0, 1), 'image patches', 'transposed projection'),
    ],
)
def test_a_reader_that_is_wrong_both_times(made, monkeypatch, golden, name, change, stage, cause):
    """Both sides' files are read by it: only transformers knows better."""
    read = hugging_face.read

    def wrong(folder):
        model = read(folder)
        return dataclasses.replace(model, weights=model.weights.changed(name, model.weights.shapes[name].shape, change))

    monkeypatch.setattr(hugging_face, 'read', wrong)
    report = doctor.examine(made / f'{golden}_hf', made / f'{golden}_hf', prompt=PROMPT)
    assert causes(report) == [(stage, [cause])] and not report.weights


def test_transformers_runs_an_npz(tmp_path):
    """As a folder that is written for it; the preprocessing is the file's, big_vision's."""
    bundle.convert(GOLDENS / 'paligemma', tmp_path / 'x.npz')
    bundle.convert(tmp_path / 'x.npz', tmp_path / 'x', tokenizer=GOLDENS / 'paligemma' / 'tokenizer.model')
    report = doctor.examine(tmp_path / 'x', tmp_path / 'x.npz', oracle='transformers', prompt=PROMPT)
    assert report.oracle.startswith('transformers') and report.agrees
    assert report.errors['pixels'] == report.errors['token ids'] == 0.0 < report.errors['logits']


def test_a_folder_of_version_4(made, tmp_path):
    """Its processor says bilinear: so does the cause."""
    shutil.copytree(made / 'siglip_hf', tmp_path / 'folder')
    file = tmp_path / 'folder' / 'preprocessor_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'resample': 2}))
    report = doctor.examine(made / 'siglip', tmp_path / 'folder', prompt=PROMPT)
    detail = 'bicubic with antialias here, bilinear with antialias in the oracle'
    assert report.findings == (doctor.Finding('pixels', (('resampling', detail),)),)
    assert np.isfinite(report.errors['pixels'])
