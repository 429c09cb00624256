"""The keys of one section of a config.json: sizes under two names, and options of which we have one; and such files."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from big_vlm.config import UserError

Keys = Mapping[str, tuple[str, int]]  # theirs → (ours, what an absent key means)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for what is none."""
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'{file}: cannot be read: {error.strerror}') from None
    except ValueError as error:
        raise UserError(f'{file}: damaged ({error})') from None
    if not isinstance(content, dict):
        raise UserError(f'{file}: damaged (no JSON object)')
    return content


def sizes(section: Mapping[str, Any], keys: Keys) -> dict[str, int]:
    """Our name → size. Raises TypeError or ValueError for what is no number."""
    return {ours: int(section.get(theirs, default)) for theirs, (ours, default) in keys.items()}


def their_sizes(keys: Keys, ours: Mapping[str, int]) -> dict[str, int]:
    """Their name → size."""
    return {theirs: ours[name] for theirs, (name, _) in keys.items()}


def fixed(section: Mapping[str, Any], keys: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Raises UserError unless every key has one of its values; the first is what an absent key means."""
    for key, accepted in keys.items():
        value = section.get(key, accepted[0])
        if value not in accepted:
            raise UserError(f'{where}: {key} is {value!r}, and this family is computed with {accepted[0]!r} here')
