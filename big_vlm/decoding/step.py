"""One token for every row: the step that the compiled loop, the stream and the scheduler share. `prompt_lookup` has one
that gives several.

Before a token is drawn, processors may change the logits by what the row has said so far: a penalty, a grammar.

Letters: B batch, T slots of the prompt, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

Batch = Mapping[str, Any]
Sampler = Callable[[jax.Array, jax.Array], jax.Array]
Ends = int | tuple[int, ...]  # the id that ends a row, or all that do


class Processor(Protocol):
    """Changes the logits that a sampler sees. A pytree dataclass, an argument of the compiled program; its state, any
    pytree with a leading axis [B], goes from token to token. A row's result depends on that row alone."""

    def start(self, batch: Batch) -> Any:
        """The state before the first token, from the prompts (`text`, `segment` [B, T])."""

    def apply(self, state: Any, logits: jax.Array) -> jax.Array:
        """logits float32 [B, V] → the same with changes; −inf for a token that may not come."""

    def advance(self, state: Any, token: jax.Array) -> Any:
        """The state after `token` int32 [B]."""


class How(NamedTuple):
    """How tokens are chosen: a pytree, an argument of the compiled program. `key`: the seed's random key."""

    sampler: Sampler
    processors: tuple[Processor, ...]
    key: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows between two tokens. Every leaf has the leading axis [B], so rows can be put into the place of others."""

    id: jax.Array  # int32 [B, 2], seeds the row's draws
    limit: jax.Array  # int32 [B], tokens it may say
    step: jax.Array  # int32 [B], tokens it has said
    token: jax.Array  # int32 [B, N], what the last step gave: one token, or as many as may be right of a guess
    log_prob: jax.Array  # float32 [B, N]
    live: jax.Array  # bool [B, N], whether `token` belongs to the row; the first ones do
    done: jax.Array  # bool [B], whether it ended with `token` or before it
    cache: Any
    processors: tuple[Any, ...]  # the state of each
    history: Any = None  # of a step that looks up what was said


def row_keys(key: jax.Array, row_id: jax.Array) -> jax.Array:
    """One random key a row, [B], from the row's own id int32 [B, 2] (source, index): whatever batch it is put in."""
    fold = jax.vmap(jax.random.fold_in)
    return fold(jax.vmap(lambda i: jax.random.fold_in(key, i))(row_id[:, 0]), row_id[:, 1])


def log_prob_of(logits: jax.Array, token: jax.Array) -> jax.Array:
    """float32 [B]: log-probability of `token` int32 [B] under softmax(logits [B, V])."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), token[:, None], axis=-1)[:, 0]


def ends(token: jax.Array, eos_id: Ends) -> jax.Array:
    """Which tokens end their row: bool, of `token`'s shape."""
    return jnp.isin(token, jnp.asarray(eos_id, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Step:
    """`predict`: prefill and decode_step, as `decoding.generate` says. A row ends with `eos_id`; `pad_id` follows."""

    predict: Mapping[str, Callable]
    eos_id: Ends
    pad_id: int

    def first(self, params: Any, batch: Batch, limit: jax.Array, cache_size: int, how: How) -> Rows:
        """The prompts read, and each row's first token. `limit`: int32 [] or [B]. Rows with `_mask` False are done."""
        logits, cache = self.predict['prefill'](params, batch, cache_size)
        rows = batch['segment'].shape[0]
        chex.assert_shape(logits, (rows, None))
        empty = Rows(
            id=batch['id'],
            limit=jnp.broadcast_to(limit, rows),
            step=jnp.zeros(rows, jnp.int32),
            token=jnp.zeros((rows, 1), jnp.int32),
            log_prob=jnp.zeros((rows, 1), jnp.float32),
            live=jnp.zeros((rows, 1), bool),
            done=~jnp.asarray(batch['_mask']) if '_mask' in batch else jnp.zeros(rows, bool),
            cache=cache,
            processors=tuple(processor.start(batch) for processor in how.processors),
        )
        return self._draw(logits, empty, how)

    def next(self, params: Any, rows: Rows, how: How) -> Rows:
        """One token more for every row that is not done."""
        logits, cache = self.predict['decode_step'](params, rows.cache, rows.token[:, 0])
        return self._draw(logits, dataclasses.replace(rows, cache=cache), how)

    def _draw(self, logits: jax.Array, rows: Rows, how: How) -> Rows:
        allowed = logits
        for processor, state in zip(how.processors, rows.processors, strict=True):
            allowed = processor.apply(state, allowed)
        token = how.sampler(allowed, jax.vmap(jax.random.fold_in)(row_keys(how.key, rows.id), rows.step))
        live, step = ~rows.done, rows.step + ~rows.done
        states = zip(how.processors, rows.processors, strict=True)
        return dataclasses.replace(
            rows,
            step=step,
            token=jnp.where(live, token, self.pad_id)[:, None],
            log_prob=jnp.where(live, log_prob_of(logits, token), 0.0)[:, None],
            live=live[:, None],
            done=rows.done | ends(token, self.eos_id) | (step >= rows.limit),
            processors=tuple(processor.advance(state, token) for processor, state in states),
        )
