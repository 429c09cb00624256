"""Against transformers itself: it loads what we write and computes the same; it still computes what the goldens say."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import big_vlm
from big_vlm import bundle, interop
from big_vlm.data import prompts
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import hugging_face, tokenizer_json
from tools import make_goldens

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # torch rounds by the processor it runs on, and the goldens come from another
GOLDENS = Path(__file__).parents[1] / 'goldens'
CLASSES = {
    'siglip': transformers.SiglipModel,
    'siglip2': transformers.SiglipModel,
    'siglip2_naflex': transformers.Siglip2Model,
    'paligemma': transformers.PaliGemmaForConditionalGeneration,
    'paligemma2': transformers.PaliGemmaForConditionalGeneration,
    'gemma': transformers.GemmaForCausalLM,
    'gemma2': transformers.Gemma2ForCausalLM,
    'gemma3': transformers.Gemma3ForCausalLM,
}
TEXTS = ('a red three', 'two  blue circles', '\nwhat is green ?')


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Each golden → ours → a folder; the whole models by way of a bundle, with pixels and tokenizer."""
    top = tmp_path_factory.mktemp('exported')
    for name in CLASSES:
        if name.startswith('gemma'):
            hugging_face.write(top / name, interop.read(GOLDENS / name))
        else:
            bundle.convert(GOLDENS / name, top / f'{name}_bundle')
            bundle.convert(top / f'{name}_bundle', top / name)
    return top


def outputs(name):
    with np.load(GOLDENS / name / 'outputs.npz', allow_pickle=False) as file:
        return dict(file)


def run(model, name):
    """What the golden calls `logits`, and embeddings if there are any."""
    golden = outputs(name)
    text = torch.tensor(golden['text']).long()
    pixels = torch.tensor(golden['image'].transpose(0, 3, 1, 2)) if 'image' in golden else None
    with torch.no_grad():
        if name.startswith('siglip'):
            rows = ('pixel_values', 'pixel_attention_mask', 'spatial_shapes')
            images = {key: torch.tensor(golden[key]) for key in rows} if pixels is None else dict(pixel_values=pixels)
            out = model(input_ids=text, **images)
            return dict(logits=out.logits_per_image, image_embeds=out.image_embeds, text_embeds=out.text_embeds)
        if name.startswith('gemma'):
            return dict(logits=model(text).logits)
        tokens = golden['logits'].shape[-1]
        out = model(
            input_ids=torch.where(text < 0, tokens, text),
            pixel_values=pixels,
            attention_mask=torch.ones_like(text),
            token_type_ids=torch.tensor(golden['suffix']).long(),
        )
        return dict(logits=out.logits[:, 8:, :tokens])


@pytest.mark.parametrize('name', CLASSES)
def test_transformers_loads_what_we_write_and_computes_the_same(exported, name):
    model, info = CLASSES[name].from_pretrained(exported / name, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
    golden = outputs(name)
    for key, value in run(model, name).items():
        np.testing.assert_allclose(value, golden[key], rtol=0, atol=TOLERANCE * np.abs(golden[key]).max(), err_msg=key)


@pytest.mark.parametrize('name', CLASSES)
def test_the_goldens_are_what_transformers_computes(name):
    model, golden = CLASSES[name].from_pretrained(GOLDENS / name), outputs(name)
    for key, value in run(model, name).items():
        np.testing.assert_allclose(value, golden[key], rtol=0, atol=TOLERANCE * np.abs(golden[key]).max(), err_msg=key)


@pytest.mark.parametrize('name', ['siglip', 'siglip2', 'siglip2_naflex', 'paligemma', 'paligemma2'])
def test_texts_become_the_same_ids(exported, name):
    theirs = transformers.AutoTokenizer.from_pretrained(exported / name)
    model = interop.read(exported / name)
    ours = model.fitted(Tokenizer.load(model.tokenizer))
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad_id, ours.eos_id)
    # SigLIP 1's tokenizer strips punctuation and folds spaces, which big_vision does not.
    for text in TEXTS[:1] if name == 'siglip' else TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), text
    if name.startswith('paligemma'):
        assert theirs('<loc0007><seg003>', add_special_tokens=False).input_ids == ours.encode('<loc0007><seg003>')
        config = json.loads((exported / name / 'config.json').read_text())
        assert theirs.convert_tokens_to_ids('<image>') == config['image_token_index'] == 1452
    else:
        for text in ('red', 'a red three in the top left', 'A Red THREE'):  # padded, and cut
            row, _ = prompts.contrastive_text(ours.encode(text.lower()), model.contract(ours))
            assert theirs(text, padding='max_length', truncation=True).input_ids == row.tolist()


