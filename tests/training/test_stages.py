"""The stages of a run, in miniature: what each leaves behind, what the next takes over, and what is refused."""

import dataclasses
import html
import json
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import micro_run as runs
import numpy as np
import pytest
from PIL import Image

import big_vlm
from big_vlm import checkpoints
from big_vlm.checkpoints import trees
from big_vlm.config import UserError
from big_vlm.ops import position_resize
from big_vlm.reports.writers import read_csv
from big_vlm.training import initial_weights, remembered, run_report, signals, stages, tokenizers, workdirs
from big_vlm.training import step as steps

STAGES = ('pretrain', 'multimodal', 'transfer')


def weights(folder, part=''):
    return trees.flat(checkpoints.load_weights(folder, part=part))


@pytest.mark.smoke
def test_every_stage_leaves_a_bundle_and_its_numbers(micro_run):
    assert {p.name for p in micro_run.iterdir()} == {
        *STAGES,
        '.lock',
        'config.json',
        'tokenizer.model',
        'report.html',
        'said.txt',
    }
    for name, total in zip(STAGES, (6, 6, 4), strict=True):
        folder = micro_run / name
        table = read_csv(folder / 'metrics.csv')
        assert [step for step, _ in table['loss']] == list(range(1, total + 1))
        assert sorted(p.name for p in (folder / 'checkpoints').iterdir())[-1] == str(total)
        bundled, saved = weights(folder / 'bundle'), weights(folder / 'checkpoints')
        assert sorted(bundled) == sorted(saved)
        for path in saved:
            np.testing.assert_array_equal(bundled[path], saved[path], err_msg=path)
        assert json.loads((folder / 'bundle' / 'bundle.json').read_text())['scores'] == runs.scores(micro_run, name)
    said = (micro_run / 'said.txt').read_text()
    assert not [word for word in ('Traceback', 'arning', 'pictures of the report') if word in said]
    assert f'report: {micro_run}/report.html' in said


@pytest.mark.smoke
def test_the_last_bundle_answers(micro_run):
    model = big_vlm.load(micro_run / 'transfer' / 'bundle')
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    [answer] = model.generate(image, 'what is in the center ?', max_new_tokens=3)
    assert 1 <= len(answer.ids) <= 3
    [other] = model.generate(image, 'what is in the center ?', max_new_tokens=3)
    assert answer == other


def test_scores_stand_beside_their_chance(micro_run):
    color = runs.scores(micro_run, 'pretrain')['color']
    assert color['accuracy']['chance'] == 1 / 8
    assert color['accuracy']['n'] == color['accuracy/held_out=False']['n'] + color['accuracy/held_out=True']['n']
    retrieval = runs.scores(micro_run, 'pretrain')['retrieval']
    assert retrieval['image_to_text/R@1']['n'] == 16
    assert retrieval['image_to_text/R@1']['chance'] == pytest.approx(1 / 16)
    # Written into the metrics at its turns: half way, and at the end.
    table = read_csv(micro_run / 'transfer' / 'metrics.csv')
    assert [step for step, _ in table['answer/exact_match']] == [2, 4]
    assert table['answer/exact_match'][-1][1] == runs.scores(micro_run, 'transfer')['answer']['exact_match']['score']


