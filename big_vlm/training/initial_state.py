"""The first state of a stage that goes on with an earlier one's: its moments and averages as well as its weights.

Step and schedules begin anew, as every stage has its own. Position embeddings of another resolution are resized, and
with them their averages and moments, Adafactor's factors of them too.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from big_vlm.checkpoints import Checkpointer, trees
from big_vlm.training import initial_weights, optimizer
from big_vlm.training.state import TrainState

_POSITION = initial_weights.POSITION  # ends the path of position embeddings, and of all that an optimizer keeps of them
_OTHER = {'v_row': 'v_col', 'v_col': 'v_row'}  # Adafactor's factors


def check(before: TrainState, state: TrainState, where: str) -> None:
    """Raises UserError where the abstract state `before` cannot become `state`: leaves missing, or of other shapes."""
    stored, wanted = trees.flat(before), trees.flat(state)
    trees.check_same(_as_stored(wanted, stored), stored, where)


def make(folder: pathlib.Path, step: int, method: str) -> Callable[[TrainState], TrainState]:
    """Abstract state → that of `step` in `folder`, the checkpoints of a stage that has ended with it, placed like it.

    `method` resizes weights and averages; moments are always interpolated linearly, as some must not become negative.
    What is returned raises UserError where that checkpoint is damaged or gone: an earlier one is not that stage's end.
    """
    remedy = f'Remove {folder.parent / "bundle"}, and the end of that stage is trained again'

    def load(abstract: TrainState) -> TrainState:
        wanted = trees.flat(abstract)
        with Checkpointer(folder, remedy=remedy) as saver:
            shapes = saver.shapes(step)
            restored, _ = saver.restore(trees.like(abstract, _as_stored(wanted, shapes)), step)
        leaves = trees.flat(restored)
        leaves |= {
            path: _resized(path, leaves[source], wanted[path], method)
            for path, source in _sources(wanted, shapes).items()
        }
        state = trees.like(abstract, leaves)
        first = jax.device_put(np.zeros((), np.int32), abstract.step.sharding)
        return state.replace(step=first, opt_state=optimizer.restarted(state.opt_state))

    return load


def _as_stored(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """What is wanted, but positions in the shapes in which they are stored, on every device."""
    like = dict(wanted)
    for path in _sources(wanted, stored):
        everywhere = NamedSharding(wanted[path].sharding.mesh, PartitionSpec())
        like[path] = jax.ShapeDtypeStruct(stored[path].shape, wanted[path].dtype, sharding=everywhere)
    return like


def _sources(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, str]:
    """Path → that of the stored array to make it of, for all that belongs to position embeddings of another shape.

    Of Adafactor's two factors of [1,P,D] (optax), `v_row` lacks the larger one of P and D, `v_col` the other: where P
    grows beyond D, they change places.
    """
    found, parameter = {}, f'params/{_POSITION}'
    old, new = (tree[parameter].shape if parameter in tree else (0, 0) for tree in (stored, wanted))
    turned = (old[-2] <= old[-1]) != (new[-2] <= new[-1])
    for path in (path for path in wanted if path.endswith(_POSITION)) if old[-1] == new[-1] else ():
        source = '/'.join(_OTHER.get(part, part) if turned else part for part in path.split('/'))
        shapes = stored[source].shape if source in stored else None, wanted[path].shape
        if shapes in ((old, new), (old[:-1], new[:-1])) or shapes[0] == shapes[1]:
            found[path] = source
    return found if old != new else {}


def _resized(path: str, leaf: jax.Array, wanted: jax.ShapeDtypeStruct, method: str) -> jax.Array:
    if leaf.shape != wanted.shape:
        method = 'bilinear' if path.startswith('opt_state/') else method
        factor = any(part in _OTHER for part in path.split('/'))
        positions = np.asarray(leaf, np.float32)[..., None] if factor else np.asarray(leaf, np.float32)
        shape = (*wanted.shape, 1) if factor else wanted.shape
        leaf = initial_weights.resized(positions, shape, method).reshape(wanted.shape).astype(wanted.dtype)
    return jax.device_put(leaf, wanted.sharding)
