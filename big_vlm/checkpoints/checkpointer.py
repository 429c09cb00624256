"""Whole training states: saved in the background, published atomically, verified, restored onto any mesh."""

import contextlib
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from big_vlm.checkpoints import manifest, orbax_errors, together, trees
from big_vlm.config import UserError, say
from big_vlm.sharding import mesh as meshes

_LEFT = '.left_behind'  # of a checkpoint's folder that a roll-back is about to delete


class Checkpointer:
    """The checkpoints of one stage: `directory`/STEP/{state, extra, manifest.json}.

    A step's folder appears under its name only when all of it is written, so a killed run leaves nothing half-made
    that counts. One save runs at a time: the next one waits for it. The newest is verified when the folder is opened;
    one that is damaged is renamed to STEP.damaged, with a line on standard error, and the one before counts, unless the
    folder is another's.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        keep: int = 1,
        *,
        keep_every: int = 0,
        best: Literal['', 'max', 'min'] = '',
        scored: Any = None,
        grace: int = 0,
        remedy: str = '',
    ):
        """Opens the folder. Raises UserError if `directory` holds something else.

        Args:
          directory: the folder; made if absent.
          keep: so many of the newest checkpoints stay.
          keep_every: multiples of it stay too; 0: none.
          best: 'max' or 'min': the checkpoint of the largest or smallest score stays too.
          scored: what the scores are of, anything JSON can hold; those of something else count no more.
          grace: so many failed saves in a row are told and survived; the next one raises. What fails in one of several
            processes has failed in all.
          remedy: of a folder that another one fills: what a person does about damage there. Nothing is renamed then.
        """
        self._directory = pathlib.Path(directory).resolve()
        if self._directory.exists() and not self._directory.is_dir():
            raise UserError(f'{self._directory} is a file, not a folder for checkpoints: choose another workdir')
        self._remedy, self._scored = remedy, scored
        self._damage = self._set_aside()
        self._policy = _Policy(keep, keep_every, best)
        self._grace, self._failed, self._error = grace, 0, None
        self._saving: int | None = None
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
            registry.add('state', args, ocp.StandardCheckpointHandler())
        for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
            registry.add('extra', args, ocp.JsonCheckpointHandler())
        with self._writing():
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy,
                    cleanup_tmp_directories=True,
                    async_options=ocp.AsyncOptions(
                        post_finalization_callback=self._write_manifest,
                        barrier_sync_fn=together.Barrier() if jax.process_count() > 1 else None,
                    ),
                ),
                handler_registry=registry,
            )
        self._policy.scores |= {step: self._score(step) for step in self._manager.all_steps()} if best else {}

    @property
    def directory(self) -> pathlib.Path:
        """The folder."""
        return self._directory

    def latest_step(self) -> int | None:
        """The newest complete checkpoint."""
        return self._manager.latest_step()

    def shapes(self, step: int | None = None) -> dict[str, Any]:
        """Path → shape and dtype of the state of `step`, or of the latest one. Raises as `restore` does."""
        with self._reading(step) as step:
            return trees.flat(self._manager.item_metadata(step)['state'].tree)

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None, score: float | None = None) -> None:
        """Starts to save; returns when the state may be donated. One that exists already gets the score, nothing else.

        Args:
          step: its name.
          state: pytree of jax.Arrays.
          extra: anything JSON can hold, such as the preprocessing contract.
          score: of the state, for `best`; None: it has none.

        Raises:
          UserError: this save, or the one before it, failed, and no grace is left.
        """
        if step in self._manager.all_steps():
            if score is not None:
                self._settle()
                self._rescore(step, score)
            return
        self._settle()
        self._sweep()  # What was still being written when the one before was cleared away.
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(trees.nested(trees.flat(state))), extra=ocp.args.JsonSave(extra or {})
        )
        self._saving, self._policy.scores[step] = step, score
        # Asked before Orbax finds out: its waiting threads would keep the process from ending, for five minutes.
        if not self._together(self._probe):
            return
        try:
            with self._writing():
                self._manager.save(step, args=items, force=True)
        except UserError as error:
            if jax.process_count() > 1:
                raise  # The others are inside of Orbax, and see that this one is gone.
            self._survive(error)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """(state, extra) of `step`, or of the latest one.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings; they need not be those it was saved with.

        Raises:
          UserError: no checkpoint, a damaged one, or leaves of other names, shapes or dtypes.
        """
        wanted = trees.flat(abstract_state)
        with self._reading(step) as step:
            stored = trees.flat(self._manager.item_metadata(step)['state'].tree)
            wanted |= _averages_of_frozen(wanted, stored)
            trees.check_same(wanted, stored, f'checkpoint {self._directory / str(step)}')
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(trees.nested(wanted)), extra=ocp.args.JsonRestore()
                ),
            )
        return trees.like(abstract_state, trees.flat(restored['state'])), restored['extra']

    def go_back(self, step: int) -> int | None:
        """The newest whole checkpoint from before `step`, when the later ones are deleted; None if there is none.

        Then nothing is deleted. Raises UserError if the save under way fails, and no grace is left.
        """
        self._settle()
        damage = self._set_aside(step)
        self._manager.reload()
        steps = sorted(self._manager.all_steps())
        older = [one for one in steps if one < step]
        if damage and older and jax.process_index() == 0:
            _say(f'checkpoint {self._directory / str(older[-1])} is damaged: {damage}')
        if damage or not older:
            return None
        if jax.process_index() == 0:
            for later in reversed(steps[len(older) :]):
                # A deletion that is killed leaves a part, which must not count.
                os.replace(self._directory / str(later), self._directory / f'{later}{_LEFT}')
            _clear(self._directory)
        meshes.wait('checkpoints deleted')
        self._manager.reload()
        return older[-1]

    def wait(self) -> None:
        """Returns when what was saved is on disk. Raises what went wrong with the last save, grace or not."""
        with contextlib.suppress(UserError):
            self._settle()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Waits, and ends the threads."""
        with self._writing():
            self._manager.close()

    def _settle(self) -> None:
        """Waits for the save under way, and takes note of how it ended."""
        if self._saving is not None and self._together(self._manager.wait_until_finished):
            self._saving, self._failed, self._error = None, 0, None

    def _together(self, part: Callable[[], object]) -> bool:
        """Whether what this process has to do for the save succeeded, and what every other one has to do."""
        error = None
        try:
            with self._writing():
                part()
        except UserError as failed:
            error = failed
        if not meshes.anywhere(error is not None):
            return True
        self._survive(error or UserError(f'{self._directory}: checkpoint not written: another process could not'))
        return False

    def _probe(self) -> None:
        """Raises OSError where nothing can be written."""
        if not self._directory.is_dir():
            raise OSError('the folder is gone')
        if jax.process_count() > 1:
            probe = self._directory / f'.writable{jax.process_index()}'
            probe.write_bytes(bytes(4096))
            probe.unlink()

    def _survive(self, error: UserError) -> None:
        """Clears away a save that failed; raises if it was one too many."""
        step, self._saving, self._error = self._saving, None, error
        self._failed += 1
        self._policy.scores.pop(step, None)
        self._sweep()
        if self._failed > self._grace:
            raise error
        meshes.wait('failed save cleared away')
        self._manager.reload()
        left = self._grace - self._failed
        _say(f'{error}. The run goes on; {f"{left} more" if left else "no more"} in a row may fail')

    def _sweep(self) -> None:
        if jax.process_index() == 0:
            for rest in self._directory.glob('*.*tmp*'):
                shutil.rmtree(rest, ignore_errors=True)

    def _write_manifest(self) -> None:
        """In the thread that saves, when all is written but the folder does not have its name yet."""
        hidden = next(self._directory.glob(f'{self._saving}.*tmp*'), self._directory / str(self._saving))
        score = self._policy.scores.get(self._saving)
        manifest.write(hidden, step=self._saving, score=score, scored=self._scored)

    def _rescore(self, step: int, score: float) -> None:
        """Of a run that was stopped before the step was evaluated."""
        self._policy.scores[step] = score
        if jax.process_index() == 0:
            try:
                manifest.rewrite(self._directory / str(step), score=score, scored=self._scored)
            except UserError as error:
                _say(f'its score: {error}. The run goes on')

    def _score(self, step: int) -> float | None:
        with contextlib.suppress(ValueError, OSError):
            told = manifest.read(self._directory / str(step)) or {}
            # Older versions did not say of what: they count, as what is not kept is gone for ever.
            return told.get('score') if told.get('scored', self._scored) == self._scored else None

    @contextlib.contextmanager
    def _reading(self, step: int | None) -> Iterator[int]:
        """`step`, or the latest one; that it is missing or damaged is a UserError."""
        newest = self.latest_step()
        step = newest if step is None else step
        if step is None or step not in self._manager.all_steps():
            which = '' if step is None else f' of step {step}'
            raise UserError(f'{self._directory}: no checkpoint{which}{self._remedy and f". {self._remedy}"}')
        folder = self._directory / str(step)
        try:
            if damage := self._damage if step == newest else manifest.problem(folder):
                raise ValueError(damage)
            with orbax_errors.plain():
                yield step
        except (ValueError, OSError, KeyError) as error:
            remedy = self._remedy or 'Delete this folder to go on without it'
            raise UserError(f'checkpoint {folder} is damaged: {trees.one_line(error)}. {remedy}') from error

    def _set_aside(self, before: int | None = None) -> str | None:
        """Renames damaged checkpoints until the newest is whole; of a last one that is not, returns what is wrong.

        Nothing is renamed where nothing older is left: to begin again from nothing is for a person to decide; nor in
        a folder that another one fills. Of those from `before` a step, if it is given.
        """
        damage = None
        if jax.process_index() == 0 and self._directory.is_dir():
            _clear(self._directory)
            folders = sorted((f for f in self._directory.iterdir() if f.name.isdecimal()), key=lambda f: int(f.name))
            folders = [folder for folder in folders if before is None or int(folder.name) < before]
            # A process killed while it deleted an old checkpoint leaves a part of it. The newest is never one of those.
            for folder in folders[:-1]:
                if not (folder / '_CHECKPOINT_METADATA').exists():
                    shutil.rmtree(folder, ignore_errors=True)
                    folders.remove(folder)
            while folders and (damage := manifest.problem(folders[-1], folders[:-1])):
                if len(folders) == 1 or self._remedy:
                    break
                damaged = folders.pop()
                aside = _free(damaged.with_name(f'{damaged.name}.damaged'))
                os.replace(damaged, aside)
                _say(f'checkpoint {damaged} is damaged: {damage}. It is {aside.name} now; {folders[-1].name} counts')
        if meshes.anywhere(damage is not None):
            damage = damage or 'the first process says how'
        return damage

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk, a lost mount or a missing permission is the user's to mend; it may show a save later."""
        try:
            with orbax_errors.plain():
                yield
        except (OSError, ValueError) as error:
            raise UserError(f'{self._directory}: checkpoint not written: {trees.one_line(error)}') from error

    def __enter__(self) -> 'Checkpointer':
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind and jax.process_count() > 1:
            return  # Closing waits for the other processes, which may be gone.
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
            self.close()


