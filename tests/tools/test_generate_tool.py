"""The command line: what it teaches, what it refuses, and what it prints."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from big_vlm.config import UserError
from tools import generate

ROOT = pathlib.Path(__file__).parents[2]


def test_help_shows_examples_and_imports_nothing_heavy():
    code = (
        'import sys, tools.generate as tool\n'
        'try: tool.main(["--help"])\n'
        'except SystemExit as stop: assert stop.code == 0\n'
        'heavy = {"jax", "numpy", "PIL", "flax", "tensorflow_datasets"} & set(sys.modules)\n'
        'assert not heavy, heavy'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--image=scene.png --prompt='caption en'" in result.stdout
    assert '--json' in result.stdout and '--draw' in result.stdout


def test_pairs():
    assert generate.pairs(['a'], ['p', 'q']) == [('a', 'p'), ('a', 'q')]
    assert generate.pairs(['a', 'b'], ['p']) == [('a', 'p'), ('b', 'p')]
    assert generate.pairs(['a', 'b'], ['p', 'q']) == [('a', 'p'), ('b', 'q')]
    with pytest.raises(UserError, match='2 images and 3 prompts'):
        generate.pairs(['a', 'b'], ['p', 'q', 'r'])
    with pytest.raises(UserError, match='--image=FILE is missing'):
        generate.pairs([], ['p'])
    with pytest.raises(UserError, match='--prompt'):
        generate.pairs(['a'], [])


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['BUNDLE', '--prompt=x'], '--image=FILE is missing'),
        (['BUNDLE', '--prompt=x', '--image={tmp}/none.png'], 'none.png: no such file'),
        (['{tmp}/nowhere', '--prompt=x', '--image={tmp}/a.png'], 'nowhere: no such folder'),
        (['BUNDLE', '--prompt=x', '--image={tmp}/a.png', '--draw={tmp}/out.txt'], 'out.txt: must end in the name'),
        (['BUNDLE', '--prompt=x', '--prompt=y', '--image={tmp}/a.png', '--draw=o.png'], 'need a folder, such as --draw=o'),
        (['BUNDLE', '--prompt=x', '--image={tmp}/a.png', '--batch_size=0'], '--batch_size=0'),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / 'a.png')
    assert generate.main([word.format(tmp=tmp_path) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err and err.startswith('error: ') and err.count('\n') == 1