def test_predictions_tell_every_question_and_answer(micro_run):
    lines = (micro_run / 'multimodal' / 'predictions_answer.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 32 == len({row['id'] for row in rows})
    score = runs.scores(micro_run, 'multimodal')['answer']['exact_match']
    assert np.mean([row['score']['exact_match'] for row in rows]) == score['score'] and score['n'] == 32
    assert all(row['prompt'] and row['truth'] and row['kind'] for row in rows)


def test_the_report_shows_the_scores(micro_run):
    page = (micro_run / 'report.html').read_text()
    said = json.loads((micro_run / 'transfer' / 'predictions_answer.jsonl').read_text().splitlines()[0])
    assert html.escape(said['prompt']) in page and html.escape(said['prediction']) in page
    for name in STAGES:
        for evaluation, result in runs.scores(micro_run, name).items():
            assert f'{name}: {evaluation}' in page
            first = next(iter(result.values()))
            assert f'{100 * first["score"]:.1f}' in page or f'{first["score"]:.3f}' in page
    assert page.count('<svg') + page.count('<img') > 5


def test_a_stage_starts_from_the_earlier_ones_weights(micro_run, tiny_digit_scenes):
    """The image tower comes over bit for bit, its head and the decoder start fresh."""
    stage = runs.validated(tiny_digit_scenes)['multimodal']
    shapes = checkpoints.weight_shapes(micro_run / 'multimodal' / 'bundle')
    fresh = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, 7, x.dtype)), shapes)
    load = initial_weights.make(stage.init_from, {'pretrain': micro_run / 'pretrain' / 'bundle'}, 'config.multimodal')
    first, stored = trees.flat(load(fresh)), weights(micro_run / 'pretrain' / 'bundle')
    taken = [path for path in first if path.startswith('img/') and not path.startswith('img/head/')]
    assert len(taken) > 10
    for path in first:
        np.testing.assert_array_equal(first[path], stored[path] if path in taken else 7, err_msg=path)
    bundles = {'pretrain': micro_run / 'pretrain' / 'bundle'}
    assert initial_weights.overwritten(stage.init_from, bundles, shapes, 'config.multimodal') == set(taken)


def test_the_position_embedding_is_resized_to_another_resolution(micro_run, tiny_digit_scenes):
    """32 px are 2 × 2 patches, 64 px are 4 × 4. Everything else is as it was."""
    stage = runs.validated(tiny_digit_scenes)['transfer']
    shapes = checkpoints.weight_shapes(micro_run / 'transfer' / 'bundle')
    fresh = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), shapes)
    load = initial_weights.make(stage.init_from, {'multimodal': micro_run / 'multimodal' / 'bundle'}, 'config.transfer')
    first, stored = trees.flat(load(fresh)), weights(micro_run / 'multimodal' / 'bundle')
    for path, value in first.items():
        if path == 'img/pos_embedding':
            assert stored[path].shape == (1, 4, 16) and value.shape == (1, 16, 16)
            np.testing.assert_array_equal(value, position_resize.bilinear(stored[path], (4, 4)))
            corners = np.asarray(value).reshape(4, 4, 16)[::3, ::3].reshape(4, 16)
            np.testing.assert_allclose(corners, stored[path][0], rtol=1e-6)
        else:
            np.testing.assert_array_equal(value, stored[path], err_msg=path)


@pytest.fixture
def another(micro_run, tmp_path):
    """The finished run, to be changed."""
    return shutil.copytree(micro_run, tmp_path / 'run')


def test_finished_stages_are_skipped(another, tiny_digit_scenes, capsys, monkeypatch):
    monkeypatch.setattr(stages, 'run_stage', lambda *_, **__: pytest.fail('trains again'))
    before = {p: p.stat().st_mtime_ns for p in another.rglob('*') if p.is_file() and p.name != 'config.json'}
    bundles = stages.run(runs.validated(tiny_digit_scenes), another)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert bundles == {name: another / name / 'bundle' for name in STAGES}
    assert capsys.readouterr().out.count('finished already') == 3


@pytest.mark.slow
def test_evaluations_added_to_a_finished_stage_run_on_its_bundle(another, tiny_digit_scenes, monkeypatch):
    monkeypatch.setattr(stages, 'run_stage', lambda *_, **__: pytest.fail('trains again'))
    before = {name: runs.scores(another, name) for name in STAGES}
    answers = (another / 'transfer' / 'predictions_answer.jsonl').read_bytes()
    made = runs.validated(tiny_digit_scenes)
    transfer = made['transfer']
    again = dataclasses.replace(transfer, evals=transfer.evals | {'again': transfer.evals['answer']})
    stages.run(made | {'transfer': again}, another)
    after = {name: runs.scores(another, name) for name in STAGES}
    assert after['transfer'].pop('again') == before['transfer']['answer'] and after == before
    assert (another / 'transfer' / 'predictions_again.jsonl').read_bytes() == answers


