"""Beam search: the likeliest answer that a few hypotheses a row, kept at every token, come upon.

Every row keeps its K likeliest beginnings. One that ends competes, by its score, with the best that has ended before
it; a row is done when no beginning could still beat that. score = sum of log-probabilities / tokens ** length_penalty
(arXiv 1609.08144, section 7, in the form that transformers gave it), so 0 ranks by the answer's probability and 1 by
that of its average token.

Letters: B batch, K beams, M new tokens at most, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from big_vlm.config import UserError
from big_vlm.decoding.generate import Generation, check_limit, check_width
from big_vlm.decoding.step import Batch, Ends, Processor, ends

_NONE = -1e30  # the score of what does not exist: below all, and finite, so that differences are numbers


class _Beams(NamedTuple):
    """Hypotheses in their order, [B, K, …]: `total` ranks them, `log_probs` are the model's own."""

    total: jax.Array  # float32 [B, K]
    ids: jax.Array  # int32 [B, K, M]
    log_probs: jax.Array  # float32 [B, K, M]

    def take(self, parent: jax.Array) -> '_Beams':
        """Those that `parent` int32 [B, K'] names."""
        return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, parent), self)


def make_beam_search(
    predict: Mapping[str, Callable],
    *,
    beams: int,
    max_new_tokens: int,
    eos_id: Ends,
    pad_id: int = 0,
    cache_size: int = 0,
) -> Callable[..., Generation]:
    """Returns `search(params, batch, *, length_penalty=1.0, processors=(), limit=None) -> Generation`, one compiled
    program a batch shape: prefill once a row, then K rows of decoding for each.

    beams: K. With 1 and a length penalty of 0, greedy decoding that goes on until no end is better than what it has.
    length_penalty: above 0 favours long answers, below 0 short ones.
    processors: they change log-probabilities, not logits, for the search; those returned stay the model's own.
    The rest is as in `make_generate`.

    Raises UserError for fewer than one beam, and as `make_generate` does.
    """
    check_width(max_new_tokens)
    if beams < 1:
        raise UserError(f'beams {beams}: must be at least 1')

    def choose(beams_, step, log_probs, changed, best, length_penalty, limit):
        """The beams after one token more, which of the old ones each continues, and the best that has ended.

        log_probs: float32 [B, K, V], the model's; changed: the same as the search sees them.
        """
        vocabulary = changed.shape[-1]
        totals = jnp.maximum(beams_.total[:, :, None] + changed, _NONE)
        kept = min(1 + np.size(eos_id), vocabulary) * beams
        total, flat = jax.lax.top_k(totals.reshape(len(totals), -1), kept)
        parent, token = flat // vocabulary, (flat % vocabulary).astype(jnp.int32)
        own = jax.vmap(lambda row, i: row.reshape(-1)[i])(log_probs, flat)
        grown = beams_.take(parent)
        grown = _Beams(total, grown.ids.at[:, :, step].set(token), grown.log_probs.at[:, :, step].set(own))
        # K at least go on, if each beam ends in every way. An end counts among the first K; at the limit, all end.
        end = ends(token, eos_id)
        _, order = jax.lax.top_k(jnp.where(end, 2 * _NONE, total), beams)
        ended = jnp.where(end, jnp.arange(token.shape[1]) < beams, step + 1 >= limit)
        ranked = jnp.where(ended & (total > _NONE), total / (step + 1.0) ** length_penalty, 2 * _NONE)
        first = jnp.argmax(ranked, axis=1)[:, None]
        candidate, found = jnp.take_along_axis(ranked, first, 1)[:, 0], grown.take(first)
        better = candidate > best[0]
        winner = jax.tree.map(
            lambda new, old: jnp.where(better.reshape(-1, *[1] * (old.ndim - 1)), new, old),
            (candidate, found.ids[:, 0], found.log_probs[:, 0], jnp.full_like(best[3], step + 1)),
            best,
        )
        return grown.take(order), jnp.take_along_axis(parent, order, 1), winner

    @jax.jit
    def run(params, batch, length_penalty, processors, limit):
        rows, slots = batch['segment'].shape
        logits, cache = predict['prefill'](params, batch, cache_size or slots + max_new_tokens)
        states = tuple(processor.start(batch) for processor in processors)
        cache, states = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), (cache, states))
        # Until the first token all K beams of a row are the same: only one of them exists.
        total = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, _NONE), (rows, beams))
        start = _Beams(
            total,
            jnp.full((rows, beams, max_new_tokens), pad_id, jnp.int32),
            jnp.zeros((rows, beams, max_new_tokens), jnp.float32),
        )
        best = jnp.full(rows, 2 * _NONE), start.ids[:, 0], start.log_probs[:, 0], jnp.zeros(rows, jnp.int32)
        real = jnp.asarray(batch['_mask']) if '_mask' in batch else jnp.ones(rows, bool)

        def more(carry):
            step, hypotheses, best, *_ = carry
            # What a beginning can score at most: it gets no likelier, and its divisor is largest, or smallest, at …
            tokens = jnp.where(length_penalty > 0, limit, step + 1) * 1.0
            hope = hypotheses.total[:, 0] / tokens**length_penalty
            return (step < limit) & jnp.any(real & (hope > best[0]))

        def body(carry):
            step, hypotheses, best, logits, cache, states = carry
            log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
            changed = log_probs
            for processor, state in zip(processors, states, strict=True):
                changed = processor.apply(state, changed)
            shape = rows, beams, -1
            hypotheses, parent, best = choose(
                hypotheses, step, log_probs.reshape(shape), changed.reshape(shape), best, length_penalty, limit
            )
            flat = (jnp.arange(rows)[:, None] * beams + parent).reshape(-1)
            cache, states = jax.tree.map(lambda x: x[flat], (cache, states))
            token = jnp.take(hypotheses.ids, step, axis=2).reshape(-1)
            states = tuple(processor.advance(state, token) for processor, state in zip(processors, states, strict=True))
            logits, cache = predict['decode_step'](params, cache, token)
            return step + 1, hypotheses, best, logits, cache, states

        logits = jnp.repeat(logits, beams, axis=0)
        carry = jnp.zeros((), jnp.int32), start, best, logits, cache, states
        _, _, (_, ids, log_probs, length), *_ = jax.lax.while_loop(more, body, carry)
        kept = (jnp.arange(max_new_tokens) < length[:, None]) & real[:, None]
        return Generation(jnp.where(kept, ids, pad_id), jnp.where(kept, log_probs, 0.0), jnp.where(real, length, 0))

    def search(
        params: Any,
        batch: Batch,
        *,
        length_penalty: float = 1.0,
        processors: Sequence[Processor] = (),
        limit: int | None = None,
    ) -> Generation:
        limit = check_limit(batch, cache_size, max_new_tokens, limit)
        return run(params, dict(batch), np.float32(length_penalty), tuple(processors), limit)

    return search
