"""Weight-only quantisation for decoding: matrices of 8 or 4 bits, activations as they were.

A token read alone costs the reading of every weight, so fewer bytes are fewer seconds. int8 has one scale an output
(LLM.int8(), arXiv 2208.07339, section 2.1, without its outliers); int4 has 16 levels from the least to the largest of
every 32 inputs of an output, as in llama.cpp's Q4_1, but for the token table, which keeps 8 bits. A `Quantised` stands
among the parameters in the place of its matrix; modules that ask for it multiply by `einsum`. A decoder's layers and
its token table are quantised; norms, the image tower and projectors are not.

On CPUs a few rows are multiplied and summed in one loop that converts as it reads: converted first, the whole matrix
would be written out as floats for every token. Many rows are a matrix product, of a part of the matrix at a time; on
other devices all are one, and the conversion is left to the compiler.

Letters: O outputs, I inputs, G groups of inputs, R rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from big_vlm.config import UserError, unknown
from big_vlm.models import matrices

KINDS = ('int8', 'int4')
_GROUP = 32  # inputs that share a scale of int4
_FEW = 16  # rows up to which int8 is multiplied in one loop; int4 is for one row
_BLOCK = 1024  # outputs whose floats stay in a CPU's cache
_TABLE = 'llm/embedder/input_embedding'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A matrix, or in its arrays a stack of them along leading axes.

    values: int8 [O, I]; or uint8 [O, G, I/G/2], two inputs of 0 … 15 a byte: the low bits hold a group's first half.
    scale: of a step, float32 [O, 1] or float16 [O, G].
    shape: of the matrix, `inputs`: which of its axes are summed over; the others are outputs.
    least: float16 [O, G], what 0 stands for in 4 bits; None in 8.
    """

    values: jax.Array
    scale: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={'static': True})
    inputs: tuple[int, ...] = dataclasses.field(metadata={'static': True})
    least: jax.Array | None = None

    def take(self, row: jax.Array) -> jax.Array:
        """Rows of a table [O, I]: int [...] → float32 [..., I]."""
        return jax.tree.map(lambda a: a[row], self).rows()

    def rows(self) -> jax.Array:
        """float32 [O, I]."""
        scale = self.scale.astype(jnp.float32)
        if self.least is None:
            return self.values.astype(jnp.float32) * scale
        halves = jnp.stack([self.values % 16, self.values // 16], axis=-2).astype(jnp.float32)
        groups = halves * scale[..., None, None] + self.least.astype(jnp.float32)[..., None, None]
        return groups.reshape(*scale.shape[:-1], -1)

    def product(self, x: jax.Array) -> jax.Array:
        """[R, I] → float32 [R, O]."""
        few = x.shape[0] <= (_FEW if self.values.dtype == jnp.int8 else 1)
        return jax.lax.platform_dependent(x, cpu=self._loop if few else self._blocks, default=self._dot)

    def _dot(self, x):
        whole = self.values.dtype == jnp.int8
        table = (self.values if whole else self.rows()).astype(x.dtype)
        y = jnp.einsum('RI,OI->RO', x, table, preferred_element_type=jnp.float32)
        return y * self.scale[:, 0] if whole else y

    def _blocks(self, x):
        """`_dot` of some outputs after the others: their floats are read again while they are in the cache."""
        block = math.gcd(len(self.values), _BLOCK)
        if block < _BLOCK / 16:
            return self._dot(x)
        parts = jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), self)
        y = jax.lax.map(lambda part: part._dot(x), parts)
        return jnp.moveaxis(y, 0, 1).reshape(len(x), -1)

    def _loop(self, x):
        # The forms that XLA makes one vectorised loop of: they look alike, and others took up to 20 times as long.
        x, values = x.astype(jnp.float32), self.values.astype(jnp.float32)
        if self.values.dtype == jnp.int8:
            many = x.shape[0] > 1
            y = jnp.sum(values * x[:, None, :], axis=2) if many else jnp.sum(values * x[0], axis=1)[None]
            return y * self.scale[:, 0]
        x = x.reshape(values.shape[1], 2, values.shape[2])
        low, high, scale = x[:, 0], x[:, 1], self.scale.astype(jnp.float32)
        # byte = low + 16 high: byte x + high (x' - 16 x) = low x + high x', and nothing but floats.
        summed = (values * low + jnp.floor(values * 0.0625) * (high - 16 * low)) * scale[:, :, None]
        shift = self.least.astype(jnp.float32) * jnp.sum(low + high, axis=1)
        return (jnp.sum(summed, axis=(1, 2)) + jnp.sum(shift, axis=1))[None]


StandIn = Quantised | matrices.OutputsFirst  # what may be in the place of a matrix


