"""LoRA (arXiv 2106.09685): frozen matrices with a trained product of two narrow ones added, and QLoRA's narrow base.

Beside a matrix `kernel` there may be `kernel_lora_a`, `kernel_lora_b` and `kernel_lora_scale`; a module that asks for
`kernel` then gets

    kernel + scale · a · b

computed where it is used: inside the scan over layers, so that one layer's sum exists at a time. Adapters are shaped
like their matrix, with a rank r appended: `a` has size 1 at the outputs, `b` at the inputs. Of `q_einsum/w` [L,N,D,H],
D in and N·H out, a is [L,1,D,1,r] and b [L,N,1,H,r]. So the shapes alone say what is multiplied, whatever the matrix'
layout, and stacks of layers are adapted layer by layer.

`kernel_int8_scale` beside an int8 `kernel` holds what each of its outputs is multiplied by, as in LLM.int8() (arXiv
2208.07339, section 2.1); `kernel_int4_scale` beside an int4 one what every 32 inputs of an output are (QLoRA, arXiv
2305.14314, with evenly spaced values where that has a normal distribution's).
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.models import matrices
from big_vlm.models.quantised import KINDS, StandIn, narrow, wide

A, B, SCALE = '_lora_a', '_lora_b', '_lora_scale'
NARROW = {kind: f'_{kind}_scale' for kind in KINDS}
BESIDE = (A, B, SCALE, *NARROW.values())


class Adapted(nn.Module):
    """A module that gets its parameters with their adapters, or what stands in the place of a matrix as it is. Inherit
    from it first."""

    @nn.nowrap
    def param(self, name: str, *args: Any, **kwargs: Any) -> jax.Array | StandIn:
        if isinstance(stored := self.get_variable('params', name), StandIn):
            return stored
        weight = super().param(name, *args, **kwargs)
        beside = {end: self.get_variable('params', name + end) for end in BESIDE}
        return _merged(weight, {end: leaf for end, leaf in beside.items() if leaf is not None})


class Dense(Adapted, nn.Dense):
    """Flax', with adapters."""


class DenseGeneral(Adapted, nn.DenseGeneral):
    """Flax', with adapters."""


def is_adapter(path: str) -> bool:
    """Whether the parameter at a path is a factor or the scale of an adapter."""
    return path.endswith((A, B, SCALE))


def is_beside(path: str) -> bool:
    """Whether it belongs to another parameter: an adapter's, or the scale of an int8 or int4 matrix."""
    return path.endswith(BESIDE)


def is_trained(path: str) -> bool:
    """Whether it is a factor."""
    return path.endswith((A, B))


def add(params: Mapping[str, Any], lora: config.Lora, rng: jax.Array) -> dict[str, Any]:
    """The parameters with adapters beside the matrices that rules match, and the base in its dtype.

    `a` is uniform in ±1/sqrt(inputs), `b` zero: the model is at first what it was. The values of an adapter depend on
    `rng` and its path alone.

    Args:
      params: nested dicts of float arrays, as a task's `init` makes them.
      lora: the section. Without rules, `params` come back as they are.
      rng: of the `a`.

    Raises:
      UserError: a rule or a `train` that matches nothing, or only what is no matrix.
    """
    if not lora.rules:
        return dict(params)
    leaves = traverse_util.flatten_dict(params, sep='/')
    rules = match(lora, leaves)
    for path in [path for path in leaves if matrices.axes(path) or path.endswith('embedding')]:
        if not any(re.fullmatch(pattern, path) for pattern in lora.train):
            leaves |= _stored(path, leaves[path], lora.base_dtype)
    for path, rule in rules.items():
        shape, (inputs, outputs) = leaves[path].shape, matrices.axes(path)
        of_a = [1 if axis - len(shape) in outputs else size for axis, size in enumerate(shape)]
        of_b = [1 if axis - len(shape) in inputs else size for axis, size in enumerate(shape)]
        bound = math.prod(shape[axis] for axis in inputs) ** -0.5
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        leaves[path + A] = jax.random.uniform(key, (*of_a, rule.rank), jnp.float32, -bound, bound)
        leaves[path + B] = jnp.zeros((*of_b, rule.rank), jnp.float32)
        # One for every matrix: a scan slices it with them.
        stack = tuple(n if axis - len(shape) not in inputs + outputs else 1 for axis, n in enumerate(shape))
        leaves[path + SCALE] = jnp.full(stack, rule.alpha / rule.rank, jnp.float32)
    return traverse_util.unflatten_dict(leaves, sep='/')


