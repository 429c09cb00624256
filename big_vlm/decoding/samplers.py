"""Samplers: how the next token is drawn from a row of logits.

A sampler is a tiny frozen dataclass called as `sampler(logits [B, V], keys [B]) -> token int32 [B]`. Each row has a key
of its own, so what a row draws depends on nothing but that row. Samplers are pytrees: a new temperature is an argument
of the compiled program, not a reason to compile it again; `top_k` decides shapes, so it is.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from big_vlm.config import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token; of equal ones, the lowest id."""

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """logits f32 [B, V], keys [B] (unused) -> token int32 [B]."""
        del keys
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Temperature:
    """A draw from softmax(logits / value), over the `top_k` most likely tokens alone if that is not 0.

    Raises UserError for a value that is not a positive finite number, or a negative `top_k`.
    """

    value: float = 1.0
    top_k: int = dataclasses.field(default=0, metadata={'static': True})

    def __post_init__(self):
        if isinstance(self.value, (int, float)) and not (math.isfinite(self.value) and self.value > 0):
            raise UserError(f'temperature {self.value}: must be a positive number; for 0 use greedy decoding')
        if self.top_k < 0:
            raise UserError(f'top_k {self.top_k}: must be 0 (all tokens) or the number of tokens to draw from')

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """logits f32 [B, V], keys: one random key a row [B] -> token int32 [B]."""
        draw = jax.vmap(jax.random.categorical)
        if not 0 < self.top_k < logits.shape[-1]:
            return draw(keys, logits / self.value).astype(jnp.int32)
        best, token = jax.lax.top_k(logits, self.top_k)
        choice = draw(keys, best / self.value)
        return jnp.take_along_axis(token, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def from_temperature(value: float, top_k: int = 0) -> Greedy | Temperature:
    """The sampler that a user's `temperature` asks for: 0 is greedy, all else draws."""
    return Greedy() if value == 0 else Temperature(float(value), top_k)
