"""Answers that a model can read off its own prompt, where it should look at the picture.

Two rules, because a question may well hold its answer, 'is it red or blue?', and a choice always does:

1. A long answer (four words or more, twelve letters or more) that stands word for word in what is seen without loss is
   a leak, each one: so much is not there by chance. But where the record lists options, and the prompt has them all,
   it is one to choose from.
2. Answers of any length leak where copying is a habit that pays: the words at one and the same place of the prompt,
   counted from its beginning or its end, are the answer of nine examples of ten of a source, eight examples or more,
   and of nine of ten of those whose answer is not the commonest, three or more. So 'yes' in 'yes or no?' is none, nor
   is 'A or B?'.

Words are compared without case and punctuation; where a script sets no spaces, characters are.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LONG = 4, 12  # words and letters
_EXAMPLES, _OTHERS, _SHARE = 8, 3, 0.9
# Location and segmentation tokens; a character each of Thai, Lao, Burmese, Khmer, kana and Chinese; words.
_ALONE = '\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff'
_WORD = re.compile(rf'<(?:loc|seg)\d+>|[{_ALONE}]|[^\W{_ALONE}]+')

Words = tuple[str, ...]
Place = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Asked:
    """One answer, and what is seen before it without loss.

    source, record: of the example. columns: its lists of texts, one of which may be options.
    """

    source: str
    record: int
    prompt: str
    answer: str
    columns: Sequence[Sequence[str]] = ()


def words(text: str) -> Words:
    """'Is it RED?' → ('is', 'it', 'red')."""
    return tuple(_WORD.findall(text.casefold()))


def find(asked: Sequence[Asked]) -> list[Asked]:
    """Those whose prompt gives the answer away, in order; of a habit of a source (rule 2), the first."""
    habits = {id(found) for source in {one.source for one in asked} for found in _habit(asked, source)}
    return [one for one in asked if id(one) in habits or _given(one)]


def _given(one: Asked) -> bool:
    """Rule 1."""
    answer, prompt = words(one.answer), words(one.prompt)
    long = len(answer) >= LONG[0] and sum(map(len, answer)) >= LONG[1]
    return long and any(_places(answer, prompt)) and not _offered(answer, prompt, one.columns)


def _habit(asked: Sequence[Asked], source: str) -> list[Asked]:
    """Rule 2: the first answer that stands where most of its source do."""
    pairs = [(one, words(one.answer), words(one.prompt)) for one in asked if one.source == source]
    stands = [set(_places(answer, prompt)) for _, answer, prompt in pairs]
    [(commonest, _)] = Counter(answer for _, answer, _ in pairs).most_common(1)
    others = [places for (_, answer, _), places in zip(pairs, stands, strict=True) if answer != commonest]
    if len(pairs) < _EXAMPLES or len(others) < _OTHERS:
        return []
    habits = _often(stands) & _often(others)
    return [one for (one, *_), places in zip(pairs, stands, strict=True) if habits & places][:1]


def _often(stands: Sequence[set[Place]]) -> set[Place]:
    """The places that nearly all of these hold."""
    counts = Counter(place for places in stands for place in places)
    return {place for place, count in counts.items() if count >= _SHARE * len(stands)}


def _places(answer: Words, prompt: Words) -> Iterator[Place]:
    """Where the answer stands: in words from the beginning, and from the end."""
    for start in range(len(prompt) - len(answer) + 1 if answer else 0):
        if prompt[start : start + len(answer)] == answer:
            yield 'from the beginning', start
            yield 'from the end', len(prompt) - start - len(answer)


def _offered(answer: Words, prompt: Words, columns: Sequence[Sequence[str]]) -> bool:
    """Whether a column has the answer among others, and the prompt all of them."""
    for column in columns:
        options = {words(item) for item in column}
        if answer in options and len(options) > 1 and all(any(_places(option, prompt)) for option in options):
            return True
    return False


def columns(example: Mapping[str, Any]) -> list[list[str]]:
    """The lists of texts among an example's fields and their fields."""
    values = [value for field in example.values() for value in (field.values() if isinstance(field, dict) else [field])]
    lists = [list(value) for value in values if isinstance(value, list | tuple) or getattr(value, 'ndim', 0) == 1]
    return [found for found in lists if found and all(isinstance(item, str) for item in found)]
