"""The doctor without torch: our own code on an `.npz` is the oracle, and bundles have a fault planted."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from doctor_faults import FAULTS, LLM_NORMS, PROMPT, weights

from big_vlm import bundle, interop
from big_vlm.checks import doctor, faults, states
from big_vlm.config import UserError

GOLDENS = Path(__file__).parents[1] / 'goldens'
TOKENIZERS = {'siglip': 'spiece.model', 'paligemma2': 'tokenizer.model', 'gemma': 'tokenizer.model'}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """NAME.npz and the bundle NAME of it, of three goldens."""
    folder = tmp_path_factory.mktemp('made')
    for name, tokenizer in TOKENIZERS.items():
        bundle.convert(GOLDENS / name, folder / f'{name}.npz')
        bundle.convert(folder / f'{name}.npz', folder / name, tokenizer=GOLDENS / name / tokenizer)
    return folder


@pytest.mark.parametrize('name', TOKENIZERS)
def test_a_bundle_agrees_with_the_file_it_was_made_of(made, name):
    report = doctor.examine(made / name, made / f'{name}.npz', prompt=PROMPT)
    assert report.agrees and report.first is None and report.findings == ()
    assert set(report.errors.values()) == {0.0}


def test_stages_come_in_the_order_of_computation(made):
    report = doctor.examine(made / 'paligemma2', made / 'paligemma2.npz', prompt=PROMPT)
    assert list(report.errors) == [
        *('pixels', 'token ids', 'image patches', 'image positions', 'image layer 0', 'image layer 1', 'image norm'),
        *('image projected', 'decoder image slots', 'decoder text slots', 'decoder layer 0', 'decoder layer 1'),
        *('decoder layer 2', 'decoder norm', 'logits'),
    ]


# SigLIP 1 pads with the end token: a missing one is seen where they differ.
@pytest.mark.parametrize('fault', [name for name, (golden, *_) in FAULTS.items() if golden in TOKENIZERS])
def test_a_planted_fault_is_named(made, tmp_path, fault):
    golden, plant, stage, cause = FAULTS[fault]
    plant(made / golden, tmp_path / 'bundle')
    report = doctor.examine(tmp_path / 'bundle', made / f'{golden}.npz', prompt=PROMPT)
    assert report.first == stage
    assert [(finding.stage, [name for name, _ in finding.causes]) for finding in report.findings] == [(stage, [cause])]


def test_punctuation_that_the_oracle_leaves_out(made, monkeypatch):
    """As transformers does for a SigLIP 1, after it has lower-cased."""

    def opened(*paths):
        side, other = states.open_pair(*paths)
        return side, dataclasses.replace(other, bare=True)

    monkeypatch.setattr(doctor, 'open_pair', opened)
    report = doctor.examine(made / 'siglip', made / 'siglip.npz', prompt='A  (red) three!')
    detail = 'kept as it is written here, left out in the oracle, and spaces folded'
    assert report.findings == (doctor.Finding('token ids', (('punctuation', detail),)),)


def test_several_faults_are_named_one_after_the_other(made, tmp_path):
    FAULTS['norm offset'][1](made / 'paligemma2', tmp_path / 'one')
    FAULTS['softcap'][1](tmp_path / 'one', tmp_path / 'two')
    FAULTS['newline'][1](tmp_path / 'two', tmp_path / 'three')
    report = doctor.examine(tmp_path / 'three', made / 'paligemma2.npz', prompt=PROMPT)
    assert [(finding.stage, [name for name, _ in finding.causes]) for finding in report.findings] == [
        ('token ids', ['newline']),
        ('decoder layer 0', ['norm offset']),
        ('logits', ['softcap']),
    ]


def test_two_faults_at_once_are_told_apart(made, tmp_path):
    FAULTS['case'][1](made / 'siglip', tmp_path / 'one')
    FAULTS['padding id'][1](tmp_path / 'one', tmp_path / 'two')
    [finding] = doctor.examine(tmp_path / 'two', made / 'siglip.npz', prompt=PROMPT).findings
    assert [name for name, _ in finding.causes] == ['case', 'padding id']


def test_what_is_not_known_gets_no_name(made, tmp_path):
    weights(['llm/layers/mlp/gating_einsum'], lambda w: w * 1.01)(made / 'paligemma2', tmp_path / 'bundle')
    report = doctor.examine(tmp_path / 'bundle', made / 'paligemma2.npz', prompt=PROMPT)
    assert report.findings == (doctor.Finding('decoder layer 0', ()),)
    assert report.weights == {'llm/layers/mlp/gating_einsum': pytest.approx(0.01, rel=1e-3)}


def test_weights_are_compared_where_no_state_shows_them(made, tmp_path):
    """The norm after Gemma 2's MLP takes any factor away again."""
    weights(['llm/layers/mlp/linear'], lambda w: w * 1.01)(made / 'paligemma2', tmp_path / 'bundle')
    report = doctor.examine(tmp_path / 'bundle', made / 'paligemma2.npz', prompt=PROMPT)
    assert report.first is None and report.findings == () and not report.agrees
    assert list(report.weights) == ['llm/layers/mlp/linear']


