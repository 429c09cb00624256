"""Where parameters and optimizer state live: regex rules for the model axis, size for the fsdp axis.

Paths are '/'-joined ('llm/layers/attn/q_einsum/w'). A rule is (regex, spec): the first regex that matches the whole
path wins. A spec names a mesh axis (or None) for each of the *last* dimensions, so that one rule serves a layer's
weight and the stack of all layers' weights; the leading dimensions it does not mention are never split.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from big_vlm.config import UserError, unknown

Rule = tuple[str, tuple[str | None, ...]]

# Heads N, mlp F and vocabulary V on the model axis. Letters after each rule: the weight's own dimensions.
DEFAULT_RULES: tuple[Rule, ...] = (
    (r'.*/MultiHeadDotProductAttention_\d+/(query|key|value)/kernel', (None, 'model', None)),  # D N H
    (r'.*/MultiHeadDotProductAttention_\d+/(query|key|value)/bias', ('model', None)),  # N H
    (r'.*/MultiHeadDotProductAttention_\d+/out/kernel', ('model', None, None)),  # N H D
    (r'.*/MlpBlock_\d+/Dense_0/kernel', (None, 'model')),  # D F
    (r'.*/MlpBlock_\d+/Dense_0/bias', ('model',)),  # F
    (r'.*/MlpBlock_\d+/Dense_1/kernel', ('model', None)),  # F D
    (r'(.*/)?Embed_\d+/embedding', ('model', None)),  # V D
    (r'(.*/)?embedder/input_embedding', ('model', None)),  # V D
    (r'.*/attn/q_einsum/w', ('model', None, None)),  # N D H
    (r'.*/attn/q?kv_einsum/w', (None, 'model', None, None)),  # 2|3 K D H
    (r'.*/attn/attn_vec_einsum/w', ('model', None, None)),  # N H D
    (r'.*/mlp/gating_einsum', (None, None, 'model')),  # 2 D F
    (r'.*/mlp/linear', ('model', None)),  # F D
)

# Elements. Smaller parameters stay whole: gathering them costs more time than keeping them costs memory.
FSDP_MIN_SIZE = 2**16


def param_shardings(shapes: Any, mesh: Mesh, rules: Sequence[Rule] = (), *, fsdp_min_size: int | None = None) -> Any:
    """A NamedSharding for every parameter.

    `rules` go before the default ones, which put heads, mlp and vocabulary on 'model' where those divide (one
    key-value head does not, and stays whole). Then the largest dimension that is still whole and divides takes 'fsdp',
    if the parameter has at least `fsdp_min_size` elements. What no rule matches is whole along 'model'.

    Args:
      shapes: pytree of arrays or ShapeDtypeStructs, as from `jax.eval_shape`.
      mesh: from `sharding.mesh.make_mesh`.
      rules: (regex, spec) pairs for parameters with names of their own.
      fsdp_min_size: in elements; None: FSDP_MIN_SIZE.

    Raises:
      UserError: one of `rules` is no regex, matches no parameter, names an unknown axis, or does not fit the shape.
    """
    fsdp_min_size = FSDP_MIN_SIZE if fsdp_min_size is None else fsdp_min_size
    rules = [(_compile(pattern), pattern, tuple(spec)) for pattern, spec in rules]
    defaults = [(re.compile(pattern), spec) for pattern, spec in DEFAULT_RULES]
    used = set()

    def place(path, leaf):
        name = _name(path)
        spec, stacked = [None] * len(leaf.shape), 0
        for regex, pattern, rule in rules:
            if regex.fullmatch(name):
                used.add(pattern)
                spec = _fit(rule, leaf.shape, mesh, f'sharding rule {pattern!r}: {name} {leaf.shape}')
                stacked = len(leaf.shape) - len(rule) if rule else 0
                break
        else:
            for regex, rule in defaults:
                if regex.fullmatch(name) and len(rule) <= len(leaf.shape):
                    stacked = len(leaf.shape) - len(rule)
                    spec = [None] * stacked + list(rule)
                    spec = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(spec, leaf.shape, strict=True)]
                    break
        return NamedSharding(mesh, P(*_add_fsdp(spec, stacked, leaf.shape, mesh, fsdp_min_size)))

    shardings = jax.tree_util.tree_map_with_path(place, shapes)
    for _, pattern, _ in rules:
        if pattern not in used:
            names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
            raise UserError(
                f'sharding rule {pattern!r} decides for no parameter: it must match a whole path that no earlier rule '
                f'took, such as {names[0]!r}'
            )
    return shardings


def state_shardings(state_shapes: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a train state.

    A leaf belongs to the parameter whose path ends its own ('opt_state/0/mu/img/head/kernel' to 'img/head/kernel').
    Of equal shape, it takes the parameter's spec; with one dimension dropped (Adafactor's row and column statistics),
    the spec less that dimension; anything else (counts, placeholders, statistics of the data) is replicated.

    Args:
      state_shapes: the state's shapes, with its parameters at `.params`; any nesting of optax states.
      param_shardings: from `param_shardings`, same structure as `state_shapes.params`.
      mesh: the same mesh.
    """
    shapes = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state_shapes.params)}
    specs = {_name(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(param_shardings)}

    def place(path, leaf):
        parts = _name(path).split('/')
        for start in range(len(parts)):  # the longest ending first
            name = '/'.join(parts[start:])
            if name in specs:
                return NamedSharding(mesh, _state_spec(leaf.shape, shapes[name], specs[name], parts[:start]))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, state_shapes)


