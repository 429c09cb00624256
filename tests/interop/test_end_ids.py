"""Instruction-tuned Gemmas have several ids that end an answer: read, kept in a bundle, heard, and written again."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from big_vlm import bundle, interop
from big_vlm.config import UserError
from big_vlm.data.contract import Contract
from big_vlm.data.tokenizer import CONTROL, USER_DEFINED, Tokenizer
from big_vlm.interop import gguf_tokenizer

GOLDENS = Path(__file__).parents[1] / 'goldens'
PROMPT = 'a red three'


def folder_with(path, name='gemma', generation=None, **config):
    """The golden with other entries in its config.json, and `generation` for its generation_config.json."""
    shutil.copytree(GOLDENS / name, path)
    (path / 'generation_config.json').unlink()
    if generation is not None:
        (path / 'generation_config.json').write_text(json.dumps(generation))
    content = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps(content | config))
    return path


@pytest.mark.parametrize(
    ('generation', 'config', 'ids'),
    [
        ({'eos_token_id': [1, 107]}, {'eos_token_id': 1}, (1, 107)),
        ({'eos_token_id': 1}, {'eos_token_id': [1, 107]}, (1,)),  # what is said of generation wins
        ({'top_k': 64}, {'eos_token_id': [1, 107]}, (1, 107)),
        (None, {'eos_token_id': [107, 106]}, (107, 106)),
        (None, {'eos_token_id': None, 'text_config': {'eos_token_id': [1, 106]}}, (1, 106)),
        (None, {'eos_token_id': None}, ()),
    ],
)
def test_what_a_folder_says(tmp_path, generation, config, ids):
    model = interop.read(folder_with(tmp_path / 'x', generation=generation, **config))
    contract = model.contract(model.own_tokenizer())
    assert model.end_ids == ids
    assert (contract.eos_id, contract.end_ids) == (1, tuple(i for i in ids if i != 1))
    assert contract.ends == (1, *contract.end_ids)
    assert Contract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


def test_what_is_no_id_is_refused(tmp_path):
    folder = folder_with(tmp_path / 'x', generation={'eos_token_id': [1, '<end_of_turn>']})
    message = f"{folder}: eos_token_id is [1, '<end_of_turn>']: must be an id or a list of ids"
    with pytest.raises(UserError, match=re.escape(message)):
        interop.read(folder)


def said_by(folder):
    return [
        json.loads((folder / file).read_text())['eos_token_id'] for file in ('config.json', 'generation_config.json')
    ]


def test_a_bundle_gives_a_folder_its_ids_back(tmp_path):
    bundle.convert(folder_with(tmp_path / 'in', generation={'eos_token_id': [1, 107]}), tmp_path / 'bundle')
    bundle.convert(tmp_path / 'bundle', tmp_path / 'out')
    assert said_by(tmp_path / 'out') == [[1, 107]] * 2
    assert interop.read(tmp_path / 'out').end_ids == (1, 107)


@pytest.mark.parametrize('name', ['gemma', 'paligemma'])
def test_a_folder_of_a_folder(tmp_path, name):
    folder = folder_with(tmp_path / 'in', name, {'eos_token_id': [1, 107]})
    bundle.convert(folder, tmp_path / 'out', to='hugging_face')
    assert said_by(tmp_path / 'out') == [[1, 107]] * 2
    bundle.convert(GOLDENS / name, tmp_path / 'plain', to='hugging_face')
    assert said_by(tmp_path / 'plain') == [1, 1]


def chat_file(**ids):
    """What a GGUF file of an instruction-tuned Gemma says of its tokenizer: turns are control pieces to llama.cpp."""
    said = gguf_tokenizer.describe(Tokenizer.load(GOLDENS / 'gemma' / 'tokenizer.model').without_locations(), 300)
    tokens, kinds = (said[f'tokenizer.ggml.{key}'] for key in ('tokens', 'token_type'))
    for i, token in ((1, '<eos>'), (298, '<start_of_turn>'), (299, '<end_of_turn>')):
        tokens[i], kinds[i] = token, CONTROL
    lists = {'tokens': [token.encode() for token in tokens], 'token_type': np.array(kinds)}
    lists |= {'scores': np.array(said['tokenizer.ggml.scores'])} | ids
    return said | {f'tokenizer.ggml.{key}': value for key, value in lists.items()}


@pytest.mark.parametrize(
    ('ids', 'ends'),
    [
        ({'eos_token_id': 299}, (299,)),
        ({'eos_token_id': 1}, (1, 299)),  # by its name, as llama.cpp has it
        ({'eos_token_id': 1, 'eot_token_id': 299}, (1, 299)),
        ({'eos_token_id': 299, 'eos_token_ids': np.array([299, 7])}, (299, 7)),
    ],
)
def test_what_a_gguf_file_says(ids, ends):
    said = chat_file(**ids)
    assert gguf_tokenizer.end_ids(said, 'here') == ends
    tokenizer = gguf_tokenizer.read(said, 300, 'here')
    assert (tokenizer.eos_id, tokenizer.pieces()[1][2], tokenizer.pieces()[299][2]) == (1, CONTROL, USER_DEFINED)
    # A chat's prompt: turns are spelt by one id each, eos by none.
    red = tokenizer.encode('red')
    assert tokenizer.encode('<start_of_turn>red<end_of_turn>\n') == [298, *red, 299, *tokenizer.encode('\n')]
    assert 1 not in tokenizer.encode('<eos>')


def test_what_is_no_id_in_a_gguf_file():
    with pytest.raises(UserError, match='here: its eos_token_id, eot_token_id, eos_token_ids are no ids'):
        gguf_tokenizer.end_ids(chat_file(eot_token_id='x'), 'here')


def test_a_gguf_file_gives_the_ids_back(tmp_path):
    gguf = pytest.importorskip('gguf', reason='needs the package gguf')
    folder = folder_with(tmp_path / 'x', generation={'eos_token_id': [1, 107, 7]})
    bundle.convert(folder, tmp_path / 'x.gguf')
    fields = gguf.GGUFReader(tmp_path / 'x.gguf').fields
    assert fields['tokenizer.ggml.eos_token_id'].contents() == 1
    assert fields['tokenizer.ggml.eot_token_id'].contents() == 107
    bundle.convert(tmp_path / 'x.gguf', tmp_path / 'out')
    assert interop.read(tmp_path / 'x.gguf').end_ids == interop.read(tmp_path / 'out').end_ids == (1, 107, 7)


@pytest.mark.parity
def test_transformers_ends_where_we_do(tmp_path):
    torch, transformers = (pytest.importorskip(name) for name in ('torch', 'transformers'))
    whole = bundle.load_any(GOLDENS / 'gemma').generate(None, PROMPT, max_new_tokens=8)[0].ids
    bundle.convert(folder_with(tmp_path / 'in', generation={'eos_token_id': [1, whole[3]]}), tmp_path / 'bundle')
    bundle.convert(tmp_path / 'bundle', tmp_path / 'out')
    ours = bundle.load_any(tmp_path / 'bundle')
    prompt = torch.tensor([[2, *ours.tokenizer.encode(PROMPT)]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
    said = theirs.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert said == ours.generate(None, PROMPT, max_new_tokens=8)[0].ids and said[-1] == whole[3] and len(said) < 8
