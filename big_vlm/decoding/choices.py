"""Answers out of a set: what a row may say next is what one of its allowed answers says next.

A node of the trie of a row's answers is the set of those that begin as the row has begun, and is kept as just that: a
bit an answer. The tables are arrays whose sizes are powers of two, and come with the batch, so that rows may have sets
of their own and another set of similar size compiles nothing.

Letters: B batch, A answers of a row, M tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEY = 'choices'  # of the batch: int32 [B, A, M]
NONE = -1  # where an answer, or a set, has no more


def table(sets: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """int32 [B, A, M] of the answers of B rows, each answer the ids of its tokens, its end of text included.

    A and M are rounded up to powers of two; what is not there is -1. [[[5, 1], [5, 6, 1]]] becomes
    [[[5, 1, -1, -1], [5, 6, 1, -1]]].
    """
    most = max(len(answers) for answers in sets)
    longest = max(len(answer) for answers in sets for answer in answers)
    result = np.full((len(sets), power_of_two(most), power_of_two(longest)), NONE, np.int32)
    for row, answers in enumerate(sets):
        for i, answer in enumerate(answers):
            result[row, i, : len(answer)] = answer
    return result


def only(logits: jax.Array, allowed: jax.Array, eos_id: int) -> jax.Array:
    """float32 [B, V] with -inf where `allowed` bool [B, V] is False.

    A row in which nothing is left (no token is allowed, or all that are had logits of -inf or NaN) may end its text,
    and nothing else: the end's own logit stays, or is 0 if that is not finite. So no row is ever without a finite
    logit, and a beam that is stuck pays for its end as others do.
    """
    legal = allowed & (logits > -jnp.inf)
    stuck = ~jnp.any(legal, axis=-1, keepdims=True) & (jnp.arange(logits.shape[-1]) == eos_id)
    return jnp.where(legal, logits, jnp.where(stuck, jnp.where(jnp.isfinite(logits), logits, 0.0), -jnp.inf))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Node:
    """Where each row is in its trie.

    ids: int32 [B, A, M], see `table`. alive: bool [B, A], the answers that begin as the row has. depth: int32 [B],
    tokens of the row so far.
    """

    ids: jax.Array
    alive: jax.Array
    depth: jax.Array

    @classmethod
    def root(cls, ids: jax.Array) -> Node:
        """Before the first token."""
        ids = jnp.asarray(ids)
        return cls(ids, ids[:, :, 0] >= 0, jnp.zeros(ids.shape[0], jnp.int32))

    def tokens(self, vocab_size: int) -> jax.Array:
        """Which tokens lead on: bool [B, V]. None do from an answer's end."""
        following = self._following()
        column = jnp.where(self.alive & (following >= 0), following, vocab_size)
        row = jnp.arange(column.shape[0])[:, None]
        return jnp.zeros((column.shape[0], vocab_size), bool).at[row, column].set(True, mode='drop')

    def child(self, token: jax.Array) -> Node:
        """After `token` int32 [B]; a token that leads nowhere leaves no answer alive."""
        alive = self.alive & (self._following() == token[:, None])
        return dataclasses.replace(self, alive=alive, depth=self.depth + 1)

    def ended(self) -> jax.Array:
        """bool [B, A]: the answer that the row has said, if it is whole."""
        return self.alive & (lengths(self.ids) == self.depth[:, None])

    def _following(self) -> jax.Array:
        depth = jnp.minimum(self.depth, self.ids.shape[2] - 1)[:, None, None]
        following = jnp.take_along_axis(self.ids, depth, axis=2)[:, :, 0]
        return jnp.where(self.depth[:, None] < self.ids.shape[2], following, NONE)


def lengths(ids: jax.Array) -> jax.Array:
    """Tokens of every answer: int32 [B, A]."""
    return jnp.sum(ids >= 0, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """A processor (see `generate.Processor`): each row says one of the answers of `batch['choices']` (see `table`).

    A sampler sees finite logits for the tokens that lead on, and -inf elsewhere. A row whose set is empty ends at once.
    """

    eos_id: int = dataclasses.field(metadata={'static': True})

    def start(self, batch: Mapping[str, Any]) -> Node:
        return Node.root(batch[KEY])

    def apply(self, node: Node, logits: jax.Array) -> jax.Array:
        return only(logits, node.tokens(logits.shape[-1]), self.eos_id)

    def advance(self, node: Node, token: jax.Array) -> Node:
        return node.child(token)


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()