def einsum(equation: str, x: jax.Array, w: jax.Array | StandIn) -> jax.Array:
    """`jnp.einsum` of rows, the first letter of the equation, and a matrix, in the dtype of `x`."""
    if isinstance(w, matrices.OutputsFirst):
        return w.einsum(equation, x)
    if not isinstance(w, Quantised):
        return jnp.einsum(equation, x, w.astype(x.dtype))
    (of_x, of_w), out = equation.split('->')[0].split(','), equation.split('->')[1]
    y = w.product(x.reshape(x.shape[0], -1)).astype(x.dtype)
    outputs = [(letter, size) for i, (letter, size) in enumerate(zip(of_w, w.shape, strict=True)) if i not in w.inputs]
    y = y.reshape(x.shape[0], *(size for _, size in outputs))
    return jnp.einsum(f'{of_x[0]}{"".join(letter for letter, _ in outputs)}->{out}', y)


def symmetric(weight: jax.Array, inputs: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(int8, float32 scale): the largest of each output's inputs becomes ±127.

    Args:
      weight: float, any layout.
      inputs: its input axes, as `matrices.axes` tells; the scale has size 1 there.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=inputs, keepdims=True) / 127
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(weight / scale).astype(jnp.int8), scale


def in_groups(weight: jax.Array, inputs: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(int4, bfloat16 scale): of 32 inputs along the last of the axes `inputs`, the largest, whatever its sign, is -8.

    In the layout of `weight`; the scale has one number for those 32. They are fewer where the axis does not divide.
    """
    weight = weight.astype(jnp.float32)
    axis = inputs[-1] % weight.ndim
    group = math.gcd(weight.shape[axis], _GROUP)
    groups = weight.reshape(*weight.shape[:axis], -1, group, *weight.shape[axis + 1 :])
    values, scale = _of_four_bits(groups, axis + 1)
    return values.reshape(weight.shape).astype(jnp.int4), scale.squeeze(axis + 1)


def narrow(weight: jax.Array, inputs: tuple[int, ...], kind: str) -> tuple[jax.Array, jax.Array]:
    """`symmetric` for 'int8', `in_groups` for 'int4'."""
    return (symmetric if kind == 'int8' else in_groups)(weight, inputs)


def wide(values: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 of what `narrow` gave, on a device or in numpy."""
    for axis, (size, count) in enumerate(zip(values.shape, scale.shape, strict=True)):
        if 1 < count < size:
            scale = scale.repeat(size // count, axis)
    return values.astype(jnp.float32) * scale.astype(jnp.float32)


def _of_four_bits(groups: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """(float32 in -8..7, bfloat16 scale of size 1 at `axis`, along which a group lies)."""
    extreme = jnp.take_along_axis(groups, jnp.argmax(jnp.abs(groups), axis=axis, keepdims=True), axis=axis)
    scale = (extreme / -8).astype(jnp.bfloat16)  # the largest, whatever its sign, becomes -8
    near = jnp.where(scale != 0, groups / scale.astype(jnp.float32), 0.0)
    return jnp.clip(jnp.round(near), -8, 7), scale


def quantise(weight: jax.Array, inputs: tuple[int, ...], kind: str, stacked: int = 0) -> Quantised:
    """A float matrix in 8 or 4 bits; int4 of an odd number of inputs is int8.

    inputs: negative axes; stacked: leading axes that hold one matrix each.
    """
    shape = weight.shape[stacked:]
    inputs = tuple(sorted(axis % len(shape) for axis in inputs))
    order = [axis for axis in range(len(shape)) if axis not in inputs] + list(inputs)
    count = math.prod(shape[axis] for axis in inputs)
    rows = jnp.transpose(weight, [*range(stacked), *(stacked + axis for axis in order)])
    rows = rows.reshape(*weight.shape[:stacked], -1, count).astype(jnp.float32)
    group = math.gcd(count, _GROUP)
    if kind == 'int8' or group % 2:
        return Quantised(*symmetric(rows, (-1,)), shape, inputs)
    rows = rows.reshape(*rows.shape[:-1], -1, group)
    least = jnp.min(rows, axis=-1, keepdims=True).astype(jnp.float16)
    above = rows - least.astype(jnp.float32)
    scale = (jnp.max(above, axis=-1, keepdims=True) / 15).astype(jnp.float16)
    near = jnp.where(scale > 0, above / scale.astype(jnp.float32), 0.0)
    low, high = jnp.split(jnp.clip(jnp.round(near), 0, 15).astype(jnp.uint8), 2, axis=-1)
    return Quantised(low + 16 * high, scale[..., 0], shape, inputs, least[..., 0])


def quantise_decoder(params: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """PaliGemma's parameters (layers stacked) with those of its decoder as `Quantised`. Raises UserError for another
    `kind` than those of `KINDS`, and for parameters that are quantised already."""
    if kind not in KINDS:
        raise unknown('quantisation', kind, KINDS)
    if isinstance(params['llm']['embedder']['input_embedding'], Quantised):
        raise UserError(f'quantisation {kind!r}: these weights are quantised already; load them anew')
    run = jax.jit(quantise, static_argnums=(1, 2, 3))
    leaves = traverse_util.flatten_dict(params, sep='/')
    for path, leaf in leaves.items():
        if path == _TABLE:
            leaves[path] = run(leaf, (-1,), 'int8')
        elif path.startswith('llm/layers/') and (found := matrices.axes(path)):
            leaves[path] = run(leaf, found[0], kind, 1)
    return traverse_util.unflatten_dict(leaves, sep='/')
