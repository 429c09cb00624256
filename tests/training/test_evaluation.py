"""Evaluations that could not run, or would not do what they say, are refused from the config alone."""

import micro_config
import pytest

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.training import evaluation


@pytest.mark.parametrize(
    ('stage', 'name', 'changes', 'message'),
    [
        (
            'multimodal',
            'answer',
            {'label': 'caption'},
            r"answer\.label: 'caption' has no effect.*suffix.*leave label out",
        ),
        ('pretrain', 'retrieval', {'slices': ('held_out',)}, r"retrieval\.slices: \('held_out',\) .*leave slices out"),
    ],
)
def test_refused(stage, name, changes, message, tmp_path):
    raw = getattr(micro_config, stage)(str(tmp_path))
    evaluation.check(config.parse_stage(raw), 'config')
    raw['evals'][name].update(changes)
    with pytest.raises(UserError, match=r'config\.evals\.' + message) as error:
        evaluation.check(config.parse_stage(raw), 'config')
    assert '\n' not in str(error.value)
