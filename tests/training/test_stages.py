"""The stages of a run, in miniature: what each leaves behind, what the next takes over, and what is refused."""

import copy
import dataclasses
import html
import json
import shutil

import jax
import micro_config
import micro_run as runs
import numpy as np
import pytest
from PIL import Image

import big_vlm
from big_vlm import checkpoints, config
from big_vlm.checkpoints import trees
from big_vlm.config import UserError
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.ops import position_resize
from big_vlm.reports.writers import read_csv
from big_vlm.training import initial_weights, run_report, stages
from big_vlm.training import step as steps

STAGES = ('pretrain', 'multimodal', 'transfer')


def make(data_dir, **changes):
    """The micro config, validated; `changes`: 'multimodal.init_from.fresh' → value, with '__' for the dots."""
    raw = copy.deepcopy(micro_config.get_config(data_dir))
    for key, value in changes.items():
        *path, last = key.split('__')
        section = raw
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return config.validate(raw)


def weights(folder, part=''):
    return trees.flat(checkpoints.load_weights(folder, part=part))


@pytest.mark.smoke
def test_every_stage_leaves_a_bundle_and_its_numbers(micro_run):
    assert {p.name for p in micro_run.iterdir()} == {
        *STAGES,
        'config.json',
        'tokenizer.model',
        'report.html',
        'said.txt',
    }
    for name, total in zip(STAGES, (6, 6, 4), strict=True):
        folder = micro_run / name
        table = read_csv(folder / 'metrics.csv')
        assert [step for step, _ in table['loss']] == list(range(1, total + 1))
        assert [p.name for p in (folder / 'checkpoints').iterdir()] == [str(total)]
        bundled, saved = weights(folder / 'bundle'), weights(folder / 'checkpoints')
        assert sorted(bundled) == sorted(saved)
        for path in saved:
            np.testing.assert_array_equal(bundled[path], saved[path], err_msg=path)
        assert json.loads((folder / 'bundle' / 'bundle.json').read_text())['scores'] == runs.scores(micro_run, name)
    said = (micro_run / 'said.txt').read_text()
    assert 'Traceback' not in said and 'arning' not in said
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
    stage = make(tiny_digit_scenes)['multimodal']
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
    stage = make(tiny_digit_scenes)['transfer']
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
    bundles = stages.run(make(tiny_digit_scenes), another)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert bundles == {name: another / name / 'bundle' for name in STAGES}
    assert capsys.readouterr().out.count('finished already') == 3


def test_evaluations_added_to_a_finished_stage_run_on_its_bundle(another, tiny_digit_scenes, monkeypatch):
    monkeypatch.setattr(stages, 'run_stage', lambda *_, **__: pytest.fail('trains again'))
    before = {name: runs.scores(another, name) for name in STAGES}
    answers = (another / 'transfer' / 'predictions_answer.jsonl').read_bytes()
    made = make(tiny_digit_scenes)
    transfer = made['transfer']
    again = dataclasses.replace(transfer, evals=transfer.evals | {'again': transfer.evals['answer']})
    stages.run(made | {'transfer': again}, another)
    after = {name: runs.scores(another, name) for name in STAGES}
    assert after['transfer'].pop('again') == before['transfer']['answer'] and after == before
    assert (another / 'transfer' / 'predictions_again.jsonl').read_bytes() == answers


def test_a_workdir_of_another_config_is_refused(another, tiny_digit_scenes):
    before = (another / 'config.json').read_text()
    changed = make(tiny_digit_scenes, pretrain__optimizer__lr=0.5, transfer__seed=3)
    with pytest.raises(UserError, match=r'pretrain\.optimizer\.lr: 0\.003 → 0\.5; transfer\.seed: 0 → 3.*--workdir'):
        stages.run(changed, another)
    assert (another / 'config.json').read_text() == before
    (another / 'config.json').write_text('{"pretrain": ')
    with pytest.raises(UserError, match=r'config\.json: damaged'):
        stages.run(make(tiny_digit_scenes), another)