def match(lora: config.Lora, paths: Mapping[str, Any]) -> dict[str, config.LoraRule]:
    """Path of a matrix → the first rule that matches it. Raises UserError as `add` does."""
    adaptable = [path for path in paths if matrices.axes(path)]
    found: dict[str, config.LoraRule] = {}
    for i, (pattern, rule) in enumerate(lora.rules):
        matched = [path for path in adaptable if re.fullmatch(pattern, path)]
        if not matched:
            other = next((path for path in paths if re.fullmatch(pattern, path)), None)
            what = f'matches {other}, which is no matrix of a layer or head' if other else 'matches no parameter'
            raise UserError(f'lora.rules[{i}]: {pattern!r} {what}: did you mean {_near(pattern, adaptable)}?')
        new = {path: rule for path in matched if path not in found}
        if not new:
            raise UserError(f'lora.rules[{i}]: {pattern!r} decides for no matrix, earlier rules took {matched[0]}')
        found |= new
    for i, pattern in enumerate(lora.train):
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise UserError(
                f'lora.train[{i}]: {pattern!r} matches no parameter: did you mean {_near(pattern, [*paths])}?'
            )
    return found


def merge(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with the adapters added to their matrices, narrow ones as float32: a model as without LoRA."""
    leaves = traverse_util.flatten_dict(params, sep='/')
    merged = {path: matrix(leaves, path) for path in leaves if not is_beside(path)}
    return traverse_util.unflatten_dict(merged, sep='/')


def matrix(leaves: Mapping[str, Any], path: str) -> Any:
    """Of leaves by path, on a device or all of numpy, the one at `path` with what is beside it: then float32."""
    return _merged(leaves[path], {end: leaves[path + end] for end in BESIDE if path + end in leaves})


def whole(params: Any) -> Any:
    """`merge` of arrays on devices, placed like the matrices."""
    paths = traverse_util.flatten_dict(params, sep='/')
    shardings = {path: leaf.sharding for path, leaf in paths.items() if not is_beside(path)}
    return jax.jit(merge, out_shardings=traverse_util.unflatten_dict(shardings, sep='/'))(params)


def unmerge(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The base again, to rounding, from merged parameters and the adapters (by path): what was added is taken off."""
    leaves, adapters = traverse_util.flatten_dict(params, sep='/'), traverse_util.flatten_dict(adapters, sep='/')
    for path in [path.removesuffix(A) for path in adapters if path.endswith(A)]:
        delta = _product(adapters[path + A], adapters[path + B]) * adapters[path + SCALE]
        leaves[path] = (leaves[path] - delta).astype(leaves[path].dtype)
    return traverse_util.unflatten_dict(leaves, sep='/')


def adapters(params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Path → leaf of the adapters alone."""
    return {path: leaf for path, leaf in traverse_util.flatten_dict(params, sep='/').items() if is_adapter(path)}


def fits(path: str, leaf: Any, params: Mapping[str, Any]) -> bool:
    """Whether a leaf of adapters, or of what was trained besides, belongs to parameters (path → leaf)."""
    if not is_adapter(path):
        return path in params and params[path].shape == leaf.shape
    end = next(end for end in (A, B, SCALE) if path.endswith(end))
    weight = path.removesuffix(end)
    shape = leaf.shape if end == SCALE else leaf.shape[:-1]
    return (
        weight in params
        and all(n in (1, m) for n, m in zip(shape, params[weight].shape, strict=False))
        and len(shape) == len(params[weight].shape)
    )


def _stored(path: str, weight: jax.Array, dtype: str) -> dict[str, jax.Array]:
    if dtype not in NARROW or not matrices.axes(path):
        return {path: weight.astype(jnp.bfloat16 if dtype in NARROW else dtype)}
    integers, scale = narrow(weight, matrices.axes(path)[0], dtype)
    return {path: integers, path + NARROW[dtype]: scale}


def _merged(weight: jax.Array, beside: Mapping[str, jax.Array]) -> jax.Array:
    """float32 if there is anything beside it. A narrow weight without its scale stays what it is."""
    for end in NARROW.values():
        if end in beside:
            weight = wide(weight, beside[end])
    if A in beside:
        weight = weight + beside[SCALE] * _product(beside[A], beside[B])
    return weight


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum over the last axis of the two, which broadcast elsewhere; as matrix products, one for each of a stack."""
    letters = 'abcdefgh'[: a.ndim - 1]
    shape = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    of_a, of_b = (''.join(x for x, n in zip(letters, leaf.shape, strict=False) if n > 1) for leaf in (a, b))
    a, b = (leaf.reshape([n for n in leaf.shape[:-1] if n > 1] + [leaf.shape[-1]]) for leaf in (a, b))
    out = ''.join(x for x in letters if x in of_a + of_b)
    # Not optimised, numpy takes some ten times as long.
    einsum = functools.partial(np.einsum, optimize=True) if isinstance(a, np.ndarray) else jnp.einsum
    return einsum(f'{of_a}r,{of_b}r->{out}', a, b).reshape(shape)


def _near(pattern: str, paths: list[str]) -> str:
    """The path that shares most words with a regex."""
    words = set(re.findall(r'\w+', pattern))
    return max(sorted(paths), key=lambda path: len(words & set(re.findall(r'\w+', path))))