def test_a_workdir_of_another_config_is_refused(another, tiny_digit_scenes):
    before = (another / 'config.json').read_text()
    changed = runs.validated(tiny_digit_scenes, pretrain__optimizer__lr=0.5, transfer__seed=3)
    with pytest.raises(UserError, match=r'pretrain\.optimizer\.lr: 0\.003 → 0\.5; transfer\.seed: 0 → 3.*--workdir'):
        stages.run(changed, another)
    assert (another / 'config.json').read_text() == before
    (another / 'config.json').write_text('{"pretrain": ')
    with pytest.raises(UserError, match=r'config\.json: damaged'):
        stages.run(runs.validated(tiny_digit_scenes), another)


def test_a_setting_that_is_new_since_does_not_make_it_another_config(another, tiny_digit_scenes):
    stored = json.loads((another / 'config.json').read_text())
    del stored['pretrain']['model']['image']['position_init'], stored['transfer']['optimizer']['ema_decay']
    (another / 'config.json').write_text(json.dumps(stored))
    stages.run(runs.validated(tiny_digit_scenes), another)
    stored['pretrain']['model']['gone'] = 1
    (another / 'config.json').write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r'pretrain\.model\.gone: 1 → None'):
        stages.run(runs.validated(tiny_digit_scenes), another)


def test_where_it_runs_and_what_it_logs_may_change(another, tiny_digit_scenes, monkeypatch):
    monkeypatch.setattr(stages, 'run_stage', lambda *_, **__: pytest.fail('trains again'))
    changed = runs.validated(
        tiny_digit_scenes,
        pretrain__mesh={'fsdp': 2},
        transfer__log_every=2,
        pretrain__data__threads=1,
        transfer__accumulate=2,
        multimodal__model__remat='full',
        multimodal__optimizer__offload=True,
    )
    stages.run(changed, another)
    assert json.loads((another / 'config.json').read_text())['pretrain']['mesh']['fsdp'] == 2


def test_scores_of_an_evaluation_that_is_another_now_are_forgotten(another, tiny_digit_scenes):
    before = {name: runs.scores(another, name) for name in STAGES}
    same = {'transfer__evals__answer__every': 3, 'transfer__evals__answer__batch_size': 16}
    remembered.remember(another, runs.validated(tiny_digit_scenes, **same))
    assert {name: runs.scores(another, name) for name in STAGES} == before
    changed = {'transfer__evals__answer__max_new_tokens': 2, 'pretrain__evals__color__templates': ('a {} one',)}
    remembered.remember(another, runs.validated(tiny_digit_scenes, **changed))
    del before['transfer']['answer'], before['pretrain']['color']
    assert {name: runs.scores(another, name) for name in STAGES} == before
    # Those of one that is gone stay, until one of its name comes back.
    gone = runs.validated(tiny_digit_scenes, multimodal__evals={}, **changed)
    remembered.remember(another, gone)
    assert {name: runs.scores(another, name) for name in STAGES} == before
    assert remembered.scores(another, runs.validated(tiny_digit_scenes, **changed))['multimodal'] == {}


def test_an_unfinished_tokenizer_of_another_size_is_refused(tiny_digit_scenes, tmp_path):
    """Before any stage has begun; the text fills fewer pieces than the 5000, which is no reason to refuse it."""
    sizes = {size: runs.validated(tiny_digit_scenes, **asking(size)) for size in (300, 320, 5000)}
    workdir = tmp_path / 'run'
    workdir.mkdir()
    for asked, other in ((320, 300), (320, 5000), (5000, 320)):
        (workdir / 'tokenizer.model').unlink(missing_ok=True)
        remembered.remember(workdir, sizes[asked])
        made = tokenizers.make(workdir, sizes[asked])['pretrain']
        assert made.base <= asked
        with pytest.raises(UserError, match=rf'made with tokenizer\.vocab_size {asked}, this run has {other}: choose'):
            remembered.remember(workdir, sizes[other])
        remembered.remember(workdir, sizes[asked])
        assert tokenizers.make(workdir, sizes[asked])['transfer'].sha256 == made.sha256
    with pytest.raises(UserError, match=rf'made with tokenizer\.vocab_size {made.base}, this run has 300: choose'):
        tokenizers.make(workdir, sizes[300])


def asking(size):
    return {f'{name}__tokenizer': {'vocab_size': size} for name in STAGES}


