"""How answers are made: the keywords of `Bundle.generate`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from big_vlm.config import UserError, unknown
from big_vlm.decoding import samplers
from big_vlm.decoding.constraints import Choices
from big_vlm.decoding.repetition import RepetitionPenalty

_ERRORS = ('raise', 'return')


@dataclasses.dataclass(frozen=True)
class Settings:
    """Each with its default.

    max_new_tokens: longest answer, in tokens.
    temperature: 0 takes the most likely token; above, tokens are drawn from softmax(logits / temperature).
    top_k, top_p, min_p: of these, the so many likeliest; the likeliest whose probabilities reach this sum; those with
      at least this share of the likeliest one's. 0, 1 and 0 are off; see `decoding.samplers.Temperature`.
    repetition_penalty: tokens of the prompt and of the answer so far weigh less above 1, more below.
    choices: the answers that may be given, or a list of them for each; the likeliest first token decides, then the next
      (`Bundle.rank` compares whole answers). With a grammar: the labels of its objects.
    grammar: 'boxes' for answers that are objects in location tokens, each once (`decoding.grammar`).
    stop: strings that end an answer; its text ends before them, its ids with the token that completed one.
    beams: above 1, beam search over so many beginnings (`decoding.beam`).
    best_of: draws so many answers and gives the one that scores best.
    prompt_lookup: guess up to so many tokens at once from what was read and said, and keep those that greedy decoding
      says (`decoding.prompt_lookup`): the same answers, in fewer passes where they repeat words. 0 is off.
    length_penalty: of beams and best_of: score = sum of log-probabilities / tokens ** length_penalty.
    seed: of the draws. An answer depends on it and on its place in the list, not on the others.
    first: the place of the first answer in a longer list, of which this is a part.
    batch_size: rows decoded at once, rounded up to a power of two (times the shards of the batch), so that few programs
      are compiled; beams and the answers of best_of are rows.
    errors: what becomes of a request that cannot be answered. 'raise': UserError when its turn comes, after all answers
      before it. 'return': its answer says why in `error`, and all others are made.
    progress: called with (answers drawn, all), best_of for each request, as they end, in any order.

    Raises UserError for numbers out of range, and for settings that exclude each other or have no effect.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    choices: Choices | None = None
    grammar: str = ''
    stop: str | Sequence[str] = ()
    beams: int = 1
    best_of: int = 1
    prompt_lookup: int = 0
    length_penalty: float = 1.0
    seed: int = 0
    first: int = 0
    batch_size: int = 16
    errors: str = 'raise'
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self):
        object.__setattr__(self, 'stop', (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name in ('max_new_tokens', 'beams', 'best_of', 'batch_size'):
            if getattr(self, name) < 1:
                raise UserError(f'{name} {getattr(self, name)}: must be at least 1')
        if self.errors not in _ERRORS:
            raise unknown('errors', self.errors, _ERRORS)
        if not all(self.stop):
            raise UserError('stop: an empty string would end every answer before it began')
        if self.beams > 1 and (self.temperature or self.best_of > 1 or self.stop):
            other = 'temperature' if self.temperature else 'best_of' if self.best_of > 1 else 'stop'
            raise UserError(f'beams {self.beams} and {other} exclude each other: leave one of them out')
        if self.best_of > 1 and not self.temperature:
            raise UserError(f'best_of {self.best_of} at temperature 0 are all the same: set temperature, such as 1')
        if self.prompt_lookup < 0:
            raise UserError(f'prompt_lookup {self.prompt_lookup}: must be 0 (off) or the tokens of a guess')
        changed = dict(temperature=self.temperature, beams=self.beams > 1, choices=self.choices, grammar=self.grammar)
        changed |= dict(repetition_penalty=self.repetition_penalty != 1)
        if self.prompt_lookup and (other := next((name for name, there in changed.items() if there), '')):
            raise UserError(f'prompt_lookup {self.prompt_lookup} and {other} exclude each other: leave one of them out')
        if self.length_penalty != 1 and self.beams == self.best_of == 1:
            raise UserError(f'length_penalty {self.length_penalty} without effect: it is for beams and best_of')
        if not math.isfinite(self.length_penalty):
            raise UserError(f'length_penalty {self.length_penalty}: must be a number')
        self.how(1)

    def check_stream(self) -> None:
        """Raises UserError for settings of which an answer is not said token by token."""
        for name, off in (('beams', 1), ('best_of', 1), ('prompt_lookup', 0), ('errors', 'raise'), ('progress', None)):
            if (value := getattr(self, name)) != off:
                raise UserError(f'{name} {value}: a stream is said token by token; leave it out')

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Settings:
        """From keywords. Raises UserError for an unknown one."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                raise unknown('setting', name, names)
        return cls(**settings)

    def how(self, vocab_size: int) -> dict[str, Any]:
        """Sampler and processors."""
        sampler = samplers.from_settings(self.temperature, self.top_k, self.top_p, self.min_p)
        penalty = RepetitionPenalty(float(self.repetition_penalty), vocab_size)
        return {'sampler': sampler, 'processors': (penalty,) if self.repetition_penalty != 1 else ()}
