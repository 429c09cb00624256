"""Pytrees as nested dicts of arrays: the form on disk, free of anyone's container classes."""

import re
from collections.abc import Mapping
from typing import Any

import jax

from big_vlm.config import UserError


def flat(tree: Any) -> dict[str, Any]:
    """'/'-joined path → leaf, for any pytree: dict keys, tuple indices, field names. Empty containers vanish.

    >>> flat({'params': {'w': 1}, 'opt_state': (2, None)})
    {'opt_state/0': 2, 'params/w': 1}
    """
    return {
        jax.tree_util.keystr(p, simple=True, separator='/'): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of `flat`'s paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def merged(*trees: Any) -> dict[str, Any]:
    """One nested dict of all their leaves: weights of parameters and running statistics. Paths must differ."""
    return nested({path: leaf for tree in trees for path, leaf in flat(tree).items()})


def like(structure: Any, leaves: Mapping[str, Any]) -> Any:
    """The inverse of `flat`, in the containers of `structure`; `leaves` may have more."""
    return jax.tree.unflatten(jax.tree.structure(structure), [leaves[path] for path in flat(structure)])


def check_same(wanted: Mapping[str, Any], stored: Mapping[str, Any], where: str, *, partial: bool = False) -> None:
    """Raises UserError with the first differing leaves, in path, shape or dtype.

    `partial` allows more stored than wanted, and other dtypes, to be cast.
    """
    problems = [f'{key} is missing' for key in wanted if key not in stored]
    problems += [
        f'{key} has shape {tuple(stored[key].shape)}, not {tuple(leaf.shape)}'
        for key, leaf in wanted.items()
        if key in stored and tuple(stored[key].shape) != tuple(leaf.shape)
    ]
    if not partial:
        problems += [
            f'{key} has dtype {stored[key].dtype}, not {leaf.dtype}'
            for key, leaf in wanted.items()
            if key in stored and stored[key].dtype != leaf.dtype
        ]
        problems += [f'{key} is not expected' for key in stored if key not in wanted]
    if problems:
        more = f'; and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise UserError(
            f'{where} does not fit this model or optimizer: {"; ".join(problems[:3])}{more}. '
            'Use the config it was made with, or another folder'
        )


def one_line(error: Exception) -> str:
    """An error's text as the end of a UserError; of a long one both ends, as the cause may stand at either.

    >>> one_line(ValueError("NOT_FOUND: a/b\\n [tensorstore_spec='{...}'] [os_error_code='2']"))
    "NOT_FOUND: a/b [os_error_code='2']"
    """
    text = ' '.join(re.sub(r"\[tensorstore_spec='.*?'\]", '', str(error)).split()) or type(error).__name__
    return text if len(text) <= 240 else f'{text[:120]} … {text[-120:]}'
