"""The tokenizer of a GGUF file: a SentencePiece model as its pieces, and built again from them.

A row of the token table has a piece, or llama.cpp refuses the file: location and segmentation tokens follow the pieces
as user-defined ones, and rows of padding are named as its converter names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from big_vlm.config import UserError
from big_vlm.data.coordinates import NUM_LOCATIONS, NUM_SEGMENTS
from big_vlm.data.tokenizer import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer

_KEY = 'tokenizer.ggml.'
_ADDED, _PADDING = -1000.0, -10_000.0  # scores, as llama.cpp's converter gives them: no text is merged into these
_IDS = {'pad': 'padding', 'eos': 'eos', 'bos': 'bos', 'unk': 'unknown'}  # SentencePiece's → theirs
_ENDS = ('eos_token_id', 'eot_token_id', 'eos_token_ids')
_EOS, _END_OF_TURN = b'<eos>', b'<end_of_turn>'
_LOCATIONS = [f'<loc{i:04d}>'.encode() for i in range(NUM_LOCATIONS)]
_LOCATIONS += [f'<seg{i:03d}>'.encode() for i in range(NUM_SEGMENTS)]
_NONE = np.zeros(0)


def describe(tokenizer: Tokenizer, count: int, end_ids: Sequence[int] = ()) -> dict[str, Any]:
    """What a file says of a tokenizer whose token table has `count` rows, and of the ids that end an answer beside its
    eos; the inverse of `read` and `end_ids`.

    Raises UserError for a tokenizer that is not of Gemma's kind.
    """
    pieces = tokenizer.pieces()
    ids = {theirs: getattr(tokenizer, f'{name}_id') for name, theirs in _IDS.items()}
    if absent := [name for name, i in ids.items() if i < 0]:
        raise UserError(f'{tokenizer.path or "the tokenizer"} has no piece for {", ".join(absent)}: a Gemma needs them')
    if tokenizer.locations:
        pieces += [(text.decode(), _ADDED, USER_DEFINED) for text in _LOCATIONS]
    pieces += [(_padding(i), _PADDING, UNUSED) for i in range(len(pieces), count)]
    texts, scores, kinds = zip(*pieces, strict=True)
    said: dict[str, Any] = {
        'model': 'llama',
        'pre': 'default',
        'add_bos_token': True,
        'add_eos_token': False,
        'add_space_prefix': False,
    }
    said |= {f'{name}_token_id': i for name, i in ids.items()}
    if end_ids:  # llama.cpp knows one of them, its end of a turn
        said |= {'eot_token_id': end_ids[0], 'eos_token_ids': [tokenizer.eos_id, *end_ids]}
    # llama.cpp writes the spaces of user-defined pieces as spaces, and of no others.
    said['tokens'] = [
        text.replace('▁', ' ') if kind == USER_DEFINED else text for text, kind in zip(texts, kinds, strict=True)
    ]
    said |= {'scores': list(scores), 'token_type': list(kinds)}
    return {_KEY + key: value for key, value in said.items()}


def _padding(i: int) -> str:
    return f'[PAD{i}]'


def read(said: Mapping[str, Any], count: int, where: str) -> Tokenizer | None:
    """The tokenizer of a file that says `said`; None if it is not SentencePiece's.

    `count`: rows of the token table. Raises UserError if there are not as many pieces, or pad, eos, bos and unk are not
    among them.
    """
    if said.get(_KEY + 'model') != 'llama':
        return None
    pieces = said.get(_KEY + 'tokens', [])
    scores, kinds = (said.get(_KEY + key, _NONE) for key in ('scores', 'token_type'))
    if not isinstance(pieces, list) or not all(isinstance(numbers, np.ndarray) for numbers in (scores, kinds)):
        raise UserError(f'{where}: its pieces are no texts, or their scores and types no numbers: the file is damaged')
    if not len(pieces) == len(scores) == len(kinds) == count:
        raise UserError(
            f'{where}: {len(pieces):,} pieces, {len(scores):,} scores and {len(kinds):,} types for a token table of '
            f'{count:,} rows: the file is damaged'
        )
    pieces = pieces[: _own(pieces, kinds)]
    ids = {name: said.get(f'{_KEY}{theirs}_token_id', -1) for name, theirs in _IDS.items()}
    if _EOS in pieces:  # files of instruction-tuned models name the end of a turn, which prompts have to spell
        ids['eos'] = pieces.index(_EOS)
    if outside := [name for name, i in ids.items() if not 0 <= i < len(pieces)]:
        raise UserError(f'{where}: no id of {", ".join(outside)} among the {len(pieces):,} pieces')
    # SentencePiece never finds a control piece in a text, and '<start_of_turn>' is to be found. What no text may spell
    # stays one; unk is one to llama.cpp alone.
    kinds = np.where(kinds == CONTROL, USER_DEFINED, kinds)[: len(pieces)].tolist()
    kinds[ids['pad']] = kinds[ids['eos']] = kinds[ids['bos']] = CONTROL
    kinds[ids['unk']] = UNKNOWN
    # llama.cpp writes the spaces of user-defined pieces as spaces, and of no others.
    texts = (
        (piece.decode(errors='replace').replace(' ', '▁') if kind == USER_DEFINED else piece.decode(errors='replace'))
        for piece, kind in zip(pieces, kinds, strict=True)
    )
    return Tokenizer.from_pieces(zip(texts, scores.tolist(), kinds, strict=False), ids, where)


def end_ids(said: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """All ids that end an answer, as a file says and as llama.cpp knows the end of a turn: by its name.

    Raises UserError for what is no id.
    """
    ids = [np.ravel(said[_KEY + key]) for key in _ENDS if _KEY + key in said]
    if not all(np.issubdtype(some.dtype, np.integer) for some in ids):
        raise UserError(f'{where}: its {", ".join(_ENDS)} are no ids: the file is damaged')
    found = [int(i) for some in ids for i in some]
    pieces = said.get(_KEY + 'tokens')
    if isinstance(pieces, list) and _END_OF_TURN in pieces:
        found.append(pieces.index(_END_OF_TURN))
    return tuple(dict.fromkeys(found))


def _own(pieces: list[bytes], kinds: np.ndarray) -> int:
    """How many pieces there are before location and segmentation tokens, and before padding."""
    count = len(pieces)
    while count and kinds[count - 1] == UNUSED and pieces[count - 1] == _padding(count - 1).encode():
        count -= 1
    own = count - len(_LOCATIONS)
    return own if own > 0 and pieces[own:count] == _LOCATIONS else count
