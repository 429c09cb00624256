"""What is written is there whole or not at all, also where the disk is full in the middle of it."""

import pytest

from big_vlm import config
from big_vlm.config import UserError, whole_file


def test_of_a_line_that_does_not_fit_nothing_is_left(tmp_path, file_limit):
    file = tmp_path / 'lines'
    whole_file.append(file, b'first\n')
    file_limit(10)
    with pytest.raises(UserError, match='lines: not written: File too large'):
        whole_file.append(file, b'second\n')
    assert file.read_bytes() == b'first\n'
    file_limit(-1)
    whole_file.append(file, b'third\n')
    assert file.read_bytes() == b'first\nthird\n'


def test_of_a_file_that_does_not_fit_the_old_one_stays(tmp_path, file_limit, capsys):
    file = tmp_path / 'file'
    whole_file.write_text(file, 'before')
    file_limit(3)
    with pytest.raises(UserError, match='file: not written: File too large'):
        whole_file.write_text(file, 'after')
    whole_file.write_text(file, 'after', must=False)
    assert 'file: not written: File too large. The run goes on' in capsys.readouterr().err
    assert file.read_text() == 'before' and [one.name for one in tmp_path.iterdir()] == ['file']


def test_a_line_that_nobody_hears_is_no_error(tmp_path, file_limit):
    file_limit(3)
    with open(tmp_path / 'log', 'w') as log:
        config.say('a progress line', log)
        file_limit(-1)
        config.say('and another', log)
    assert (tmp_path / 'log').read_text().endswith('and another\n')
