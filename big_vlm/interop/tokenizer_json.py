"""Gemma's tokenizer out of a tokenizer.json, which is all that transformers 5 saves of it: SentencePiece's model again.

Byte pairs and pieces say the same there: a piece's score is the rank of the merge that makes it, and the higher one is
made first.
"""

from __future__ import annotations

import pathlib
from typing import Any

from big_vlm.config import UserError
from big_vlm.data.coordinates import NUM_LOCATIONS, NUM_SEGMENTS
from big_vlm.data.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Tokenizer
from big_vlm.interop.hugging_face_keys import read_json

NAME = 'tokenizer.json'
_IDS = {'pad': 0, 'eos': 1, 'bos': 2, 'unk': 3}  # every Gemma's, whatever its folder calls the end of a turn
_BYTES = [f'<0x{i:02X}>' for i in range(256)]
_SPACES = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}


def read(file: pathlib.Path) -> Tokenizer:
    """The tokenizer that the file tells; its lower-casing, if any, is the contract's business.

    Raises UserError for one that is not of Gemma's kind, or a file that is damaged.
    """
    content = read_json(file)
    try:
        return _tokenizer(content, file)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{file}: damaged ({type(error).__name__}: {error})') from None


def _tokenizer(content: dict[str, Any], file: pathlib.Path) -> Tokenizer:
    model, vocab = content['model'], content['model']['vocab']
    normalizer = content['normalizer'] or {}
    steps = [step for step in normalizer.get('normalizers', [normalizer]) if step != {'type': 'Lowercase'}]
    if model.get('type') != 'BPE' or not model.get('byte_fallback') or steps != [_SPACES]:
        raise UserError(
            f"{file} is not of Gemma's kind, byte pairs, then bytes, of texts as they stand: put the SentencePiece "
            'file that it was made of beside it, as tokenizer.model'
        )
    pieces = sorted(vocab, key=vocab.get)
    special = {token['id'] for token in content['added_tokens'] if token['special']}
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))) or not special >= set(_IDS.values()):
        raise ValueError('ids are missing, or pad, eos, bos and unk are not 0 to 3')
    # Location and segmentation tokens, and an image token behind them, are added to the pieces, not of them.
    first = vocab.get('<loc0000>', len(pieces))
    if pieces[first + NUM_LOCATIONS + NUM_SEGMENTS - 1 :][:1] == [f'<seg{NUM_SEGMENTS - 1:03d}>']:
        del pieces[first:]
    if _BYTES[9] not in vocab:  # older converters put the tab itself in its place
        pieces[vocab['\t']] = _BYTES[9]
    merges = [merge.split(' ') if isinstance(merge, str) else merge for merge in model['merges']]
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    kinds = dict.fromkeys(_BYTES, BYTE) | {token['content']: USER_DEFINED for token in content['added_tokens']}
    kinds |= {pieces[i]: UNKNOWN if name == 'unk' else CONTROL for name, i in _IDS.items()}
    made = ((piece, scores.get(piece, -float(len(merges))), kinds.get(piece, NORMAL)) for piece in pieces)
    return Tokenizer.from_pieces(made, _IDS, file)