def _state_spec(shape, param_shape, spec, parents):
    if shape == param_shape:
        return spec
    full = (*spec, *[None] * (len(param_shape) - len(spec)))
    dropped = [i for i in range(len(param_shape)) if param_shape[:i] + param_shape[i + 1 :] == shape]
    # Two equal dimensions leave the shape ambiguous. optax drops the last of the sorted ones from v_row, the one before
    # it from v_col.
    order = [int(i) for i in np.argsort(param_shape)]
    if len(dropped) > 1 and 'v_row' in parents:
        dropped = [order[-1]]
    elif len(dropped) > 1 and 'v_col' in parents:
        dropped = [order[-2]]
    remaining = {full[:i] + full[i + 1 :] for i in dropped}
    return P(*remaining.pop()) if len(remaining) == 1 else P()


def _add_fsdp(spec, stacked, shape, mesh, min_size):
    """Puts 'fsdp' on the largest dimension that is whole and divides; the last of equals, which is contiguous."""
    size = mesh.shape['fsdp']
    if size == 1 or 'fsdp' in spec or int(np.prod(shape)) < min_size:
        return spec
    free = [i for i in range(stacked, len(shape)) if spec[i] is None and shape[i] % size == 0]
    if not free:
        return spec
    chosen = max(free, key=lambda i: (shape[i], i))
    return [*spec[:chosen], 'fsdp', *spec[chosen + 1 :]]


def _fit(rule, shape, mesh, where):
    """A user's spec over all dimensions of `shape`, or a UserError: what was asked for explicitly is not dropped."""
    if len(rule) > len(shape):
        raise UserError(f'{where}: the spec {rule} has {len(rule)} entries, the parameter {len(shape)} dimensions')
    spec = [None] * (len(shape) - len(rule)) + list(rule)
    for axis, size in zip(spec, shape, strict=True):
        if axis is None:
            continue
        if spec.count(axis) > 1:
            raise UserError(f'{where}: the spec {rule} names {axis!r} twice, and an axis splits one dimension')
        if axis not in mesh.shape:
            raise unknown('mesh axis', axis, mesh.axis_names, where=where)
        if size % mesh.shape[axis]:
            raise UserError(f'{where}: dimension {size} does not divide by mesh.{axis}={mesh.shape[axis]}')
    return spec


def _compile(pattern):
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f'sharding rule {pattern!r} is not a regular expression: {error}') from None


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator='/')
