"""A NaFlex dual encoder, and a decoder with its eyes, through a whole run: evaluated, reported, bundled, exported."""

import jax
import micro_config
import micro_run as runs
import numpy as np
import pytest

import big_vlm
from big_vlm import bundle, config, interop
from big_vlm.checkpoints import trees
from big_vlm.data import naflex
from big_vlm.training import run_report, stages

PATCHES = 6


def make(data_dir):
    raw = micro_config.pretrain(data_dir, steps=3)
    looks = f'decode | naflex({PATCHES})'
    raw['contract'] = dict(max_patches=PATCHES, text_length=32)
    raw['data'] = micro_config.data(data_dir, captions=f'{looks} | text("caption")')
    color, retrieval = raw['evals']['color'], raw['evals']['retrieval']
    color['pipeline'] = color['pipeline'].replace('decode | resize(32)', looks)
    retrieval['pipeline'] = looks
    answers = micro_config.multimodal(data_dir, steps=3)
    answers['contract'] = dict(max_patches=PATCHES, text_length=32)
    tasks = dict(caption=f'{looks} | {micro_config.CAPTION} | tokenize', ask=f'{looks} | question | tokenize')
    answers['data'] = micro_config.data(data_dir, **tasks)
    answers['evals']['answer']['pipeline'] = tasks['ask']
    return config.validate(dict(stages=('pretrain', 'answers'), pretrain=raw, answers=answers))


@pytest.mark.slow
def test_through_a_run(tmp_path, tiny_digit_scenes, one_device, capsys):
    run = make(tiny_digit_scenes)
    stages.check(run)
    bundles = stages.run(run, tmp_path / 'run')
    folder = bundles['pretrain']
    assert runs.scores(tmp_path / 'run', 'pretrain')['retrieval']['image_to_text/R@1']['n'] == 16
    towers = big_vlm.load(folder)
    assert (towers.contract.max_patches, towers.contract.patch_size) == (PATCHES, 16)
    pictures = [
        np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8) for i, shape in enumerate([(9, 70), (64, 32)])
    ]
    together = towers.embed(images=pictures)['image']
    np.testing.assert_allclose(towers.embed(images=pictures[1])['image'][0], together[1], atol=1e-5)
    page, _ = run_report.make(run, tmp_path / 'run', bundles, 'naflex')
    assert page.is_file() and 'pictures of the report' not in capsys.readouterr().out
    # As StableHLO: the same from a row of patches.
    bundle.export(towers, tmp_path / 'hlo', platforms=('cpu',))
    exported = jax.export.deserialize(bytearray((tmp_path / 'hlo' / 'embed_image.stablehlo').read_bytes()))
    row = {name: value[None] for name, value in naflex.rows(pictures[0], towers.contract).items()}
    np.testing.assert_allclose(exported.call(trees.flat(towers.params), row)['embedding'][0], together[0], atol=1e-5)
    # As big_vision's file and back; transformers pools texts otherwise.
    bundle.convert(folder, tmp_path / 'x.npz')
    model = interop.read(tmp_path / 'x.npz')
    assert (model.settings.max_patches, model.build().img.sizes['patch_size']) == (256, 16)
    with pytest.raises(config.UserError, match="model.text.pool is 'mean', .* a siglip2 with 'last': write an .npz"):
        bundle.convert(folder, tmp_path / 'folder')
    with pytest.raises(config.UserError, match='takes images of any size: leave out --image_size'):
        bundle.convert(folder, tmp_path / 'y.npz', image_size=64)
    # The decoder: an answer depends on its own picture alone; big_vision's file is its; transformers has none like it.
    model = big_vlm.load(bundles['answers'])
    together = model.generate(pictures, 'caption en', max_new_tokens=3)
    [alone] = model.generate(pictures[0], 'caption en', max_new_tokens=3)
    assert alone.ids == together[0].ids
    np.testing.assert_allclose(alone.log_probs, together[0].log_probs, atol=1e-5)
    bundle.export(model, tmp_path / 'hlo_answers', platforms=('cpu',), max_new_tokens=2)
    bundle.convert(bundles['answers'], tmp_path / 'answers.npz')
    assert interop.read(tmp_path / 'answers.npz').settings.max_patches == 256
    with pytest.raises(config.UserError, match=f'contract.max_patches is {PATCHES}, .*: write an .npz instead'):
        bundle.convert(bundles['answers'], tmp_path / 'folder')