def test_a_setting_that_is_new_since_does_not_make_it_another_config(another, tiny_digit_scenes):
    stored = json.loads((another / 'config.json').read_text())
    del stored['pretrain']['model']['image']['position_init'], stored['transfer']['optimizer']['ema_decay']
    (another / 'config.json').write_text(json.dumps(stored))
    stages.run(make(tiny_digit_scenes), another)
    stored['pretrain']['model']['gone'] = 1
    (another / 'config.json').write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r'pretrain\.model\.gone: 1 → None'):
        stages.run(make(tiny_digit_scenes), another)


def test_where_it_runs_and_what_it_logs_may_change(another, tiny_digit_scenes, monkeypatch):
    monkeypatch.setattr(stages, 'run_stage', lambda *_, **__: pytest.fail('trains again'))
    changed = make(tiny_digit_scenes, pretrain__mesh={'fsdp': 2}, transfer__log_every=2, pretrain__data__threads=1)
    stages.run(changed, another)
    assert json.loads((another / 'config.json').read_text())['pretrain']['mesh']['fsdp'] == 2


def test_an_unfinished_tokenizer_of_another_size_is_refused(tiny_digit_scenes, tmp_path):
    """Before any stage has begun; the text fills fewer pieces than the 5000, which is no reason to refuse it."""
    sizes = {size: make(tiny_digit_scenes, **asking(size)) for size in (300, 320, 5000)}
    workdir = tmp_path / 'run'
    workdir.mkdir()
    for asked, other in ((320, 300), (320, 5000), (5000, 320)):
        (workdir / 'tokenizer.model').unlink(missing_ok=True)
        stages._remember(workdir, sizes[asked])
        made = stages._tokenizers(workdir, sizes[asked])['pretrain']
        assert made.base <= asked
        with pytest.raises(UserError, match=rf'made with tokenizer\.vocab_size {asked}, this run has {other}: choose'):
            stages._remember(workdir, sizes[other])
        stages._remember(workdir, sizes[asked])
        assert stages._tokenizers(workdir, sizes[asked])['transfer'].sha256 == made.sha256
    with pytest.raises(UserError, match=rf'made with tokenizer\.vocab_size {made.base}, this run has 300: choose'):
        stages._tokenizers(workdir, sizes[300])


def asking(size):
    return {f'{name}__tokenizer': {'vocab_size': size} for name in STAGES}


def test_stages_that_share_a_tokenizer_ask_for_one_size(tmp_path):
    made = make(str(tmp_path), transfer__tokenizer={'vocab_size': 512})
    with pytest.raises(
        UserError,
        match=r'config\.pretrain\.tokenizer\.vocab_size is 384, config\.transfer\.tokenizer\.vocab_size is 512',
    ):
        stages.check(made)


