"""More requests than fit at once: a fixed number of slots, each refilled as soon as its row has ended.

Two programs, compiled once per width of prompts and once in all: `admit` reads prompts, draws their first tokens and
puts them into slots; `advance` runs the step until a slot comes free, so the host is asked once a row, not once a
token. A row's tokens are those of `make_generate`; in which slot it sits, and beside whom, changes no bit of them.

Letters: S slots, R rows of a prefill, M new tokens at most.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_vlm.config import UserError
from big_vlm.decoding.generate import GREEDY, Generation, check_width
from big_vlm.decoding.prompt_lookup import make_step
from big_vlm.decoding.step import Batch, Ends, How, Processor, Rows, Sampler

_CUT_EVERY = 8  # steps between two looks at what is said, where a host's function may end a row


class Finished(NamedTuple):
    """What became of one request: its tokens, int32 [n] and float32 [n], as a row of `Generation` has them."""

    ids: np.ndarray
    log_probs: np.ndarray


def make_scheduler(
    predict: Mapping[str, Callable],
    *,
    slots: int,
    cache_size: int,
    max_new_tokens: int,
    eos_id: Ends,
    pad_id: int = 0,
    together: int = 1,
    prompt_lookup: int = 0,
    sharding: NamedSharding | None = None,
) -> Callable[..., Iterator[Finished]]:
    """Returns `serve(params, requests, prepare, *, sampler=Greedy(), processors=(), seed=0, cut=None, progress=None)`:
    an iterator of `Finished` in the order of the requests, each as soon as it and all before it are there.

    requests: anything, in any number; taken one by one as slots come free.
    prepare: up to R requests → their prompts, a generative batch of R rows whose last ones, if there were fewer, have
      `_mask` False. Its widths decide how many programs are compiled. It has `id`, and `limit` int32 [R] of 1 … M.
    cut: given all ids that a row has said, how many of them its answer keeps, or None if it goes on. Asked on the host
      every few tokens, for ends that no compiled program sees, such as a string.
    progress: called with how many requests have just ended.

    Args:
      slots: S, rows decoded at once.
      cache_size: of each row; whoever prepares prompts sees to it that they fit with their limits.
      together: R, rows of one prefill.
      prompt_lookup: tokens guessed at once, see `decoding.prompt_lookup`; 0 for none.
      sharding: of the leading axis of everything in the slots; None for one device.

    Raises UserError for sizes that are not positive, and for `slots` that are no multiple of `together`.
    """
    check_width(max_new_tokens)
    if slots < 1 or together < 1 or slots % together:
        raise UserError(f'slots {slots}: must be at least 1, and a multiple of the {together} rows of a prefill')
    step = make_step(predict, eos_id, pad_id, prompt_lookup)

    def pinned(tree):
        if sharding is None:
            return tree

        def pin(x):
            spec = P(*sharding.spec, *[None] * (x.ndim - 1))
            return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))

        return jax.tree.map(pin, tree)

    @jax.jit
    def read(params, batch, how):
        rows = step.first(params, batch, batch['limit'], cache_size, how)
        return rows, Generation.empty(together, max_new_tokens, pad_id).add(rows)

    @jax.jit(donate_argnums=1)
    def admit(params, state, batch, slot, how):
        new = read(params, batch, how)
        return pinned(jax.tree.map(lambda old, row: old.at[slot].set(row, mode='drop'), state, new))

    @jax.jit(donate_argnums=1)
    def advance(params, state, how, ended, enough, budget):
        """Until `enough` slots are done or `budget` steps are; rows of `ended` bool [S] are done before."""
        rows, out = state
        rows = dataclasses.replace(rows, done=rows.done | ended)

        def more(carry):
            rows, _, count = carry
            return (jnp.sum(rows.done) < enough) & (count < budget)

        def body(carry):
            rows, out, count = carry
            rows = step.next(params, rows, how)
            return rows, out.add(rows), count + 1

        rows, out, _ = jax.lax.while_loop(more, body, (rows, out, jnp.zeros((), jnp.int32)))
        return pinned((rows, out))

    def empty(params, batch, how) -> tuple[Rows, Generation]:
        rows, out = jax.tree.map(
            lambda x: np.zeros((slots, *x.shape[1:]), x.dtype), jax.eval_shape(read, params, batch, how)
        )
        state = dataclasses.replace(rows, done=np.ones(slots, bool)), out
        return jax.device_put(state, sharding)

    def serve(
        params: Any,
        requests: Iterable[Any],
        prepare: Callable[[list[Any]], Batch],
        *,
        sampler: Sampler = GREEDY,
        processors: Sequence[Processor] = (),
        seed: int = 0,
        cut: Callable[[list[int]], int | None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Finished]:
        how = How(sampler, tuple(processors), jax.random.key(seed))
        waiting, taken = _Waiting(requests), 0
        running: dict[int, int] = {}  # slot → number of its request
        finished: dict[int, Finished] = {}
        state, turn = None, 0
        ended = np.zeros(slots, bool)
        while True:
            free = collections.deque(slot for slot in range(slots) if slot not in running)
            while free and (group := waiting.take(min(together, len(free)))):
                batch = prepare(group)
                if state is None:
                    state = empty(params, batch, how)
                slot = np.full(together, slots, np.int32)  # beyond the last: dropped
                for row in range(len(group)):
                    slot[row] = free.popleft()
                    running[int(slot[row])], ended[slot[row]] = taken, False
                    taken += 1
                state = admit(params, state, batch, slot, how)
            if not running:
                return
            enough = slots - len(running) + min(together if waiting else 1, len(running))
            state = advance(params, state, how, ended, enough, _CUT_EVERY if cut else max_new_tokens)
            rows, out = state
            done, length = jax.device_get((rows.done, rows.step))
            if cut or done[list(running)].any():
                ids, log_probs = jax.device_get((out.ids, out.log_probs))
            before = len(running)
            for slot, number in list(running.items()):
                kept = cut(ids[slot, : length[slot]].tolist()) if cut else None
                if kept is None and not done[slot]:
                    continue
                kept = length[slot] if kept is None else kept
                finished[number] = Finished(ids[slot, :kept].copy(), log_probs[slot, :kept].copy())
                ended[slot] = True
                del running[slot]
            if progress and len(running) < before:
                progress(before - len(running))
            while turn in finished:
                yield finished.pop(turn)
                turn += 1

    return serve


class _Waiting:
    """An iterator that can tell whether it has more: one item is held back."""

    def __init__(self, items: Iterable[Any]):
        self.rest = iter(items)
        self.held = list(itertools.islice(self.rest, 1))

    def __bool__(self) -> bool:
        return bool(self.held)

    def take(self, count: int) -> list[Any]:
        """Up to `count` items."""
        items = [*self.held, *itertools.islice(self.rest, count)]
        self.held = items[count:]
        return items[:count]
