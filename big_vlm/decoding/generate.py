"""Autoregressive decoding: ids in, ids out.

A model takes part with two pure functions (a generative task's `predict`):

  prefill(params, batch, cache_size) -> (logits f32 [B, V], cache)   logits that follow each row's last real token
  decode_step(params, cache, token int32 [B]) -> (logits f32 [B, V], cache)

`make_generate` compiles both into one program: prefill, then a `while_loop` over the step with the cache in its carry
(updated in place), which ends when every row has. Nothing crosses to the host between tokens. `make_stream` runs the
same step from the host and yields each token as it comes. Both give the same tokens, and so does `scheduler`, for more
rows than fit at once.

Letters: B batch, T slots of the prompt, M new tokens at most, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from big_vlm.config import UserError
from big_vlm.decoding.prompt_lookup import make_step
from big_vlm.decoding.samplers import Greedy
from big_vlm.decoding.step import Batch, Ends, How, Processor, Rows, Sampler, Step

GREEDY = Greedy()


class Generation(NamedTuple):
    """What was generated.

    ids: int32 [B, M]. A row ends with eos_id, unless the limit cut it off; pad_id follows.
    log_probs: float32 [B, M]. Of each token under the model's own distribution (softmax of its logits, whatever the
      sampler made of them), so that a row's sum is the answer's log-probability. 0 after the end.
    length: int32 [B]. Tokens of the row, its eos included.
    """

    ids: jax.Array
    log_probs: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, rows: int, width: int, pad_id: int) -> 'Generation':
        """Nothing yet, with room for `width` tokens a row."""
        ids = jnp.full((rows, width), pad_id, jnp.int32)
        return cls(ids, jnp.zeros((rows, width), jnp.float32), jnp.zeros((rows,), jnp.int32))

    def add(self, rows: Rows) -> 'Generation':
        """With the tokens that the last step gave to each row."""
        before = rows.step - jnp.sum(rows.live, axis=1)
        column = before[:, None] + jnp.arange(rows.token.shape[1])
        place = jnp.arange(rows.step.shape[0])[:, None], jnp.where(rows.live, column, self.ids.shape[1])
        return Generation(
            ids=self.ids.at[place].set(rows.token, mode='drop'),
            log_probs=self.log_probs.at[place].set(rows.log_prob, mode='drop'),
            length=rows.step,
        )


class Token(NamedTuple):
    """One step of a stream, as numpy arrays: token int32 [B] (pad_id in rows that had ended), log_prob float32 [B],
    live bool [B]: the rows to which the token belongs."""

    token: np.ndarray
    log_prob: np.ndarray
    live: np.ndarray


def make_generate(
    predict: Mapping[str, Callable],
    *,
    max_new_tokens: int,
    eos_id: Ends,
    pad_id: int = 0,
    cache_size: int = 0,
    prompt_lookup: int = 0,
) -> Callable[..., Generation]:
    """Returns `generate(params, batch, *, sampler=Greedy(), processors=(), seed=0, limit=None) -> Generation`. Hold on
    to it: it compiles once per batch shape and kind of sampler and processors, not per temperature, seed or limit.

    batch: the prompts, a generative batch whose rows end after the separator. Prompts of a batch may differ in length.
      Rows with `_mask` False are padding and come back empty. `id` int32 [B, 2] seeds each row's draws; without it the
      row's number does.
    limit: stop after so many tokens, at most `max_new_tokens` (M, the width of what comes back); one, or one a row.
    eos_id: ends a row, and is its last token; several do so alike.
    cache_size: slots of the cache, 0 for as many as the longest row can need (T + M).
    prompt_lookup: tokens guessed at once, see `decoding.prompt_lookup`; 0 for none.

    Raises UserError for a prompt that does not fit into the cache with its new tokens, for a limit not in 1 … M, and
    for a sampler or processors beside `prompt_lookup`.
    """
    check_width(max_new_tokens)
    step = make_step(predict, eos_id, pad_id, prompt_lookup)

    @jax.jit
    def run(params, batch, limit, how):
        rows = step.first(params, batch, limit, _cache_size(batch, cache_size, max_new_tokens), how)
        out = Generation.empty(rows.step.shape[0], max_new_tokens, pad_id).add(rows)

        def more(carry):
            return ~jnp.all(carry[0].done)

        def body(carry):
            rows, out = carry
            rows = step.next(params, rows, how)
            return rows, out.add(rows)

        return jax.lax.while_loop(more, body, (rows, out))[1]

    def generate(
        params: Any,
        batch: Batch,
        *,
        sampler: Sampler = GREEDY,
        processors: Sequence[Processor] = (),
        seed: int = 0,
        limit: int | np.ndarray | None = None,
    ) -> Generation:
        limit = check_limit(batch, cache_size, max_new_tokens, limit)
        return run(params, _inputs(batch), limit, How(sampler, tuple(processors), jax.random.key(seed)))

    return generate


def make_stream(
    predict: Mapping[str, Callable],
    *,
    max_new_tokens: int,
    eos_id: Ends,
    pad_id: int = 0,
    cache_size: int = 0,
) -> Callable[..., Iterator[Token]]:
    """Returns `stream(params, batch, *, sampler=Greedy(), processors=(), seed=0, limit=None)`, an iterator of `Token`,
    one per step, which ends when every row has. Arguments, errors and tokens are those of `make_generate`; each token
    costs a dispatch and a copy to the host."""
    check_width(max_new_tokens)
    step = Step(predict, eos_id, pad_id)

    @jax.jit
    def first(params, batch, limit, how):
        return step.first(params, batch, limit, _cache_size(batch, cache_size, max_new_tokens), how)

    following = jax.jit(step.next, donate_argnums=1)

    def stream(
        params: Any,
        batch: Batch,
        *,
        sampler: Sampler = GREEDY,
        processors: Sequence[Processor] = (),
        seed: int = 0,
        limit: int | np.ndarray | None = None,
    ) -> Iterator[Token]:
        limit = check_limit(batch, cache_size, max_new_tokens, limit)
        batch, how = _inputs(batch), How(sampler, tuple(processors), jax.random.key(seed))

        def tokens():
            rows = first(params, batch, limit, how)
            while True:
                token, log_prob, live, done = jax.device_get((rows.token, rows.log_prob, rows.live, rows.done))
                yield Token(token[:, 0], log_prob[:, 0], live[:, 0])
                if done.all():
                    return
                rows = following(params, rows, how)

        return tokens()

    return stream


def check_width(max_new_tokens: int) -> None:
    """Raises UserError unless there is at least one token to make."""
    if max_new_tokens < 1:
        raise UserError(f'max_new_tokens {max_new_tokens}: must be at least 1')


def _cache_size(batch: Batch, cache_size: int, max_new_tokens: int) -> int:
    return cache_size or batch['segment'].shape[1] + max_new_tokens


def _inputs(batch: Batch) -> dict[str, Any]:
    """The batch with an `id` to seed its rows, if it had none."""
    rows = batch['segment'].shape[0]
    default = {'id': np.stack([np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32)], axis=1)}
    return default | dict(batch)


def check_limit(batch: Batch, cache_size: int, max_new_tokens: int, limit: int | np.ndarray | None) -> np.ndarray:
    """The limit, int32 [] or [B]; UserError if it, or a row, does not fit. On the host, before anything is compiled."""
    limit = np.asarray(max_new_tokens if limit is None else limit, np.int32)
    if not ((limit >= 1) & (limit <= max_new_tokens)).all():
        wrong = limit[(limit < 1) | (limit > max_new_tokens)].flat[0]
        raise UserError(f'limit {wrong}: must be in 1 … {max_new_tokens}, the max_new_tokens this was compiled for')
    segment = batch['segment']
    slots = segment.shape[1]
    if cache_size and cache_size < slots:
        raise UserError(f'prompts of {slots} slots do not fit into a cache of {cache_size}: raise cache_size')
    if cache_size and cache_size < slots + limit.max() - 1:  # else no row can be too long
        real = np.full(segment.shape[0], slots)
        if getattr(segment, 'is_fully_addressable', True):
            real = (np.asarray(segment) > 0).sum(axis=1)
        # The last token drawn is never read back, so it needs no slot.
        need = real + limit - 1
        row = int(need.argmax())
        if need[row] > cache_size:
            raise UserError(
                f'row {row}: a prompt of {real[row]} tokens and {need[row] - real[row] + 1} new ones need {need[row]} '
                f'slots, the cache has {cache_size}: shorten the prompt, ask for fewer tokens or raise cache_size'
            )
    return limit