class _Policy:
    """Which checkpoints stay, asked by Orbax whenever one is added."""

    def __init__(self, newest: int, every: int, best: str):
        self._newest, self._every, self._best = newest, every, best
        self.scores: dict[int, float | None] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._newest :], *(step for step in steps if self._every and step % self._every == 0)}
        scored = {step: self.scores[step] for step in steps if self.scores.get(step) is not None}
        if self._best and scored:
            limit = max(scored.values()) if self._best == 'max' else min(scored.values())
            kept.add(max(step for step, score in scored.items() if score == limit))
        return [step in kept for step in steps]


def _clear(directory: pathlib.Path) -> None:
    for left in directory.glob(f'*{_LEFT}'):
        shutil.rmtree(left, ignore_errors=True)


def _free(path: pathlib.Path) -> pathlib.Path:
    """The path, or with a number behind it if it is taken."""
    count, free = 1, path
    while free.exists():
        count += 1
        free = path.with_name(f'{path.name}{count}')
    return free


def _say(line: str) -> None:
    say(f'big_vlm: {line}', sys.stderr)


def abstract(tree: Any, shardings: Any = None) -> Any:
    """ShapeDtypeStructs of a pytree, with its own shardings or those given."""
    shardings = jax.tree.map(lambda x: x.sharding, tree) if shardings is None else shardings
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _averages_of_frozen(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """What checkpoints had once: averages of parameters that are not trained. They are read, and left behind."""
    averages = [key for key in stored if key.startswith('ema/') and key not in wanted]
    if not any(key.startswith('ema/') for key in wanted):
        return {}
    like = {key: 'params/' + key.removeprefix('ema/') for key in averages}
    return {key: wanted[of] for key, of in like.items() if of in wanted}
