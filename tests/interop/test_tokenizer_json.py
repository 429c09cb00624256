"""Folders whose tokenizer is a tokenizer.json alone, laid out as transformers 5 and its predecessors save it."""

import json
import shutil
from pathlib import Path

import pytest

from big_vlm import bundle, interop
from big_vlm.config import UserError
from big_vlm.data.tokenizer import BYTE, NORMAL, Tokenizer
from big_vlm.interop import tokenizer_json
from big_vlm.training import initial_weights

GOLDENS = Path(__file__).parents[1] / 'goldens'
TEXTS = ('a red three', 'two  blue circles', '\nwhat is\tgreen ?', 'naïve ☃ 漢字', '<loc0007> in the top left')
SPACES = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}


@pytest.fixture(scope='module')
def pieces():
    return Tokenizer.load(GOLDENS / 'siglip2' / 'tokenizer.model')


def described(tokenizer):
    """The content of a tokenizer.json: merges in the order of the pieces that they make."""
    pieces = tokenizer.pieces()
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    pairs = [
        (i, at, piece)
        for piece, i in vocab.items()
        if pieces[i][2] == NORMAL
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    added = [(i, piece, i < 4) for i, (piece, _, kind) in enumerate(pieces) if kind not in (NORMAL, BYTE)]
    return {
        'added_tokens': [{'id': i, 'content': piece, 'special': special} for i, piece, special in added],
        'normalizer': {'type': 'Sequence', 'normalizers': [{'type': 'Lowercase'}, SPACES]},
        'model': {
            'type': 'BPE',
            'byte_fallback': True,
            'vocab': vocab,
            'merges': [[piece[:at], piece[at:]] for _, at, piece in sorted(pairs)],
        },
    }


def as_older_versions(content):
    """Merges as texts, the tab for its byte, location tokens and the image's among the pieces."""
    content['normalizer'] = SPACES
    model = content['model']
    model['merges'] = [' '.join(merge) for merge in model['merges']]
    model['vocab']['\t'] = model['vocab'].pop('<0x09>')
    for token in (*(f'<loc{i:04d}>' for i in range(1024)), *(f'<seg{i:03d}>' for i in range(128)), '<image>'):
        content['added_tokens'].append({'id': len(model['vocab']), 'content': token, 'special': token == '<image>'})
        model['vocab'][token] = len(model['vocab'])


@pytest.mark.parametrize('change', [lambda content: None, as_older_versions])
def test_the_pieces_and_their_merges(pieces, tmp_path, change):
    content = described(pieces)
    change(content)
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    made = tokenizer_json.read(tmp_path / 'tokenizer.json')
    assert made.same_pieces(pieces)
    assert [kind for _, _, kind in made.pieces()] == [kind for _, _, kind in pieces.pieces()]
    assert (made.pad_id, made.eos_id, made.bos_id, made.unk_id) == (0, 1, 2, 3)
    for text in TEXTS:
        assert made.encode(text) == pieces.encode(text), text
        assert made.decode(made.encode(text)) == text


def test_a_folder_with_nothing_else(pieces, tmp_path):
    folder = shutil.copytree(GOLDENS / 'siglip2', tmp_path / 'folder', ignore=lambda *_: ['tokenizer.model'])
    (folder / 'tokenizer.json').write_text(json.dumps(described(pieces)))
    bundle.convert(folder, tmp_path / 'again', to='hugging_face')
    assert Tokenizer.load(tmp_path / 'again' / 'tokenizer.model').same_pieces(pieces)
    initial_weights._check_tokenizer(str(GOLDENS / 'siglip2' / 'tokenizer.model'), folder, 'config.init_from')
    for given in ('', str(GOLDENS / 'siglip' / 'spiece.model')):
        with pytest.raises(UserError, match='belong to its tokenizer.* --to=bundle writes it'):
            initial_weights._check_tokenizer(given, folder, 'config.init_from')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda content: content['model'].update(type='Unigram'), "not of Gemma's kind.*beside it, as tokenizer.model"),
        (lambda content: content.update(normalizer=None), "not of Gemma's kind"),
        (lambda content: content['model']['vocab'].update(red=999), 'ids are missing'),
        (lambda content: content['model'].pop('merges'), "damaged .KeyError: 'merges'"),
        (lambda content: content['model']['vocab'].pop('<0x0A>'), 'ids are missing'),
    ],
)
def test_what_is_no_such_tokenizer_is_refused(pieces, tmp_path, change, message):
    folder = shutil.copytree(GOLDENS / 'siglip2', tmp_path / 'folder', ignore=lambda *_: ['tokenizer.model'])
    content = described(pieces)
    change(content)
    (folder / 'tokenizer.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        interop.read(folder).own_tokenizer()
    assert '\n' not in str(error.value) and str(folder / 'tokenizer.json') in str(error.value)
