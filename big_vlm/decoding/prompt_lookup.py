"""Speculation without a second model: a row's next tokens are looked up in its own prompt and text.

What follows the last tokens where they stood before (up to three of them, the latest such place) is likely to follow
them again: the words of a question in its answer, boxes, lists, whatever is copied. A guess of K tokens is checked by
one pass over K + 1 positions and kept as far as it is what greedy decoding says, so the tokens are greedy decoding's,
and a pass gives 1 to K + 1 of them (drafting as in "prompt lookup decoding", A. Saxena 2023; checking as in arXiv
2211.17192, section 2, at temperature 0).

Letters: B batch, S slots of the cache, K drafts.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from big_vlm.config import UserError
from big_vlm.decoding.samplers import Greedy
from big_vlm.decoding.step import Batch, Ends, How, Rows, Step, ends, log_prob_of

_NGRAM = 3  # tokens that are looked up


class History(NamedTuple):
    """All that each row has read and said: tokens int32 [B, S], -1 at images and where there are none yet; length
    int32 [B]."""

    tokens: jax.Array
    length: jax.Array

    @classmethod
    def of(cls, batch: Batch, size: int) -> 'History':
        """The prompts: `text`, `segment`, `position` [B, T]."""
        real = jnp.asarray(batch['segment']) > 0
        rows = jnp.arange(real.shape[0])[:, None]
        tokens = jnp.full((real.shape[0], size), -1, jnp.int32)
        tokens = tokens.at[rows, jnp.where(real, batch['position'], size)].set(batch['text'], mode='drop')
        return cls(tokens, jnp.sum(real, axis=1, dtype=jnp.int32))

    def add(self, token: jax.Array, live: jax.Array) -> 'History':
        """With the first tokens int32 [B, N] of each row, as many as are `live` bool [B, N]."""
        rows, column = jnp.arange(token.shape[0])[:, None], self.length[:, None] + jnp.arange(token.shape[1])
        column = jnp.where(live, column, self.tokens.shape[1])
        return History(self.tokens.at[rows, column].set(token, mode='drop'), self.length + jnp.sum(live, axis=1))

    def last(self) -> jax.Array:
        """int32 [B]."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, axis=1)[:, 0]

    def guess(self, count: int) -> jax.Array:
        """int32 [B, count]: what followed the row's last tokens before, the longest match first, then the latest; -1
        where they are new. A guess that reaches the end of the row goes on as if it repeated itself."""
        return jax.vmap(functools.partial(_guess, count=count))(self.tokens, self.length)


def _guess(tokens: jax.Array, length: jax.Array, count: int) -> jax.Array:
    place = jnp.arange(tokens.shape[0])  # of a guess's first token
    same, matched = place < length, jnp.zeros_like(place)
    for back in range(1, _NGRAM + 1):
        before, last = jnp.roll(tokens, back), tokens[length - back]
        same &= (before == last) & (last >= 0) & (place >= back)
        matched += same
    best = jnp.argmax(matched * tokens.shape[0] + place * (matched > 0))
    following = tokens[best + jnp.arange(count) % jnp.maximum(length - best, 1)]
    return jnp.where(matched[best] > 0, following, -1)


@dataclasses.dataclass(frozen=True)
class LookupStep(Step):
    """Up to `drafts` + 1 tokens for every row. `predict` also has

    extend(params, cache, tokens int32 [B, T]) -> (logits f32 [B, T, V] after each, cache)
    rewind(cache, count int32 [B]) -> the cache without the last `count` tokens, of one `extend`, of each row

    and its `prefill` takes how many tokens more than one will be given to `extend`.
    """

    drafts: int

    def first(self, params: Any, batch: Batch, limit: jax.Array, cache_size: int, how: How) -> Rows:
        """As `Step.first`. Raises UserError unless decoding is greedy."""
        if how.processors or not isinstance(how.sampler, Greedy):
            raise UserError('prompt_lookup is greedy decoding: leave out samplers, penalties and constraints')
        rows = super().first(params, batch, limit, cache_size, how)

        def wide(x):
            return jnp.pad(x, ((0, 0), (0, self.drafts)))

        history = History.of(batch, cache_size).add(rows.token, rows.live)
        rows = dataclasses.replace(rows, log_prob=wide(rows.log_prob), live=wide(rows.live), history=history)
        return dataclasses.replace(rows, token=jnp.where(rows.live, wide(rows.token), self.pad_id))

    def next(self, params: Any, rows: Rows, how: How) -> Rows:
        """What is right of a guess, and one token more."""
        history = rows.history
        guess = history.guess(self.drafts)
        read = jnp.concatenate([history.last()[:, None], jnp.maximum(guess, 0)], axis=1)
        logits, cache = self.predict['extend'](params, rows.cache, read)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        column = jnp.arange(self.drafts + 1)
        # A token counts if all tokens that it was computed from do.
        fails = jnp.cumsum((guess != token[:, :-1]) | ends(token[:, :-1], self.eos_id), axis=1)
        live = jnp.pad(fails, ((0, 0), (1, 0))) == 0
        live &= (rows.step[:, None] + column < rows.limit[:, None]) & ~rows.done[:, None]
        count = jnp.sum(live, axis=1)
        step = rows.step + count
        return dataclasses.replace(
            rows,
            step=step,
            token=jnp.where(live, token, self.pad_id),
            log_prob=jnp.where(live, jax.vmap(log_prob_of)(logits, token), 0.0),
            live=live,
            done=rows.done | jnp.any(live & ends(token, self.eos_id), axis=1) | (step >= rows.limit),
            cache=self.predict['rewind'](cache, self.drafts + 1 - count),
            history=history.add(token, live),
        )


def make_step(predict: Mapping[str, Callable], eos_id: Ends, pad_id: int, drafts: int) -> Step:
    """A token at a time if `drafts` is 0, else the guesses of so many checked at once. Raises UserError below 0."""
    if drafts < 0:
        raise UserError(f'prompt_lookup {drafts}: must be 0 (off) or the tokens of a guess')
    if not drafts:
        return Step(predict, eos_id, pad_id)
    prefill = functools.partial(predict['prefill'], ahead=drafts)
    return LookupStep({**predict, 'prefill': prefill}, eos_id, pad_id, drafts)