def test_a_reader_that_is_wrong_both_times(made):
    """The files agree, the oracle's states do not: every norm and every square projection is tried."""
    right, _ = states.open_pair(made / 'siglip', made / 'siglip')
    image, tokens = right.pixels(np.zeros((14, 14, 3), np.uint8)), right.tokens(PROMPT, '')
    expected = right.states(image, tokens)
    name = 'img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel'
    heads_first = right.weights[name]
    matrices = heads_first.reshape(2, 16, 16).transpose(0, 2, 1).reshape(heads_first.shape)
    wrong = dataclasses.replace(right, weights={**right.weights, name: matrices})
    errors = {k: states.relative_error(x, expected[k]) for k, x in wrong.states(image, tokens).items()}
    assert doctor.first_divergence(errors) == 'image layer 0'
    mended = []
    for [fault] in faults.of_states(wrong, wrong, 'image layer 0'):
        again = fault.mend(wrong).states(image, tokens)
        if states.relative_error(again['image layer 0'], expected['image layer 0']) <= doctor.LIMIT:
            mended.append((fault.name, fault.detail))
    theirs = 'vision_model.encoder.layers.{i}.self_attn.out_proj.weight'
    assert mended == [('transposed projection', f'{theirs}, in {name}')]


@pytest.mark.slow
def test_a_decoder_alone(tmp_path):
    """What an .npz cannot say: the cap of Gemma 2, and that queries are scaled as in the 27B."""
    bundle.convert(GOLDENS / 'gemma2', tmp_path / 'gemma2.npz')
    report = doctor.examine(tmp_path / 'gemma2.npz', GOLDENS / 'gemma2', oracle='big_vlm')
    assert [(finding.stage, [name for name, _ in finding.causes]) for finding in report.findings] == [
        ('decoder layer 0', ['setting', 'setting']),
        ('logits', ['softcap']),
    ]
    details = [detail for _, detail in report.findings[0].causes]
    assert details[0].startswith("model.decoder.variant 'gemma2_2b' here and 'gemma2_27b' in the oracle")
    assert details[1] == 'model.decoder.window 0 here and 4 in the oracle'
    assert report.findings[1].causes[0][1] == 'output logits are not capped here, capped at 0.05 in the oracle'


def test_errors_are_relative_to_the_oracles_largest_value():
    assert states.relative_error(np.array([1.0, 9.0]), np.array([2.0, 10.0])) == pytest.approx(0.1)
    assert states.relative_error(np.zeros(2), np.zeros(3)) == np.inf
    assert doctor.first_divergence({'a': None, 'b': 1e-6, 'c': float('nan'), 'd': 1.0}) == 'c'


@pytest.mark.parametrize(
    ('source', 'against', 'options', 'message'),
    [
        ('siglip', 'paligemma2.npz', {}, 'is a siglip, .* a paligemma: nothing to compare'),
        (GOLDENS / 'siglip', 'siglip.npz', {'oracle': 'big_vlm'}, 'reads images of 14 pixels, .* of 12: nothing'),
        ('siglip', 'nothing.npz', {}, 'nothing.npz: cannot be read'),
        ('siglip', 'siglip.npz', {'oracle': 'torch'}, "unknown oracle 'torch'.*valid: big_vlm, transformers"),
        (GOLDENS / 'paligemma', 'paligemma2.npz', {}, 'is not a model as .*: .* missing .*post_attention_norm'),
        ('siglip.npz', 'siglip.npz', {}, 'neither .* comes with a tokenizer'),
        ('paligemma2', 'paligemma2.npz', {'prompt': 'red ' * 200}, 'the prompt takes'),
        ('gemma', 'gemma.npz', {'image': 'a.png'}, 'is a decoder alone and sees no images: leave the image out'),
        ('gemma', 'gemma.npz', {'prompt': 'red ' * 9000}, 'the prompt takes'),
        ('paligemma2', 'paligemma2.npz', {'answer': 'red ' * 200}, 'prompt and answer do not fit into the 128 text'),
    ],
)
def test_refusals_are_one_line(made, source, against, options, message):
    with pytest.raises(UserError, match=message) as error:
        doctor.examine(made / source, made / against, **options)
    assert '\n' not in str(error.value)


def test_without_torch_it_says_what_to_install(made, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'torch', None)
    with pytest.raises(UserError, match=r"torch is not installed: pip install -e '\.\[parity\]'.*--oracle=big_vlm"):
        doctor.examine(made / 'siglip', GOLDENS / 'siglip')


def test_the_norms_of_the_goldens_are_all_moved():
    """`LLM_NORMS` above leaves none out."""
    names = [name for name in interop.read(GOLDENS / 'paligemma2').weights.shapes if name.startswith('llm/')]
    assert all(any(norm in name for norm in LLM_NORMS) for name in names if name.endswith('/scale'))
