"""What a run refuses before it begins, and what it does not."""

import shutil

import micro_config
import pytest
from micro_run import validated

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.training import stages


def test_stages_that_share_a_tokenizer_ask_for_one_size(tmp_path):
    made = validated(str(tmp_path), transfer__tokenizer={'vocab_size': 512})
    with pytest.raises(
        UserError,
        match=r'config\.pretrain\.tokenizer\.vocab_size is 384, config\.transfer\.tokenizer\.vocab_size is 512',
    ):
        stages.check(made)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'pretrain__batch_size': 12}, r'config\.pretrain: batch_size=12 does not divide over the 8 .*use 8 or 16'),
        ({'pretrain__mesh': {'fsdp': 3}}, r'config\.pretrain: mesh: 8 devices cannot be divided by fsdp=3'),
        (
            {'pretrain__mesh': {'rules': (('img/hed/kernel', ('model',)),)}},
            r"config\.pretrain\.mesh\.rules: sharding rule 'img/hed/kernel' decides for no parameter",
        ),
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
        (
            {
                'transfer__evals__answer__metrics': ('word_error_rate',),
                'transfer__evals__answer__every': 1,
                'transfer__checkpoint__best': 'answer/word_error_rate/kind=count',
            },
            r"config\.transfer\.checkpoint\.best: of answer/word_error_rate/kind=count less is better.*best_is='min'",
        ),
        (
            {'transfer__evals__answer__every': 1, 'transfer__checkpoint__best': 'answer/exact_mach'},
            r"unknown metric 'exact_mach' \(config\.transfer\.checkpoint\.best\): did you mean 'exact_match'",
        ),
        (
            {'pretrain__evals__retrieval__every': 1, 'pretrain__checkpoint__best': 'retrieval/image_to_text'},
            r"unknown metric 'image_to_text' \(config\.pretrain\.checkpoint\.best\): did you mean 'image_to_text/R@",
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
        stages.check(validated(str(tmp_path), **changes))
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
        stages.check(validated(str(tmp_path), **changes))
    earlier = validated(str(tmp_path))[stage].init_from.stage
    init = {'path': str(micro_run / earlier / 'bundle')}
    init |= {'parts': {'img': 'img'}, 'fresh': ('img/head/.*',)} if stage == 'multimodal' else {}
    made = validated(str(tmp_path), **changes, **{f'{stage}__init_from': init})
    with pytest.raises(UserError, match=message):
        stages.check({stage: made[stage]} | {})


def test_the_image_tower_alone_may_read_other_text(tmp_path):
    stages.check(validated(str(tmp_path), multimodal__contract__lower=False, transfer__contract__lower=False))


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
        made = validated(
            str(tmp_path), pretrain__tokenizer=other, multimodal__tokenizer=theirs, transfer__tokenizer=ours
        )
        with pytest.raises(
            UserError, match=r'transfer\.init_from\.stage: its text weights belong .*is another: set token'
        ):
            stages.check(made)
    stages.check(validated(str(tmp_path), multimodal__tokenizer=one, transfer__tokenizer=same))


def test_a_long_warmup_of_a_long_run_is_valid(tmp_path):
    steps = validated(str(tmp_path), pretrain__total={'steps': 5000}, pretrain__optimizer__warmup={'steps': 900})
    stages.check({'train': steps['pretrain']})
    epochs = validated(str(tmp_path), pretrain__total={'epochs': 3.0}, pretrain__optimizer__warmup={'percent': 10.0})
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
    made = validated(tiny_digit_scenes, **{f'pretrain__evals__color__{key}': value for key, value in changes.items()})
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
        (
            {'total': {'epochs': 0.1}, 'optimizer__warmup': {'steps': 4}},
            r'config\.transfer\.optimizer.*a warmup of 4 steps is longer than the run of \d',
        ),
        ({'evals__answer__slices': ('holdout',)}, r"config\.transfer\.evals\.answer: .*needs field 'holdout'"),
    ],
)
def test_a_mistake_in_the_last_stage_is_found_before_the_first_one(changes, message, tiny_digit_scenes, tmp_path):
    made = validated(tiny_digit_scenes, **{f'transfer__{key}': value for key, value in changes.items()})
    with pytest.raises(UserError, match=message):
        stages.run(made, tmp_path)
    assert not (tmp_path / 'pretrain').exists()


VIEWS, GROUND = 'decode | views(2, 12) | resize(32) | text("caption")', 'decode | resize(32) | text("caption") | ground'
MODEL = micro_config.pretrain('')['model']
DISTILL = dict(MODEL, distill=dict(local=1.0, hidden=32, bottleneck=16, prototypes=32))


@pytest.mark.parametrize(
    ('stage', 'pipeline', 'changes', 'message'),
    [
        ('pretrain', 'decode | resize(32) | text("caption")', {'model': DISTILL}, 'the pipeline makes no views: add'),
        ('pretrain', VIEWS, {'model': DISTILL}, r'views\(…, 12\): local views must be whole patches of 16'),
        ('pretrain', VIEWS, {}, r'config\.pretrain: the pipeline has views\(…\), which nothing takes'),
        ('pretrain', GROUND, {'accumulate': 2}, r'the pipeline has ground\(…\), which nothing takes'),
        ('pretrain', 'decode | resize(32)', {}, 'the pipelines make no text, which a contrastive model takes'),
        ('multimodal', 'decode | resize(32) | text("caption")', {}, 'multimodal: the pipelines make no mask_loss'),
    ],
)
def test_a_pipeline_makes_what_the_model_takes(stage, pipeline, changes, message, tiny_digit_scenes, tmp_path):
    """In every stage before the first one is trained, however many micro-batches it has."""
    changes = {'evals': {}, 'batch_size': 16, 'data': micro_config.data(tiny_digit_scenes, a=pipeline), **changes}
    made = validated(tiny_digit_scenes, **{f'{stage}__{key}': value for key, value in changes.items()})[stage]
    tokenizer = Tokenizer.train(['a red three'] * 50, 270, tmp_path / 'tokenizer.model')
    with pytest.raises(UserError, match=message):
        stages.rehearse(made, tokenizer, f'config.{stage}')
