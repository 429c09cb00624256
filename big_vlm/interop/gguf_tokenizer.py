"""The tokenizer of a GGUF file, built again from its pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from big_vlm.config import UserError
from big_vlm.data.tokenizer import CONTROL, UNKNOWN, USER_DEFINED, Tokenizer

_IDS = {'pad': 'padding', 'eos': 'eos', 'bos': 'bos', 'unk': 'unknown'}  # SentencePiece's → theirs
_NONE = np.zeros(0)


def read(said: Mapping[str, Any], count: int, where: str) -> Tokenizer | None:
    """The tokenizer of a file that says `said`; None if it is not SentencePiece's.

    `count`: rows of the token table. Raises UserError if there are not as many pieces, or pad, eos, bos and unk are not
    among them.
    """
    if said.get('tokenizer.ggml.model') != 'llama':
        return None
    pieces = said.get('tokenizer.ggml.tokens', [])
    scores, kinds = (said.get(f'tokenizer.ggml.{key}', _NONE) for key in ('scores', 'token_type'))
    if not isinstance(pieces, list) or not all(isinstance(numbers, np.ndarray) for numbers in (scores, kinds)):
        raise UserError(f'{where}: its pieces are no texts, or their scores and types no numbers: the file is damaged')
    if not len(pieces) == len(scores) == len(kinds) == count:
        raise UserError(
            f'{where}: {len(pieces):,} pieces, {len(scores):,} scores and {len(kinds):,} types for a token table of '
            f'{count:,} rows: the file is damaged'
        )
    ids = {name: said.get(f'tokenizer.ggml.{theirs}_token_id', -1) for name, theirs in _IDS.items()}
    if outside := [name for name, i in ids.items() if not 0 <= i < count]:
        raise UserError(f'{where}: no id of {", ".join(outside)} among the {count:,} pieces')
    # SentencePiece never finds a control piece in a text, and '<start_of_turn>' is to be found. What no text may spell
    # stays one; unk is one to llama.cpp alone.
    kinds = np.where(kinds == CONTROL, USER_DEFINED, kinds).tolist()
    kinds[ids['pad']] = kinds[ids['eos']] = kinds[ids['bos']] = CONTROL
    kinds[ids['unk']] = UNKNOWN
    # llama.cpp writes the spaces of user-defined pieces as spaces, and of no others.
    texts = (
        (piece.decode(errors='replace').replace(' ', '▁') if kind == USER_DEFINED else piece.decode(errors='replace'))
        for piece, kind in zip(pieces, kinds, strict=True)
    )
    return Tokenizer.from_pieces(zip(texts, scores.tolist(), kinds, strict=True), ids, where)
