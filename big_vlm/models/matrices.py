"""Which parameters are matrices, which of their axes are inputs and outputs, and their layout in decoding.

An attention kernel [D, N, H] or [N, D, H] is a matrix of D inputs and N·H outputs. Axes that are neither, as those of
stacked layers, or the 2 of `gating_einsum`, hold one matrix each. Negative axes: the same row serves one layer's kernel
and the stack of them.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp

Axes = tuple[tuple[int, ...], tuple[int, ...]]  # inputs, outputs

# Those of the layers.
LAYERS: tuple[tuple[str, Axes], ...] = (
    (r'.*/(query|key|value)/kernel', ((-3,), (-2, -1))),
    (r'.*/MultiHeadDotProductAttention_[01]/out/kernel', ((-3, -2), (-1,))),
    (r'.*/Dense_[01]/kernel', ((-2,), (-1,))),
    (r'.*/(q|kv|qkv)_einsum/w', ((-2,), (-3, -1))),
    (r'.*/attn_vec_einsum/w', ((-3, -2), (-1,))),
    (r'.*/mlp/(gating_einsum|linear)', ((-2,), (-1,))),
)
# Those that project to a joint space or into a decoder.
HEADS: tuple[tuple[str, Axes], ...] = (
    (r'(.*/)?head/kernel', ((-2,), (-1,))),
    (r'.*/mm_input_projection/w', ((-2,), (-1,))),
)


def axes(path: str, table: tuple[tuple[str, Axes], ...] = LAYERS + HEADS) -> Axes | None:
    """(input axes, output axes) of the parameter at a '/'-joined path; None for what is no matrix."""
    return next((found for pattern, found in table if re.fullmatch(pattern, path)), None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputsFirst:
    """A matrix, or a few, in the layout that products read from one end to the other. Of the published layouts XLA
    multiplies several, such as [N, D, H], only after it has written them out anew: on CPUs once a token.

    values: [*stack, *outputs, *inputs]. inputs, outputs: which axes of the matrix these were, from its end.
    """

    values: jax.Array
    inputs: tuple[int, ...] = dataclasses.field(metadata={'static': True})
    outputs: tuple[int, ...] = dataclasses.field(metadata={'static': True})

    @classmethod
    def of(cls, weight: jax.Array, found: Axes) -> OutputsFirst:
        """The parameter `weight`, whose `axes` are `found`."""
        inputs, outputs = found
        return cls(weight.transpose(_order(weight.ndim, inputs, outputs)), inputs, outputs)

    def published(self) -> jax.Array:
        """The parameter that it was made of."""
        order = _order(self.values.ndim, self.inputs, self.outputs)
        return self.values.transpose([order.index(axis) for axis in range(self.values.ndim)])

    def einsum(self, equation: str, x: jax.Array) -> jax.Array:
        """`jnp.einsum` of rows, the first letter of the equation, and the matrix, in the dtype of `x`."""
        (of_x, of_w), out = equation.split('->')[0].split(','), equation.split('->')[1]
        outputs = ''.join(of_w[axis] for axis in self.outputs)
        stack = ''.join(letter for letter in of_w if letter in out and letter not in outputs)
        sizes = self.values.shape[len(stack) : len(stack) + len(outputs)]
        # As plain a product as there is: with more axes, XLA orders them anew.
        rows = x.reshape(x.shape[0], -1)
        w = self.values.reshape(*self.values.shape[: len(stack)], -1, rows.shape[1]).astype(x.dtype)
        y = jnp.einsum(f'RI,{stack}OI->{stack}RO', rows, w)
        return jnp.einsum(f'{stack}{of_x[0]}{outputs}->{out}', y.reshape(*y.shape[:-1], *sizes))


def _order(ndim: int, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> list[int]:
    last = [ndim + axis for axis in (*outputs, *inputs)]
    return [axis for axis in range(ndim) if axis not in last] + last