@pytest.mark.parametrize('name', ['siglip2', 'paligemma2'])
def test_a_tokenizer_that_transformers_saved(exported, tmp_path, name):
    """It leaves out the SentencePiece model; what is made of its file gives the same ids."""
    theirs = transformers.AutoTokenizer.from_pretrained(exported / name)
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / 'tokenizer.model').exists()
    ours, before = tokenizer_json.read(tmp_path / 'tokenizer.json'), Tokenizer.load(exported / name / 'tokenizer.model')
    assert ours.same_pieces(before)
    assert [kind for _, _, kind in ours.pieces()] == [kind for _, _, kind in before.pieces()]
    for text in (*TEXTS, 'naïve ☃', 'two\ttabs '):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), text


def test_pixels_become_the_same(exported):
    theirs = transformers.AutoImageProcessor.from_pretrained(exported / 'siglip')
    image = np.random.default_rng(0).integers(0, 256, (14, 14, 3), np.uint8)
    got = theirs(images=[image], return_tensors='np')['pixel_values'][0]
    np.testing.assert_allclose(got.transpose(1, 2, 0), image / 127.5 - 1, atol=1e-6)


def test_the_key_for_antialias_is_nothing_to_transformers(exported, tmp_path):
    model = interop.read(exported / 'siglip')
    image, made = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8), []
    for antialias in (False, True):
        folder = tmp_path / str(antialias)
        hugging_face.write(
            folder, dataclasses.replace(model, settings=dataclasses.replace(model.settings, antialias=antialias))
        )
        assert ('antialias' in json.loads((folder / 'preprocessor_config.json').read_text())) != antialias
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend='pil')
        made.append(np.asarray(processor(images=[image], return_tensors='pt')['pixel_values']))
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize('seed', [1, 2])
def test_naflex_embeds_pictures_of_any_shape_as_transformers(tmp_path, seed):
    """Random weights as transformers saves them → a bundle, against its model and its image processor."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    golden = GOLDENS / 'siglip2_naflex'
    theirs = make_goldens.randomize(transformers.Siglip2Model.from_pretrained(golden), seed)
    theirs.save_pretrained(tmp_path / 'theirs')
    processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=20 + seed)
    processor.save_pretrained(tmp_path / 'theirs')
    tokenizer = golden / 'tokenizer.model'
    bundle.convert(tmp_path / 'theirs', tmp_path / 'bundle', tokenizer=tokenizer)
    towers = big_vlm.load(tmp_path / 'bundle')
    rng = np.random.default_rng(seed)
    shapes = [(40, 30), (16, 90), (90, 16), (11, 11), (6, 200), (2, 7)]
    pictures = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    texts = ['a red three', 'two blue circles']
    ours = towers.embed(images=pictures, texts=texts)
    ids = [prompts.contrastive_text(towers.tokenizer.encode(text), towers.contract)[0] for text in texts]
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(np.stack(ids)).long(), **processor(pictures, return_tensors='pt'))
    for name, expected in (('image', out.image_embeds), ('text', out.text_embeds)):
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=2e-5 * np.abs(expected.numpy()).max())
    # And back: what is written is what was read.
    bundle.convert(tmp_path / 'bundle', tmp_path / 'again')
    again, info = transformers.Siglip2Model.from_pretrained(tmp_path / 'again', output_loading_info=True)
    assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
