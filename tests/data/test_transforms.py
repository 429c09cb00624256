"""The pipeline language: what it refuses, and what each operation makes of a record."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.data import images, loader, sources, transforms
from big_vlm.data.builders import scene_language
from big_vlm.data.contract import Contract
from big_vlm.data.coordinates import text_to_boxes
from big_vlm.data.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = ['a red three in the top left', 'a blue seven in the center', 'which digit is red?', 'caption en']
    return Tokenizer.train(texts, 330, tmp_path_factory.mktemp('t') / 't.model')


@pytest.fixture(scope='module')
def free(tiny_digit_scenes) -> sources.Source:
    return sources.load('digit_scenes/free_tiny', 'train', tiny_digit_scenes)


@pytest.fixture
def context(tokenizer) -> transforms.Context:
    return make_context(tokenizer)


def make_context(tokenizer, train=True, seed=(0,), **settings) -> transforms.Context:
    settings = {'image_size': 32, 'text_length': 96} | settings
    contract = Contract.make(config.Contract(**settings), tokenizer, image_tokens=4)
    return transforms.Context(contract, tokenizer, train=train, seed=seed)


def test_decode_resize_is_nearly_both(tokenizer):
    """One picture or several; only where the contract antialiases."""
    context = make_context(tokenizer, antialias=True, images=2)
    data = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).save(data, 'JPEG')
    for image in (data.getvalue(), [data.getvalue()] * 2):
        [slow, fast] = (
            transforms.parse(pipeline, where='')({'image': image}, context)['image'].astype(int)
            for pipeline in ('decode | resize(32)', 'decode_resize(32)')
        )
        assert slow.shape == fast.shape and 0 < np.abs(slow - fast).mean() < 1
    for pipeline, settings in (('decode_resize(48)', {'antialias': True}), ('decode_resize(32)', {'antialias': False})):
        with pytest.raises(UserError, match='image_size is 32|antialias is False: write decode'):
            transforms.parse(pipeline, where='')({'image': b''}, make_context(tokenizer, **settings))
    with pytest.raises(ValueError, match='3 pictures, and contract.images is 2'):
        transforms.parse('decode_resize(32)', where='')({'image': [data.getvalue()] * 3}, context)


@pytest.mark.parametrize(
    ('pipeline', 'message'),
    [
        ('decode | resze(48)', "unknown operation 'resze' (here): did you mean 'resize'"),
        ('decode | resize(sise=48)', "unknown argument 'sise' (here, resize(size: int"),
        ('decode | resize', "missing a required argument: 'size'"),
        ('decode | resize(48, 3, 4, 5)', 'too many positional arguments'),
        ("resize('48')", "size='48' does not fit"),
        ('resize(True)', 'size=True does not fit'),
        ('resize(4.5)', 'size=4.5 does not fit'),
        ("resize(48, 'cubic')", "method='cubic' does not fit"),
        ("resize(48, antialias='no')", "antialias='no' does not fit"),
        ('question(which)', "argument 'which' of question is not a literal"),
        ("question('which', 3)", 'kinds=3 does not fit'),
        ("prefix(__import__('os').system('true'))", 'is not a literal'),
        ('os.system', "'os.system' is no operation"),
        ('decode, resize(3)', 'is no operation'),
        ('decode & resize(3)', 'is no operation'),
        ('decode | ', 'cannot read pipeline'),
        ('', 'the pipeline is empty'),
        ('decode |', 'cannot read pipeline'),
        (
            'decode | flip_lr | resize(48) | masks',
            'masks after flip_lr: masks that are read later would not fit: write',
        ),
        (
            'decode | detect | flip_lr',
            'flip_lr after detect: what detect has written would not fit: write flip_lr before',
        ),
        ('ground | text("x") | random_crop(8)', 'random_crop after ground'),
        ('masks | segment("x") | inception_crop(8)', 'inception_crop after segment'),
        ('frames(2) | resize_small(48)', 'resize_small takes one picture, and frames makes several'),
    ],
)
def test_what_does_not_parse(pipeline, message):
    with pytest.raises(UserError) as error:
        transforms.parse(pipeline, where='here')
    assert message in str(error.value) and 'here' in str(error.value) and '\n' not in str(error.value)


def test_what_is_in_order():
    for pipeline in (
        'decode | masks | flip_lr | detect | also | detect | resize(8)',
        'frames(2) | flip_lr | resize(8)',
    ):
        transforms.parse(pipeline, where='here')


def test_a_bar_in_a_text_is_text_and_lines_may_break(free, context):
    pipeline = transforms.parse(
        """
        prefix('a | b')
        | suffix('{reading}')
    """,
        where='here',
    )
    example = pipeline(free[0], context)
    assert (example['prefix'], example['suffix']) == ('a | b', free[0]['reading'])


def test_decode_and_resize_follow_the_contract(free, tokenizer):
    record = free[0]
    before = dict(record)
    original = images.decode(record['image'])
    for settings, (method, smooth) in (
        ({}, ('bilinear', True)),
        ({'resample': 'bicubic', 'antialias': False}, ('bicubic', False)),
    ):
        example = transforms.parse('decode | resize(32)', where='')(record, make_context(tokenizer, **settings))
        assert np.array_equal(example['image'], images.resize(original, 32, method, smooth))
    example = transforms.parse("decode | resize(32, 'bicubic', antialias=True)", where='')(
        record, make_context(tokenizer, antialias=False)
    )
    assert np.array_equal(example['image'], images.resize(original, 32, 'bicubic', True))
    assert record == before


def test_resize_must_meet_the_model(free, context):
    with pytest.raises(UserError, match=r'resize\(48\), but contract.image_size is 32'):
        transforms.parse('decode | resize(48)', where='')(free[0], context)
    with pytest.raises(UserError, match='resize before decode'):
        transforms.parse('resize(32)', where='')(free[0], context)


def test_text(free, tokenizer):
    context = make_context(tokenizer, text_length=64)
    record = {**free[0], 'caption': 'A Red three'}
    ids = tokenizer.encode('a red three')
    for pipeline in ("text('caption')", "text('{caption}')"):
        example = transforms.parse(pipeline, where='')(record, context)
        assert example['text'].tolist() == ids + [1] + [0] * (63 - len(ids))
        assert example['text_mask'].sum() == len(ids) + 1
    kept = transforms.parse("text('{caption}!')", where='')(record, make_context(tokenizer, lower=False))
    assert tokenizer.decode(kept['text']) == 'A Red three!'


def test_unknown_fields_are_errors(free, context):
    for pipeline in ("text('captoin')", "suffix('{captoin}')"):
        with pytest.raises(UserError, match="unknown field 'captoin'.*did you mean 'caption'"):
            transforms.parse(pipeline, where='')(free[0], context)


def test_templates_reach_fields_and_nothing_else(free, context):
    example = transforms.parse("suffix('{a b} {} {num_digits}')", where='')(free[0], context)
    assert example['suffix'] == '{a b} {} ' + str(free[0]['num_digits'])
    for name in ('caption-en', 'en.txt', 'captions-all/text.en'):
        record = {'caption-en': 'one', 'en.txt': 'one', 'captions-all': {'text.en': 'one'}}
        assert transforms.parse(f"suffix('a {{{name}}}')", where='')(record, context)['suffix'] == 'a one'
    for name in ('caption.__class__', 'capton-en'):
        with pytest.raises(UserError, match=f"unknown field '{name}'"):
            transforms.parse(f"suffix('{{{name}}}')", where='')(free[0], context)


def test_questions_are_drawn_by_the_examples_own_seed(free, tokenizer):
    pipeline = transforms.parse('question', where='')
    record = max((free[i] for i in range(20)), key=lambda r: r['num_digits'])
    pairs = dict(zip(record['questions']['question'], record['questions']['answer'], strict=True))
    drawn = [pipeline(record, make_context(tokenizer, seed=(seed,))) for seed in range(200)]
    assert all(pairs[example['prefix']] == example['suffix'] for example in drawn)
    kinds = set(record['questions']['kind'])
    counts = {kind: sum(example['kind'] == kind for example in drawn) for kind in kinds}
    # Kinds are equally likely, however many questions each has.
    assert min(counts.values()) > 0.5 * 200 / len(kinds), counts
    again = [pipeline(record, make_context(tokenizer, seed=(seed,))) for seed in range(200)]
    assert [e['prefix'] for e in again] == [e['prefix'] for e in drawn]


def test_a_dialogue_asks_several_questions_in_one_row(free, tokenizer):
    record = next(r for r in free if len(r['questions']['kind']) > 6)
    pairs = dict(zip(record['questions']['question'], record['questions']['answer'], strict=True))
    several, one = (transforms.parse(text, where='') for text in ('dialogue(4)', 'question'))
    for seed in range(20):
        context = make_context(tokenizer, seed=(seed,))
        example, alone = several(record, context), one(record, make_context(tokenizer, seed=(seed,)))
        turns = [(example['prefix'], example['suffix']), *example['more']]
        assert turns[0] == (alone['prefix'], alone['suffix']) and example['kind'] == alone['kind']
        assert len({question for question, _ in turns}) == 4
        assert all(pairs[question] == answer for question, answer in turns)
    assert several(record, make_context(tokenizer, train=False))['more'] == []
    every = transforms.parse('dialogue(99)', where='')(record, make_context(tokenizer))
    assert 1 + len(every['more']) == len(pairs)
    row = transforms.parse('dialogue(2) | tokenize', where='')(record | {'image': np.zeros((4, 4, 3))}, context)
    assert row['mask_loss'].sum() > 2 and np.count_nonzero(np.diff(row['mask_loss']) == 1) == 2
    with pytest.raises(UserError, match=r'turns=0 does not fit: it is dialogue\(turns: int ≥ 1'):
        transforms.parse('dialogue(0)', where='')


def test_also_asks_something_else_about_the_image(free, tokenizer):
    record = free[0] | {'image': np.zeros((4, 4, 3))}
    pipeline = transforms.parse('prefix("ocr") | suffix("{reading}") | also | dialogue(2) | also | detect', where='')
    example = pipeline(record, make_context(tokenizer))
    assert example['turns'][0] == ('ocr', record['reading'])
    assert [prompt in record['questions']['question'] for prompt, _ in example['turns']] == [False, True, True]
    assert example['prefix'].startswith('detect ') and 'more' not in example
    first = transforms.parse('prefix("ocr") | suffix("{reading}") | tokenize', where='')
    all_of_them = transforms.parse(
        'prefix("ocr") | suffix("{reading}") | also | prefix("caption en") | suffix("{caption}") | tokenize', where=''
    )
    short, long = (p(record, make_context(tokenizer)) for p in (first, all_of_them))
    start = int((short['segment'] > 0).sum())
    np.testing.assert_array_equal(short['text'][:start], long['text'][:start])
    assert (long['segment'] > 0).sum() > start
    with pytest.raises(UserError, match='an evaluation asks one thing'):
        pipeline(record, make_context(tokenizer, train=False))
    with pytest.raises(UserError, match="unknown field 'prefix'"):
        transforms.parse('also', where='')(record, make_context(tokenizer))


def test_questions_by_kind(free, tokenizer):
    pipeline = transforms.parse("question('which', 'where')", where='')
    record = next(r for r in free if {'which', 'where'} <= set(r['questions']['kind']))
    kinds = {pipeline(record, make_context(tokenizer, seed=(seed,)))['kind'] for seed in range(30)}
    assert kinds == {'which', 'where'}
    single = next(r for r in free if r['num_digits'] == 1)
    with pytest.raises(ValueError, match='no question of kind add'):
        transforms.parse("question('add')", where='')(single, make_context(tokenizer))
    with pytest.raises(ValueError, match="unknown question kind 'wich': did you mean 'which'"):
        transforms.parse("question('wich')", where='')(single, make_context(tokenizer))


def test_detect(free, tokenizer):
    words = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
    record = max((free[i] for i in range(20)), key=lambda r: r['num_digits'])
    objects = record['objects']
    names = [f'{c} {words[d]}' for c, d in zip(objects['color'], objects['digit'], strict=True)]

    every = transforms.parse("detect('digit')", where='')(record, make_context(tokenizer))
    assert every['prefix'] == 'detect digit'
    assert every['suffix'].count(' ; ') == len(names) - 1
    boxes = text_to_boxes(every['suffix'])
    assert [label for _, label in boxes] == names
    assert np.abs(np.array([box for box, _ in boxes]) - objects['bbox']).max() <= 0.5 / 1023 + 1e-6
    assert np.array_equal(every['boxes'], objects['bbox'])

    targets = set()
    for seed in range(40):
        one = transforms.parse('detect', where='')(record, make_context(tokenizer, seed=(seed,)))
        target = one['prefix'].removeprefix('detect ')
        targets.add(target)
        found = text_to_boxes(one['suffix'])
        assert [label for _, label in found] == [name for name in names if name == target]
        assert np.array_equal(one['boxes'], objects['bbox'][[i for i, name in enumerate(names) if name == target]])
    assert targets == set(names)


def test_ground(free, tokenizer):
    """A name and its box, each from the other; objects that share their name with none go first."""
    steps = transforms.parse('ground', where='here')
    for index in range(12):
        record, seen = free[index], set()
        pairs = zip(record['objects']['color'], record['objects']['digit'], strict=True)
        names = [f'{color} {scene_language.WORDS[digit]}' for color, digit in pairs]
        for seed in range(6):
            context = make_context(tokenizer, seed=(seed,))
            example = steps(record, context)
            rows, masks = example['grounded'], example['grounded_mask']
            assert rows.shape == masks.shape == (2, 96) and rows.dtype == np.int32 and masks.dtype == bool
            (asked, told), (shown, named) = (
                [tokenizer.decode(row[part & (row != context.contract.pad_id)].tolist()) for part in (~mask, mask)]
                for row, mask in zip(rows, masks, strict=True)
            )
            name = asked.removeprefix('refer ')
            assert asked.startswith('refer ') and named == name and shown == f'describe {told}'
            [(box, _)] = text_to_boxes(told)
            same = [record['objects']['bbox'][i] for i, other in enumerate(names) if other == name]
            assert min(np.abs(np.array(box) - other).max() for other in same) < 1 / 1000
            assert len(same) == 1 or all(names.count(other) > 1 for other in names)
            assert (rows == context.contract.eos_id).sum(axis=1).tolist() == [1, 1] and masks[rows == 1].all()
            seen.add(name)
        assert len(seen) > 1 or len(set(names)) == 1
    assert 'grounded' not in steps(free[0], make_context(tokenizer, train=False))
    nothing = steps({'objects': {'label': [], 'bbox': []}}, make_context(tokenizer))
    assert nothing['grounded'].shape == (2, 96) and not nothing['grounded_mask'].any()


def test_ground_teaches_what_a_crop_left_of_an_object(tokenizer):
    steps = transforms.parse('ground', where='here')
    objects = {'label': ['gone', 'half'], 'bbox': [[0.1, 1.2, 0.5, 1.9], [-0.5, 0.0, 0.5, 1.0]]}
    for seed in range(6):
        example = steps({'objects': objects}, make_context(tokenizer, seed=(seed,)))
        said = tokenizer.decode(example['grounded'][0][example['grounded_mask'][0]].tolist())
        [(box, _)] = text_to_boxes(said)
        np.testing.assert_allclose(box, [0, 0, 0.5, 1], atol=1e-3)
    gone = {'label': ['gone'], 'bbox': [[0.1, 1.2, 0.5, 1.9]]}
    assert not steps({'objects': gone}, make_context(tokenizer))['grounded_mask'].any()


def test_shuffle_channels_permutes_by_the_examples_seed_and_in_training_only(free, tokenizer):
    plain = transforms.parse('decode', where='')(free[0], make_context(tokenizer))['image']
    pipeline = transforms.parse('decode | shuffle_channels', where='')
    seen = set()
    for seed in range(40):
        image = pipeline(free[0], make_context(tokenizer, seed=(seed,)))['image']
        order = tuple(next(i for i in range(3) if (plain[..., i] == image[..., c]).all()) for c in range(3))
        assert sorted(order) == [0, 1, 2]
        again = pipeline(free[0], make_context(tokenizer, seed=(seed,)))['image']
        np.testing.assert_array_equal(again, image)
        seen.add(order)
    assert len(seen) == 6
    np.testing.assert_array_equal(pipeline(free[0], make_context(tokenizer, train=False))['image'], plain)


def test_copy_gives_a_picture_the_name_that_operations_look_for(free, tokenizer):
    record = {'img': free[0]['image'], 'labels': {'fine': 'a red three'}}
    steps = 'decode | resize(32) | text("caption")'
    pipeline = transforms.parse(f'copy("img", "image") | copy("labels/fine", "caption") | {steps}', where='')
    example = pipeline(record, make_context(tokenizer))
    called = {'image': record['img'], 'caption': record['labels']['fine']}
    expected = loader.arrays(transforms.parse(steps, where='')(called, make_context(tokenizer)))
    made = loader.arrays(example)
    assert set(made) == set(expected) == {'image', 'text', 'text_mask'}
    for name in made:
        np.testing.assert_array_equal(made[name], expected[name])
    assert record.keys() == {'img', 'labels'} and list(pipeline.texts(record)) == ['a red three']
    with pytest.raises(UserError, match="unknown field 'imgs'"):
        transforms.parse('copy("imgs", "image")', where='')(record, make_context(tokenizer))


def test_first(free, context):
    example = transforms.parse("first('objects/digit', 'digit') | first('objects/color', 'color')", where='')(
        free[0], context
    )
    assert example['digit'] == int(free[0]['objects']['digit'][0]) and type(example['digit']) is int
    assert example['color'] == free[0]['objects']['color'][0]


def test_choice_is_random_in_training_and_the_first_otherwise(tokenizer):
    pipeline = transforms.parse("choice('captions/text', 'caption')", where='')
    record = {'captions': {'text': ['a cat', 'a dog', 'a cow']}}
    drawn = [pipeline(record, make_context(tokenizer, seed=(i,)))['caption'] for i in range(20)]
    assert set(drawn) == {'a cat', 'a dog', 'a cow'}
    assert drawn == [pipeline(record, make_context(tokenizer, seed=(i,)))['caption'] for i in range(20)]
    assert pipeline(record, make_context(tokenizer, train=False))['caption'] == 'a cat'
    for captions, wrong in (({'text': []}, 'captions/text is empty'), ({}, "no 'text'"), (None, "no 'text'")):
        with pytest.raises(ValueError, match=wrong):  # of this record
            pipeline({'captions': captions}, make_context(tokenizer))
    with pytest.raises(UserError, match="unknown field 'captions'"):  # of all
        pipeline({}, make_context(tokenizer))


@pytest.mark.parametrize(
    ('pipeline', 'value', 'message'),
    [
        ("choice('c', 'one')", {'id': [1], 'text': ['a dog']}, 'c holds fields: write c/id or c/text'),
        ("suffix('{c}')", {'text': ['a dog']}, 'c holds fields: write c/text'),
        ("choice('c', 'one')", 'a dog', 'c is one value and no list: write it as a list of one, or .* {c}'),
        ("majority('c', 'one')", 'yes', 'c is one value and no list'),
        ("first('c', 'one')", b'yes', 'c is one value and no list'),
        ("pick('c', 'at', 'one')", 'yes', 'c is one value and no list'),
        ("join('c', ', ', 'one')", 3, 'c is one value and no list'),
        ("options('c', 'at')", None, 'c is null'),
        ("lower('c')", {'text': ['A']}, 'c holds fields: write c/text'),
        ("choice('c', 'one')", ['a', None], 'c has null among its items'),
        ("join('c', ', ', 'one')", ['a', None], 'c has null among its items'),
        ("join('c', ', ', 'one')", [['a'], ['b']], 'an item of c is a list or holds fields'),
        ("options('c', 'at')", [{'text': 'a'}], 'an item of c is a list or holds fields'),
    ],
)
def test_what_is_no_list_of_texts_is_a_bad_record(tokenizer, pipeline, value, message):
    read = transforms.parse(pipeline, where='')
    with pytest.raises(ValueError, match=message):
        read({'c': value, 'at': 0}, make_context(tokenizer))
    with pytest.raises(ValueError, match=message):
        list(transforms.parse(f"{pipeline} | suffix('{{one}}{{options}}')", where='').texts({'c': value, 'at': 0}))


def test_bytes_are_texts(tokenizer):
    record = {'c': [b'Hund', 'Stra\u00dfe'.encode()], 'b': b'ABC', 'at': 1}
    pipeline = "join('c', ', ', 'all') | options('c', 'at') | choice('c', 'one') | lower('b', 'c') | suffix('{one}')"
    read = transforms.parse(pipeline, where='')
    made = read(record, make_context(tokenizer, train=False))
    assert made['all'] == 'Hund, Straße' and made['options'] == '(A) Hund, (B) Straße' and made['letter'] == 'B'
    assert made['suffix'].lower() == 'hund' and made['b'] == 'abc' and made['c'] == ['hund', 'straße']
    assert list(read.texts(record)) == 2 * ['Hund', 'Straße']
    read = transforms.parse("join('c', ', ', 'all') | prefix('{all}')", where='')
    assert list(read.texts(record)) == ['Hund, Straße']


@pytest.mark.parametrize(
    ('label', 'message'),
    [
        ('cat', 'objects/label is one value and no list'),
        ([None], 'objects/label has null'),
        ({'text': ['cat']}, 'write objects/label/text'),
    ],
)
def test_labels_are_a_list_of_texts(tokenizer, label, message):
    record = {'objects': {'bbox': [[0.0, 0.0, 0.5, 0.5]], 'label': label}}
    with pytest.raises(ValueError, match=message):
        transforms.parse('detect', where='')(record, make_context(tokenizer))


def test_detect_takes_labels_of_any_kind(tokenizer):
    objects = {'bbox': [[0.0, 0.0, 0.5, 0.5], [0.25, 0.5, 1.0, 1.0]], 'label': ['boat', 'Boat']}
    record = {'objects': objects}
    example = transforms.parse("detect('digit')", where='')(record, make_context(tokenizer))
    assert example['suffix'].split(' ; ')[1] == '<loc0256><loc0512><loc1023><loc1023> boat'
    example = transforms.parse('detect', where='')(record, make_context(tokenizer))
    assert example['prefix'] == 'detect boat' and example['boxes'].shape == (1, 4)


def test_tokenize(free, tokenizer):
    pipeline = transforms.parse("decode | resize(32) | prefix('caption en') | suffix('{caption}') | tokenize", where='')
    record = {**free[0], 'caption': 'a red three'}
    train = pipeline(record, make_context(tokenizer, text_length=24))
    expected = [-1] * 4 + [2, *tokenizer.encode('caption en'), 4, *tokenizer.encode('a red three'), 1]
    assert train['text'].tolist() == expected + [0] * (28 - len(expected))
    assert train['image'].shape == (1, 32, 32, 3) and train['image_mask'].tolist() == [True]
    start = len(expected) - len(tokenizer.encode('a red three')) - 1
    assert train['mask_loss'].tolist() == [0] * start + [1] * (len(expected) - start) + [0] * (28 - len(expected))

    evaluated = pipeline(record, make_context(tokenizer, train=False, text_length=24))
    assert evaluated['text'].tolist() == expected[:start] + [0] * (28 - start)
    assert evaluated['mask_loss'].sum() == 0 and evaluated['suffix'] == 'a red three'


def test_a_prompt_that_does_not_fit(free, tokenizer):
    pipeline = transforms.parse("decode | resize(32) | prefix('caption en') | suffix('x') | tokenize", where='')
    for train in (True, False):  # a bad example, and no mistake of the pipeline
        with pytest.raises(ValueError, match='text slots: shorten it, or raise contract.text_length'):
            pipeline(free[0], make_context(tokenizer, text_length=3, train=train))


def test_texts_for_a_tokenizer(free):
    record = free[0]
    assert list(transforms.parse("decode | text('caption')", where='').texts(record)) == [record['caption']]
    several = transforms.parse("choice('captions', 'one') | text('{one}!')", where='')
    assert list(several.texts({'captions': ['a cat', 'a dog']})) == ['a cat!', 'a dog!']
    pipeline = transforms.parse("first('objects/color', 'color') | text('a {color} one')", where='')
    assert list(pipeline.texts(record)) == [f'a {record["objects"]["color"][0]} one'] and 'color' not in record
    assert list(pipeline.texts(record | {'objects': {'color': []}})) == []
    asked = record['questions']
    assert list(transforms.parse('question | tokenize', where='').texts(record)) == asked['question'] + asked['answer']
    pipeline = transforms.parse("prefix('ocr') | suffix('{reading}')", where='')
    assert list(pipeline.texts(record)) == ['ocr', record['reading']]
    named = list(transforms.parse('detect', where='').texts(record))
    assert any(text.startswith('detect ') for text in named) and not any('<loc' in text for text in named)