def test_the_report_reads_the_stages_of_today(another, tiny_digit_scenes):
    """Evaluations may be gone and data may have moved since the bundles were made."""
    made = make('/gone', **{f'{name}__evals': {} for name in STAGES})
    _, commands = run_report.make(made, another, {name: another / name / 'bundle' for name in STAGES}, 'micro.py')
    assert commands == {}
    bundle = big_vlm.load(another / 'pretrain' / 'bundle')
    bundle.stage = make('/gone')['pretrain']
    today = make(tiny_digit_scenes)['pretrain']
    [(image, record)] = run_report._examples(bundle, today, today.evals['retrieval'], 1)
    assert image.shape == (32, 32, 3) and record['caption']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'pretrain__batch_size': 12}, r'config\.pretrain: batch_size=12 does not divide over the 8 .*use 8 or 16'),
        ({'pretrain__mesh': {'fsdp': 3}}, r'config\.pretrain: mesh: 8 devices cannot be divided by fsdp=3'),
        ({'pretrain__model__image__variant': 'b/16'}, r"config\.pretrain: unknown ViT variant 'b': valid: B, "),
        ({'pretrain__model__image__num_heads': 3}, r'config\.pretrain: .*16.*3'),
        (
            {'pretrain__optimizer__name': 'adamww'},
            r"'adamww' \(config\.pretrain\.optimizer\.name\): did you mean 'adamw'",
        ),
        ({'pretrain__optimizer__warmup': {'steps': 7}}, r'config\.pretrain\.optimizer.*7 steps is longer than .* 6'),
        ({'pretrain__evals__color__split': 'tets'}, r"config\.pretrain\.evals\.color: unknown split 'tets'.*'test'"),
        (
            {'transfer__data__sources__ask__split': 'trian[:10]'},
            r"transfer\.data\.sources\.ask: unknown split 'trian\[:10\]'.*'train'",
        ),
        ({'transfer__data__sources__ask__dataset': 'digit_scene'}, r"sources\.ask: unknown dataset.*'digit_scenes'"),
        ({'transfer__data__sources__ask__dataset': 'digit_scenes/cell'}, r"unknown config 'cell'.*'cells'"),
        ({'pretrain__evals__color__kind': 'generation'}, r'evals\.color\.kind: generation needs a generative task'),
        (
            {'transfer__evals__answer__metrics': ('exact',)},
            r"unknown metric 'exact' \(config\.transfer\.evals\.answer\.metrics\)",
        ),
        ({'multimodal__init_from__fresh': ('img/hed/.*',)}, r"multimodal\.init_from\.fresh: 'img/hed/\.\*' matches no"),
        ({'multimodal__init_from__fresh': ('img/(',)}, r"init_from\.fresh: 'img/\(' is no regular expression"),
        ({'multimodal__init_from__parts': {'im': 'img'}}, r"unknown part 'im' .*multimodal\.init_from\.parts.*'img'"),
        ({'multimodal__init_from__parts': {'img': 'image'}}, r"unknown part 'image' .*did you mean 'img'"),
        ({'multimodal__init_from__fresh': ()}, r'multimodal\.init_from: pretrain does not fit.*img/head|img/head|head'),
        ({'transfer__init_from__resize_position': False}, r'pos_embedding has shape \(1, 4, 16\), not \(1, 16, 16\)'),
        ({'transfer__model__decoder__width': 32}, r'config\.transfer\.init_from: multimodal does not fit'),
        (
            {'pretrain__init_from': {'path': '/nowhere/bundle'}},
            r'config\.pretrain\.init_from\.path: no folder /nowhere',
        ),
    ],
)
def test_refused_before_anything_is_read(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        stages.check(make(str(tmp_path), **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('stage', 'changes', 'message'),
    [
        ('transfer', {'lower': False}, r'transfer\.init_from: .*contract\.lower True, this stage has False'),
        ('transfer', {'separator': '|'}, r"transfer\.init_from: .*contract\.separator '\\n', this stage has '\|'"),
        ('transfer', {'image_alone': True}, r'transfer\.init_from: .*contract\.image_alone False, this stage has True'),
        (
            'multimodal',
            {'value_range': (0.0, 1.0)},
            r'multimodal\.init_from: .*value_range \(-1\.0, 1\.0\), .*to theirs',
        ),
    ],
)
def test_weights_come_with_what_they_expect_of_their_inputs(stage, changes, message, micro_run, tmp_path):
    """From another stage, and from a bundle."""
    changes = {f'{stage}__contract__{key}': value for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        stages.check(make(str(tmp_path), **changes))
    earlier = make(str(tmp_path))[stage].init_from.stage
    init = {'path': str(micro_run / earlier / 'bundle')}
    init |= {'parts': {'img': 'img'}, 'fresh': ('img/head/.*',)} if stage == 'multimodal' else {}
    made = make(str(tmp_path), **changes, **{f'{stage}__init_from': init})
    with pytest.raises(UserError, match=message):
        stages.check({stage: made[stage]} | {})


def test_the_image_tower_alone_may_read_other_text(tmp_path):
    stages.check(make(str(tmp_path), multimodal__contract__lower=False, transfer__contract__lower=False))


def test_text_weights_come_with_their_tokenizer(micro_run, tiny_digit_scenes, tmp_path):
    bundle = micro_run / 'pretrain' / 'bundle'
    raw = {'task': 'contrastive', **micro_config.pretrain(tiny_digit_scenes), 'init_from': {'path': str(bundle)}}
    with pytest.raises(
        UserError, match=r'text weights belong to its tokenizer: set tokenizer\.path .*tokenizer\.model'
    ):
        stages.check(config.validate(raw))
    stages.check(config.validate(raw | {'tokenizer': {'path': str(bundle / 'tokenizer.model')}}))
    Tokenizer.train(['some other words'] * 50, 280, tmp_path / 'other.model')
    with pytest.raises(UserError, match=r'and .*other\.model is another: set tokenizer\.path .*tokenizer\.model'):
        stages.check(config.validate(raw | {'tokenizer': {'path': str(tmp_path / 'other.model')}}))


def test_text_weights_of_a_stage_come_with_its_tokenizer(tmp_path):
    for name in ('one', 'other'):
        Tokenizer.train([f'some words of {name}'] * 50, 280, tmp_path / f'{name}.model')
    shutil.copy(tmp_path / 'one.model', tmp_path / 'same.model')
    one, other, same = ({'path': str(tmp_path / f'{name}.model')} for name in ('one', 'other', 'same'))
    for theirs, ours in ((one, {}), ({}, one), (one, other)):
        # The image tower alone may come from a stage with any tokenizer.
        made = make(str(tmp_path), pretrain__tokenizer=other, multimodal__tokenizer=theirs, transfer__tokenizer=ours)
        with pytest.raises(
            UserError, match=r'transfer\.init_from\.stage: its text weights belong .*is another: set token'
        ):
            stages.check(made)
    stages.check(make(str(tmp_path), multimodal__tokenizer=one, transfer__tokenizer=same))


def test_a_long_warmup_of_a_long_run_is_valid(tmp_path):
    stages.check(
        {
            'train': make(str(tmp_path), pretrain__total={'steps': 5000}, pretrain__optimizer__warmup={'steps': 900})[
                'pretrain'
            ]
        }
    )
    epochs = make(str(tmp_path), pretrain__total={'epochs': 3.0}, pretrain__optimizer__warmup={'percent': 10.0})
    stages.check({'train': epochs['pretrain']})


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'label': 'colour'}, r"config\.pretrain\.evals\.color: .*needs field 'colour'"),
        ({'slices': ('holdout',)}, r"evals\.color: .*needs field 'holdout'"),
        ({'pipeline': 'decode | resize(48)'}, r'evals\.color: .*resize\(48\), but contract\.image_size is 32'),
        ({'where': {'num_digit': 1}}, r"evals\.color: unknown field 'num_digit'.*'num_digits'"),
        ({'where': {'num_digits': 9}}, r'evals\.color: no record of .* relax'),
    ],
)
def test_an_evaluation_that_cannot_run_is_found_before_training(changes, message, tiny_digit_scenes, tmp_path):
    made = make(tiny_digit_scenes, **{f'pretrain__evals__color__{key}': value for key, value in changes.items()})
    with pytest.raises(UserError, match=message):
        stages.run(made, tmp_path)
    assert not (tmp_path / 'pretrain').exists()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'data__sources__ask__where': {'num_digit': 1}},
            r"config\.transfer: data\.sources\.ask: unknown field 'num_digit'.*'num_digits'",
        ),
        (
            {'data__sources__ask__pipeline': 'decode | resize(64) | prefix("{capton}") | suffix("a") | tokenize'},
            r"config\.transfer: data\.sources\.ask: .*'capton'",
        ),
        ({'evals__answer__slices': ('holdout',)}, r"config\.transfer\.evals\.answer: .*needs field 'holdout'"),
    ],
)
def test_a_mistake_in_the_last_stage_is_found_before_the_first_one(changes, message, tiny_digit_scenes, tmp_path):
    made = make(tiny_digit_scenes, **{f'transfer__{key}': value for key, value in changes.items()})
    with pytest.raises(UserError, match=message):
        stages.run(made, tmp_path)
    assert not (tmp_path / 'pretrain').exists()


def test_the_draft_knows_every_parameter(micro_run, tiny_digit_scenes):
    """What `check` reasons about before there is a tokenizer is what is then trained."""
    made = make(tiny_digit_scenes)
    sizes = stages._vocab_sizes(made)
    for name, stage in made.items():
        contract = stages.draft_contract(stage, sizes[name])
        drawn = trees.flat(steps.param_shapes(stages.tasks.make(stage, contract)))
        stored = trees.flat(checkpoints.weight_shapes(micro_run / name / 'bundle'))
        assert {k: v.shape for k, v in drawn.items()} == {k: v.shape for k, v in stored.items()}
