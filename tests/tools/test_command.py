"""What all commands share: a mistake on the command line is one line that names the fix."""

import pytest

from big_vlm import main
from tools import command, sweep
from tools.inspect import __main__ as inspect


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ([], 'the following arguments are required: --image_size; python -m tools.x --help tells more'),
        (['--image_size=3', '--tokenzer=a'], "unknown flag '--tokenzer': did you mean '--tokenizer'? Valid: --image"),
        (['--image_size=3', '--tok=a'], "unknown flag '--tok': "),
        (['--image_size=a'], "argument --image_size: invalid int value: 'a'; python"),
        (['--image_size=3', 'more'], 'unrecognized arguments: more; python'),
    ],
)
def test_mistakes_are_one_line(capsys, argv, message):
    parser = command.parser('x', 'Does it.')
    parser.add_argument('--image_size', type=int, required=True)
    parser.add_argument('--tokenizer')
    assert command.end(parser.parse_args, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {message}') and error.count('\n') == 1


def test_a_workdir_at_home(monkeypatch):
    monkeypatch.setenv('HOME', '/home/somebody')
    for parse in (main._flags, sweep.parser().parse_args, inspect.parser().parse_args):
        assert parse(['--config=a.py', '--workdir=~/runs/x']).workdir == '/home/somebody/runs/x'
