"""Prompt rows written out by hand."""

import dataclasses

import numpy as np
import pytest

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.data import prompts
from big_vlm.data.contract import Contract

PAD, EOS, BOS, NEWLINE = 0, 1, 2, 4
CONTRACT = Contract(
    image_size=8, resample='bilinear', antialias=True, value_range=(-1.0, 1.0), text_length=8, lower=True, eos=True,
    separator='\n', separator_ids=(NEWLINE,), image_tokens=3, vocab_size=100, pad_id=PAD, bos_id=BOS, eos_id=EOS,
    tokenizer_sha256='abc',
)  # fmt: skip


def rows(row: dict) -> dict:
    assert all(value.dtype == (np.float32 if key == 'mask_loss' else np.int32) for key, value in row.items())
    return {key: value.tolist() for key, value in row.items()}


def test_training_row():
    assert rows(prompts.generative_row([50, 51], [60, 61], CONTRACT)) == {
        #             image        bos  prefix  sep  suffix  eos  padding
        'text': [-1, -1, -1, BOS, 50, 51, NEWLINE, 60, 61, EOS, PAD],
        'segment': [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        'position': [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0],
        'mask_ar': [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0],
        'mask_loss': [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0],
    }


def test_an_image_of_fewer_patches_leaves_padding_behind():
    row = prompts.generative_row([50, 51], [60, 61], CONTRACT)
    assert rows(prompts.shorter_image(row, 2, CONTRACT)) == rows(row) | {
        'segment': [1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0],
        'position': [0, 1, 0, 2, 3, 4, 5, 6, 7, 8, 0],
    }
    assert rows(prompts.shorter_image(row, 3, CONTRACT)) == rows(row)


def test_evaluation_row_ends_after_the_separator():
    assert rows(prompts.generative_row([50], None, CONTRACT)) == {
        'text': [-1, -1, -1, BOS, 50, NEWLINE, PAD, PAD, PAD, PAD, PAD],
        'segment': [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        'position': [0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0],
        'mask_ar': [0] * 11,
        'mask_loss': [0] * 11,
    }


def test_a_long_answer_is_cut_and_loses_its_eos():
    row = rows(prompts.generative_row([50, 51], [60, 61, 62, 63, 64], CONTRACT))
    assert row['text'] == [-1, -1, -1, BOS, 50, 51, NEWLINE, 60, 61, 62, 63]
    assert row['mask_loss'] == [0] * 7 + [1] * 4
    exact = rows(prompts.generative_row([50, 51], [60, 61, 62], CONTRACT))
    assert exact['text'][-4:] == [60, 61, 62, EOS]


def test_more_turns_follow_in_the_same_row():
    contract = dataclasses.replace(CONTRACT, text_length=14)
    more = [([52, 53], [61]), ([54], [62, 63, 64])]
    assert rows(prompts.generative_row([50, 51], [60], contract, more)) == {
        #             image        bos  prefix  sep  suffix eos  prefix  sep  suffix eos  the third does not fit
        'text': [-1, -1, -1, BOS, 50, 51, NEWLINE, 60, EOS, 52, 53, NEWLINE, 61, EOS, PAD, PAD, PAD],
        'segment': [1] * 14 + [0] * 3,
        'position': [*range(14), 0, 0, 0],
        'mask_ar': [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0],
        'mask_loss': [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0],
    }
    # Four tokens of one answer, one of another.
    longer = prompts.generative_row([50], [60, 61, 62], contract, [([52], [])])
    assert longer['mask_loss'][6:].tolist() == pytest.approx([0.625] * 4 + [0] * 2 + [2.5] + [0] * 4)
    # A first turn that fills the row, and one that is cut, leave no room for others.
    for suffix in ([60] * 10, [60] * 9):
        alone, followed = (rows(prompts.generative_row([50, 51], suffix, contract, m)) for m in ((), more))
        assert alone == followed


def test_turns_of_an_image_that_sees_no_prompt():
    contract = dataclasses.replace(CONTRACT, text_length=14, image_alone=True)
    more = [([52, 53], [61]), ([54], [62, 63, 64])]
    assert rows(prompts.generative_row([50, 51], [60], contract, more)) == {
        #             image        bos  prefix  sep  suffix eos  bos  prefix  sep  suffix eos  the third does not fit
        'text': [-1, -1, -1, BOS, 50, 51, NEWLINE, 60, EOS, BOS, 52, 53, NEWLINE, 61, EOS, PAD, PAD],
        'segment': [-1, -1, -1] + [1] * 6 + [2] * 6 + [0] * 2,
        'position': [0, 1, 2, *range(3, 9), *range(3, 9), 0, 0],
        'mask_ar': [0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0],
        'mask_loss': [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0],
    }
    alone = rows(prompts.generative_row([50, 51], None, contract))
    assert alone['segment'] == [1] * 7 + [0] * 10
    assert alone['mask_ar'] == [0, 0, 0, 1] + [0] * 13


def test_a_long_prompt_is_an_error():
    assert prompts.generative_row([50] * 6, None, CONTRACT)['segment'].sum() == 11
    with pytest.raises(UserError, match='the prompt takes 9 tokens of the 8 text slots'):
        prompts.generative_row([50] * 7, None, CONTRACT)
    with pytest.raises(prompts.TooLong):
        prompts.generative_row([50] * 6, [60], CONTRACT)


def test_an_empty_answer_is_eos_alone():
    row = rows(prompts.generative_row([], [], CONTRACT))
    assert row['text'][3:6] == [BOS, NEWLINE, EOS] and row['mask_loss'] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ('ids', 'eos', 'text', 'real'),
    [
        ([7, 8], True, [7, 8, EOS, PAD], 3),
        ([5, 6, 7, 8, 9], True, [5, 6, 7, EOS], 4),
        ([5, 6, 7], True, [5, 6, 7, EOS], 4),
        ([], True, [EOS, PAD, PAD, PAD], 1),
        ([7, 8], False, [7, 8, PAD, PAD], 2),
        ([5, 6, 7, 8, 9], False, [5, 6, 7, 8], 4),
    ],
)
def test_contrastive_text(ids, eos, text, real):
    made, mask = prompts.contrastive_text(ids, dataclasses.replace(CONTRACT, text_length=4, eos=eos))
    assert made.dtype == np.int32 and made.tolist() == text
    assert mask.dtype == bool and mask.tolist() == [True] * real + [False] * (4 - real)


def test_padding_uses_the_contracts_own_id():
    contract = dataclasses.replace(CONTRACT, text_length=4, pad_id=1)  # SigLIP 1 pads with its eos
    assert prompts.contrastive_text([7], contract)[0].tolist() == [7, 1, 1, 1]


def test_contract_round_trip():
    import json

    assert Contract.from_dict(json.loads(json.dumps(CONTRACT.to_dict()))) == CONTRACT


def test_contract_from_foreign_entries():
    values = CONTRACT.to_dict()
    with pytest.raises(UserError, match="did you mean 'image_size'"):
        Contract.from_dict({**values, 'image_siz': 3})
    values.pop('eos_id')
    with pytest.raises(UserError, match='lacks eos_id'):
        Contract.from_dict(values)


def test_contract_of_a_stage(tmp_path):
    from big_vlm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(['a red three'], 300, tmp_path / 't.model')
    contract = Contract.make(config.Contract(image_size=48, text_length=20), tokenizer, image_tokens=9)
    assert (contract.image_size, contract.text_length, contract.image_tokens) == (48, 20, 9)
    assert contract.separator_ids == (4,) and contract.vocab_size == tokenizer.vocab_size
    assert (contract.pad_id, contract.bos_id, contract.eos_id) == (0, 2, 1)
    assert contract.tokenizer_sha256 == tokenizer.sha256
