"""The tokenizer's files of a Hugging Face folder: a SentencePiece model, and what transformers has to know about it."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from big_vlm.data.contract import Contract
from big_vlm.data.coordinates import NUM_LOCATIONS, NUM_SEGMENTS
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import tokenizer_json
from big_vlm.interop.pretrained import TOWERS

CONFIG = 'tokenizer_config.json'
_FILES = ('tokenizer.model', 'spiece.model')  # Gemma's name, SigLIP 1's


def find_tokenizer(folder: pathlib.Path) -> pathlib.Path | None:
    """The SentencePiece model of a folder, if it has one."""
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def of_folder(folder: pathlib.Path) -> pathlib.Path | Callable[[], Tokenizer] | None:
    """Its SentencePiece model; without one, a function that makes it of tokenizer.json; None without either."""
    file = folder / tokenizer_json.NAME
    return find_tokenizer(folder) or (functools.partial(tokenizer_json.read, file) if file.is_file() else None)


def write(folder: pathlib.Path, family: str, contract: Contract, tokenizer: Tokenizer) -> None:
    """Writes the SentencePiece model and tokenizer_config.json. Raises OSError where the disk is full."""
    special = {'pad_token': contract.pad_id, 'eos_token': contract.eos_id, 'bos_token': contract.bos_id}
    content: dict[str, Any] = {name: tokenizer.piece(i) for name, i in special.items() if i >= 0}
    siglip_1 = family in TOWERS and tokenizer.bos_id < 0
    if family in TOWERS:
        content |= {'model_max_length': contract.text_length, 'padding_side': 'right'}
        content |= {'do_lower_case': contract.lower, 'add_bos_token': False, 'add_eos_token': contract.eos}
        # Of Gemma's kind, the one that lower-cases is SigLIP 2's own.
        lower = 'Siglip2Tokenizer' if contract.lower else 'GemmaTokenizer'
        content |= {'tokenizer_class': 'SiglipTokenizer' if siglip_1 else lower}
    else:
        content |= {'tokenizer_class': 'GemmaTokenizer', 'add_bos_token': True, 'add_eos_token': False}
        if contract.lower:  # for our own reader: transformers leaves the case of a Gemma's text alone
            content['do_lower_case'] = True
    if family == 'paligemma':
        content |= {'processor_class': 'PaliGemmaProcessor', 'extra_special_tokens': {'image_token': '<image>'}}
        added = [tokenizer.piece(tokenizer.base + i) for i in range(NUM_LOCATIONS + NUM_SEGMENTS)]
        entries = [(tokenizer.base + i, token, False) for i, token in enumerate(added)]
        entries.append((contract.vocab_size, '<image>', True))
        content['added_tokens_decoder'] = {str(i): _added(token, special) for i, token, special in entries}
    tokenizer.save(folder / (_FILES[1] if siglip_1 else _FILES[0]))
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def _added(token: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(('lstrip', 'normalized', 'rstrip', 'single_word'), False)
    return {'content': token, 'special': special, **flags}
