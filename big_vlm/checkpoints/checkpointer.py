"""Whole training states: saved in the background, published atomically, restored onto any mesh."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from big_vlm.checkpoints import trees
from big_vlm.config import UserError


class Checkpointer:
    """The checkpoints of one stage: `directory`/STEP/{state, extra}.

    A step's folder appears under its name only when all of it is written, so a killed run leaves nothing half-made
    that counts. One save runs at a time: the next one waits for it.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 1):
        """`keep`: so many of the newest checkpoints stay. Raises UserError if `directory` holds something else."""
        self._directory = pathlib.Path(directory).resolve()
        if self._directory.exists() and not self._directory.is_dir():
            raise UserError(f'{self._directory} is a file, not a folder for checkpoints: choose another workdir')
        self._remove_half_deleted()
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
            registry.add('state', args, ocp.StandardCheckpointHandler())
        for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
            registry.add('extra', args, ocp.JsonCheckpointHandler())
        with self._writing():
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.LatestN(keep), cleanup_tmp_directories=True
                ),
                handler_registry=registry,
            )

    @property
    def directory(self) -> pathlib.Path:
        """The folder."""
        return self._directory

    def latest_step(self) -> int | None:
        """The newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None) -> None:
        """Starts to save; returns when the state may be donated. A step that exists already is left alone.

        Args:
          step: its name.
          state: pytree of jax.Arrays.
          extra: anything JSON can hold, such as the preprocessing contract.
        """
        if step in self._manager.all_steps():
            return
        # Asked before Orbax finds out: its waiting threads would then keep the process from ending, for five minutes.
        if not self._directory.is_dir():
            raise UserError(f'{self._directory}: checkpoint not written: the folder is gone')
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(trees.nested(trees.flat(state))), extra=ocp.args.JsonSave(extra or {})
        )
        with self._writing():
            self._manager.save(step, args=items, force=True)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """(state, extra) of `step`, or of the latest one.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings; they need not be those it was saved with.

        Raises:
          UserError: no checkpoint, or leaves of other names or shapes.
        """
        step = self.latest_step() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise UserError(f'{self._directory}: no checkpoint{"" if step is None else f" of step {step}"}')
        where = f'checkpoint {self._directory / str(step)}'
        wanted = trees.flat(abstract_state)
        try:
            stored = trees.flat(self._manager.item_metadata(step)['state'].tree)
            trees.check_same(wanted, stored, where)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(trees.nested(wanted)), extra=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, OSError, KeyError) as error:
            raise UserError(
                f'{where} is damaged: {trees.one_line(error)}. Delete this folder to go on without it'
            ) from error
        return trees.like(abstract_state, trees.flat(restored['state'])), restored['extra']

    def wait(self) -> None:
        """Returns when what was saved is on disk. Raises what went wrong in the background."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads."""
        with self._writing():
            self._manager.close()

    def _remove_half_deleted(self) -> None:
        """A process killed while it deleted an old checkpoint leaves a part of it. The newest is never one of those."""
        if jax.process_index() == 0 and self._directory.is_dir():
            folders = sorted((f for f in self._directory.iterdir() if f.name.isdigit()), key=lambda f: int(f.name))
            for folder in folders[:-1]:
                if not (folder / '_CHECKPOINT_METADATA').exists():
                    shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk, a lost mount or a missing permission is the user's to mend; it may show a save later."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(f'{self._directory}: checkpoint not written: {trees.one_line(error)}') from error

    def __enter__(self) -> 'Checkpointer':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def abstract(tree: Any, shardings: Any = None) -> Any:
    """ShapeDtypeStructs of a pytree, with its own shardings or those given."""
    shardings = jax.tree.map(lambda x: x.sharding, tree) if shardings is None else shardings
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
