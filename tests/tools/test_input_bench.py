"""The benchmark of decoding and resizing pictures: what it tells beside its times."""

import json

import pytest

from tools.bench import input as tool


@pytest.mark.parametrize('height, apart', [(375, 0.2), (1080, 0.5)])
def test_pixels_are_told_before_times(capsys, height, apart):
    """`decode | resize` has Pillow's pixels; of a large picture `decode_resize` sees the low frequencies alone."""
    tool.main([f'--height={height}', '--method=bicubic', '--quality=75', '--rounds=1'])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told['quality'] == 75
    assert told['decode | resize off by'] == told['decode | resize at most'] == 0
    assert 0 < told['decode_resize off by'] < apart
    assert set(told['seconds']) >= {'Pillow', 'decode | resize', 'decode_resize', 'decoding'}
