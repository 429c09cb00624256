"""Config files, their argument and overrides: values arrive typed, every mistake is one line."""

import pathlib

import pytest

from big_vlm.config import UserError, load_config, take_overrides, validate

FILE = """
from ml_collections import ConfigDict
from configs.arguments import parse_arg

def get_config(arg=''):
    arg = parse_arg(arg, size=48, quick=False, name='cells')
    stage = dict(task='contrastive', total=dict(steps=arg['size']), data=dict(sources=dict(s=dict(weight=2.0))))
    return ConfigDict(dict(stages=('one', 'two'), one=stage, two=stage))
"""


@pytest.fixture
def file(tmp_path):
    folder = tmp_path / 'configs'
    folder.mkdir()
    (folder / 'arguments.py').symlink_to(pathlib.Path(__file__).parents[2] / 'configs' / 'arguments.py')
    (folder / 'run.py').write_text(FILE)
    return folder / 'run.py'


@pytest.mark.smoke
def test_argument_and_overrides(file):
    overrides = {
        'one.optimizer.lr': '3e-4',
        'one.model.text.mask': 'true',
        'one.data.sources.s.split': 'train[:50%]',
        'one.optimizer.rules': "(('img/.*', {'frozen': True}), ('.*', {}))",
        'two.evals': "{'e': {'kind': 'retrieval'}}",
        'two.contract.value_range': '(0, 1)',
        'stages': "('two', 'one')",
    }
    stages = validate(load_config(f'{file}:size=7', overrides))
    one, two = stages['one'], stages['two']
    assert list(stages) == ['two', 'one']
    assert (one.total.steps, two.total.steps) == (7, 7)
    assert (one.optimizer.lr, two.optimizer.lr) == (3e-4, 1e-3)
    assert one.model.text.mask is True
    assert one.data.sources['s'].split == 'train[:50%]'
    assert one.data.sources['s'].weight == 2.0
    assert [pattern for pattern, rule in one.optimizer.rules if rule.frozen] == ['img/.*']
    assert two.evals['e'].kind == 'retrieval'
    assert two.contract.value_range == (0.0, 1.0)


@pytest.mark.parametrize(
    ('key', 'text', 'message'),
    [
        ('one.optimizer.lrr', '1', "unknown key 'lrr' (--config.one.optimizer.lrr): did you mean 'lr'?"),
        ('optimizer.lr', '1', "unknown key 'optimizer' (--config.optimizer.lr): valid: one.…, stages, two.…"),
        ('one', '{}', "unknown key 'one'"),
        ('one.batch_size', '1e3', "--config.one.batch_size: must be int, got '1e3'"),
        ('one.model.scan', 'yes', "--config.one.model.scan: must be True or False, got 'yes'"),
        ('one.optimizer.lr', '', "--config.one.optimizer.lr: must be float, got ''"),
        ('one.data.sources.t.split', 'x', "unknown name 't' (--config.one.data.sources.t.split): valid: s"),
        ('one.batch_size.x', '1', '--config.one.batch_size.x: '),
        ('one.evals', '__import__("os")', 'is no Python literal'),
    ],
)
def test_a_bad_override_is_one_line(file, key, text, message):
    with pytest.raises(UserError) as error:
        load_config(str(file), {key: text})
    assert message in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('arg', 'message'),
    [
        ('siez=3', "unknown argument 'siez': did you mean 'size'? Valid: name, quick, size"),
        ('size=x', "argument 'size' must be int, got 'x'"),
        ('size', "argument 'size' needs a value: size=48"),
        ('quick=maybe', "argument 'quick' must be bool, got 'maybe'"),
        ('size=1,size=2', "argument 'size' is given twice"),
    ],
)
def test_a_bad_argument_is_one_line(file, arg, message):
    with pytest.raises(UserError) as error:
        load_config(f'{file}:{arg}')
    assert message in str(error.value)
    assert str(error.value).startswith(f'{file}:6: ')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('def get_confg():\n  pass\n', 'no function get_config(arg)'),
        ('def get_config(\n', 'was never closed'),
        ('import not_there_at_all\n', 'ModuleNotFoundError'),
        ('def get_config(arg):\n  return {}[1]\n', ':2: KeyError: 1'),
        ('def get_config(arg):\n  return 3\n', 'must return a ConfigDict, not int'),
        ('def get_config():\n  return {}\n', "takes no argument, got 'a=1'"),
    ],
)
def test_a_bad_file_is_one_line(file, text, message):
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(f'{file}:a=1')
    assert message in str(error.value)
    assert '\n' not in str(error.value)


def test_a_missing_file_names_its_neighbour(file):
    with pytest.raises(UserError, match=r"unknown config file .*rum\.py.* did you mean .*run\.py'"):
        load_config(str(file.with_name('rum.py')))
    with pytest.raises(UserError, match='no file'):
        load_config('nowhere/at/all.py')


def test_take_overrides():
    argv = ['main', '--config=a.py:x=1', '--config.optimizer.lr=1e-4', '--workdir', 'w', '--config.seed', '3']
    rest, overrides = take_overrides(argv)
    assert rest == ['main', '--config=a.py:x=1', '--workdir', 'w']
    assert overrides == {'optimizer.lr': '1e-4', 'seed': '3'}
    with pytest.raises(UserError, match='has no value'):
        take_overrides(['--config.seed'])
    with pytest.raises(UserError, match="given twice, as '1' and '2'"):
        take_overrides(['--config.seed=1', '--config.seed=2'])