@pytest.mark.slow
def test_the_report_reads_the_stages_of_today(another, tiny_digit_scenes):
    """Evaluations may be gone and data may have moved since the bundles were made."""
    made = runs.validated('/gone', **{f'{name}__evals': {} for name in STAGES})
    _, commands = run_report.make(made, another, {name: another / name / 'bundle' for name in STAGES}, 'micro.py')
    assert commands == {}
    bundle = big_vlm.load(another / 'pretrain' / 'bundle')
    bundle.stage = runs.validated('/gone')['pretrain']
    today = runs.validated(tiny_digit_scenes)['pretrain']
    [(image, record)] = run_report._examples(bundle, today, today.evals['retrieval'], 1)
    assert image.shape == (32, 32, 3) and record['caption']
    today.evals['retrieval'] = dataclasses.replace(today.evals['retrieval'], label='questions/question')
    shown = run_report._similarity(bundle, today, today.evals['retrieval'])
    assert shown.captions[0] == record['questions']['question'][0] and len(shown.images) == len({*shown.captions})


def test_the_draft_knows_every_parameter(micro_run, tiny_digit_scenes):
    """What `check` reasons about before there is a tokenizer is what is then trained."""
    made = runs.validated(tiny_digit_scenes)
    sizes = tokenizers.vocab_sizes(made)
    for name, stage in made.items():
        contract = stages.draft_contract(stage, sizes[name])
        drawn = trees.flat(steps.param_shapes(stages.tasks.make(stage, contract)))
        stored = trees.flat(checkpoints.weight_shapes(micro_run / name / 'bundle'))
        assert {k: v.shape for k, v in drawn.items()} == {k: v.shape for k, v in stored.items()}


def test_a_report_does_without_pictures_that_find_no_room(another, tiny_digit_scenes, monkeypatch, capsys):
    """The answers, which take no weights, stay; the page and a line say what is missing."""
    shapes, pages = [], []

    def load(path, mesh):
        shapes.append(mesh.shape)
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory\nallocating 9.00G')

    monkeypatch.setattr('big_vlm.bundle.load', load)
    monkeypatch.setattr('big_vlm.reports.report.write', lambda path, page: pages.append(page))
    bundles = {name: another / name / 'bundle' for name in STAGES}
    _, commands = run_report.make(runs.validated(tiny_digit_scenes), another, bundles, 'micro.py')
    [page] = pages
    assert set(commands) == {'ask multimodal', 'ask transfer'} and len(page.answers) == 16
    assert not page.attention and page.similarity is None
    assert [dict(shape) for shape in shapes] == [dict(data=1, fsdp=jax.local_device_count(), model=1)] * 3
    missing = 'not all could be made: RESOURCE_EXHAUSTED: Out of memory allocating 9.00G'
    assert [stage.facts['pictures'] for stage in page.stages] == [missing] * 3
    assert [line for line in capsys.readouterr().out.splitlines() if missing in line] == [
        f'{name}: pictures of the report {missing}' for name in STAGES
    ]
    nothing_to_show = runs.validated(tiny_digit_scenes, **{f'{name}__evals': {} for name in STAGES})
    run_report.make(nothing_to_show, another, bundles, 'micro.py')
    assert len(shapes) == 3 and not any('pictures' in stage.facts for stage in pages[-1].stages)


@pytest.mark.parametrize('late', [False, True])
def test_a_stop_is_heard_in_evaluations_of_a_finished_stage(tmp_path, monkeypatch, late):
    """By several processes too, where JAX has the signal: between two batches, or behind the last one."""
    stage = SimpleNamespace(evals={'val': None, 'test': None})

    def evaluate(name, params, must):
        os.kill(os.getpid(), signal.SIGTERM)
        if not late:
            signals.check()
        return {}

    model = SimpleNamespace(task=None, contract=None, tokenizer=None, mesh=None, params=None)
    monkeypatch.setattr(stages.bundle, 'load', lambda path, mesh: model)
    monkeypatch.setattr(stages, '_mesh', lambda stage: None)
    monkeypatch.setattr(stages.evaluation, 'Evaluator', lambda *_: evaluate)
    with pytest.raises(signals.Stopped):
        stages._evaluate_what_is_new(stage, tmp_path, tmp_path / 'bundle', 'config.toy')
    assert workdirs.scores(tmp_path) == ({'val': {}} if late else {})
