"""The training loop: evaluate, save, fetch, step, log.

A run that was killed goes on from its newest checkpoint and repeats every later step bit for bit: the batch, the random
keys and the schedules follow from the step alone. One that has gone astray may go back in the same way, to a checkpoint
from before; the data goes on.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from big_vlm import tasks
from big_vlm.checkpoints import Checkpointer, trees
from big_vlm.config import Stage, UserError, unknown
from big_vlm.data import loader
from big_vlm.sharding import mesh as meshes
from big_vlm.training import (
    accumulation,
    guards,
    memory,
    optimizer,
    profile,
    remembered,
    schedules,
    signals,
    throughput,
    workdirs,
)
from big_vlm.training import step as steps
from big_vlm.training.log import Log, Writer
from big_vlm.training.past import Past
from big_vlm.training.state import TrainState

ROLLBACKS = 'rollbacks'


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state at `step`."""

    def __init__(self, step: int):
        super().__init__(f'stopped and saved at step {step}; the same command goes on from there')
        self.step = step


def total_steps(stage: Stage, examples_per_epoch: int | None = None, where: str = 'config') -> int:
    """The stage's length. Raises UserError, also where it rounds to nothing, or ends before the steps to be traced."""
    total = schedules.steps(
        stage.total, batch_size=stage.batch_size, examples_per_epoch=examples_per_epoch, where=f'{where}.total'
    )
    if total < 1:
        raise UserError(f'{where}.total: less than one step')
    if stage.profile[0] > total:
        raise UserError(
            f'{where}.profile: step {stage.profile[0]} is behind the last one, {total}: trace earlier steps'
        )
    return total


def make_optimizer(
    stage: Stage, param_shapes: Any, examples_per_epoch: int | None, where: str = 'config'
) -> tuple[optax.GradientTransformation, optimizer.Info]:
    """`optimizer.make` of a stage as long as `total_steps`. Raises UserError as they do."""
    return optimizer.make(
        stage.optimizer,
        total_steps(stage, examples_per_epoch, where),
        param_shapes,
        batch_size=stage.batch_size,
        examples_per_epoch=examples_per_epoch,
        train=stage.lora.train,
        where=f'{where}.optimizer',
    )


def any_epoch(stage: Stage) -> int:
    """Examples of an epoch before there is data: so many that no part of the stage's length is too long for it."""
    return 2**30 if stage.total.epochs else 1


def train(
    stage: Stage,
    task: steps.Task,
    batches: Callable[[int], Iterable[Mapping[str, np.ndarray]]],
    workdir: str | pathlib.Path,
    writers: Writer,
    *,
    mesh: Mesh,
    examples_per_epoch: int | None = None,
    evaluate: Callable[[str, int, TrainState], Mapping[str, float]] | None = None,
    initial_params: Callable[[Any], Any] | None = None,
    overwritten: Collection[str] = (),
    initial_state: Callable[[TrainState], TrainState] | None = None,
    extra: dict[str, Any] | None = None,
    where: str = 'config',
) -> TrainState:
    """Trains one stage from its start or its newest checkpoint to its end.

    Args:
      stage: validated.
      task: gives init, loss and flops_per_example.
      batches: first step → this process's numpy batches from there on. The attributes `replaced`, `cut` and `by_source`
        of the iterator (`loader.Batches`) become metrics.
      workdir: the stage's folder; checkpoints go to `workdir`/checkpoints.
      writers: take the metrics, float by name; rows of steps and evaluations that will be repeated are taken back by
        `rewind`.
      mesh: where everything lives.
      examples_per_epoch: for durations in epochs.
      evaluate: (name in `stage.evals`, step, state) → metrics; called when due, before the state is saved. A step that
        was evaluated before the checkpoint is not evaluated again on restart. Where it raises signals.Stopped, the
        state is saved, and all that is due is evaluated on restart.
      initial_params: fresh parameters and running statistics → those to start from, placed alike. Not called when a
        checkpoint is there.
      overwritten: paths of the parameters that `initial_params` makes no use of; they reach it as zeros.
      initial_state: abstract state → the one to start from; in the place of both.
      extra: goes into every checkpoint and must be found unchanged in the one that the run goes on from.
      where: the stage's dotted key, for errors.

    Returns:
      The state after the last step.

    Raises:
      UserError: a config the optimizer refuses, a checkpoint of another run, too many losses that are not finite.
      Interrupted: after SIGTERM or Ctrl-C, once the state is saved.
    """
    accumulation.check(mesh, stage.batch_size, stage.accumulate, stage.pack.examples)
    total = total_steps(stage, examples_per_epoch, where)
    tx, info = make_optimizer(stage, steps.param_shapes(task), examples_per_epoch, where)
    extra = {**(extra or {}), 'seed': stage.seed, 'batch_size': stage.batch_size}
    watchdog = guards.Watchdog(stage.guards.watchdog_minutes)
    tracing = profile.capture(pathlib.Path(workdir) / 'profile', stage.profile)
    with _checkpointer(stage, workdir) as saver, signals.catch() as stop, watchdog, tracing as trace:
        state, past = _start(stage, task, tx, info, mesh, saver, initial_params, overwritten, extra, initial_state)
        train_step = make_step(stage, task, tx, info, mesh, state)
        peak = throughput.peak_flops(mesh)
        memory_told = False

        def go_on(state: TrainState, past: Past) -> TrainState:
            """To the end: evaluate, save, fetch, step, log."""
            nonlocal memory_told
            first = int(state.step)
            bad = guards.BadBatches(
                pathlib.Path(workdir) / 'bad_batches.jsonl',
                loader.source_names(stage.data),
                stage.guards.bad_steps,
                past.updates_skipped,
                past.bad_row,
                past.left_behind,
            )
            spikes = guards.Spikes(stage.guards.spike, stage.guards.spike_steps, past.losses, past.spike_row)
            log = Log(writers, throughput.Meter(stage.batch_size, task.flops_per_example, peak), bad, spikes, watchdog)
            postponed = [] if past.evaluated or not evaluate else _due(stage, first, total)
            writers.rewind(first, again=postponed)
            bad.rewind(first)
            source = iter(batches(first + past.left_behind)) if first < total else iter(())

            for step in range(first, total + 1):
                stopping = stop.now(agree=step % stage.log_every == 0 or step == total)
                due = postponed if step == first else _due(stage, step, total) if evaluate else []
                due = [] if stopping else due
                save = step == total or stopping or (step > first and step % stage.checkpoint.every == 0)
                if due or save:
                    with log.pause():
                        scores: dict[str, float] = {}
                        score = None
                        try:
                            for name in due:
                                if stop.now(agree=True):
                                    raise signals.Stopped
                                made = evaluate(name, step, state)
                                log.write(step, made)
                                scores |= made
                            score = _score(stage, scores, due, f'{where}.checkpoint.best')
                        except signals.Stopped:
                            save = stopping = True
                        except Exception:
                            # It must not cost the steps since the last checkpoint. Of several processes another one may
                            # not have failed, and would not save.
                            if jax.process_count() == 1:
                                saver.save(
                                    step, state, {**extra, **past.now(bad, spikes, False, source, mesh).to_dict()}
                                )
                                saver.wait()
                            raise
                        if save or score is not None:
                            now = past.now(bad, spikes, not stopping, source, mesh)
                            saver.save(step, state, {**extra, **now.to_dict()}, score)
                if step == total:
                    # What catches signals ends here: one that came meanwhile must not start a next stage.
                    saver.wait()
                    stopping = stopping or stop.now(agree=True)
                if stopping:
                    saver.wait()
                    raise Interrupted(step)
                if step == total:
                    break
                batch, ids = _fetch(source, step, mesh, log)
                show = _shown(stage, step + 1, total)
                metrics = past.counted(source, mesh) if show else {}
                if stage.guards.rollbacks:
                    metrics[ROLLBACKS] = len(past.rollbacks)
                if not memory_told:
                    _tell_memory(train_step, state, batch, info, workdir)
                    memory_told = True
                trace.before(step + 1)
                state, computed = train_step(state, batch)
                log.step(step + 1, metrics | computed, ids, show)
                if trace.is_last(step + 1):
                    log.flush()
                    trace.end()
            log.flush()
            return state

        while True:
            try:
                return go_on(state, past)
            except guards.Astray as astray:
                rollbacks = _go_back(astray, past, saver, stage.guards.rollbacks)
            # Only here, where the state that went astray is no longer held by what was raised.
            state, past = _start(stage, task, tx, info, mesh, saver, None, (), extra)
            past = dataclasses.replace(past, rollbacks=rollbacks)


def state_options(stage: Stage, info: optimizer.Info) -> dict[str, Any]:
    """Those of `step.abstract_state` and `step.init_state`."""
    averaged = info.trainable if stage.optimizer.ema_decay else None
    return dict(averaged=averaged, offload=stage.optimizer.offload, own_rules=stage.mesh.rules)


def make_step(
    stage: Stage,
    task: steps.Task,
    tx: optax.GradientTransformation,
    info: optimizer.Info,
    mesh: Mesh,
    state: TrainState,
) -> steps.TrainStep:
    """The step that `train` takes; arguments as those of `step.make_train_step`."""
    average = dict(ema_decay=stage.optimizer.ema_decay, ema_warmup=stage.optimizer.ema_warmup)
    options = dict(accumulate=stage.accumulate, skip=stage.guards.bad_steps > 0, **average)
    return steps.make_train_step(task, tx, info, mesh, state, stage.seed, **options)


def _tell_memory(
    train_step: steps.TrainStep, state: TrainState, batch: Any, info: optimizer.Info, workdir: Any
) -> None:
    """One line about what the step needs, and another if that is more than there is. The step stays compiled."""
    parts = memory.parts(state, batch, info.trainable)
    peak = memory.peak(train_step.lower(state, batch).compile())
    estimate = memory.Estimate(parts, peak, memory.limit(train_step.mesh), memory.offloaded(state))
    workdirs.say(f'{pathlib.Path(workdir).name}: {estimate.line}')
    if estimate.warning:
        guards.say(f'{pathlib.Path(workdir).name}: {estimate.warning}')


def _checkpointer(stage: Stage, workdir: str | pathlib.Path) -> Checkpointer:
    settings = stage.checkpoint
    return Checkpointer(
        pathlib.Path(workdir) / 'checkpoints',
        settings.keep,
        keep_every=settings.keep_every,
        best=settings.best_is if settings.best else '',
        scored=remembered.scored(stage),
        grace=settings.grace,
    )


def _score(stage: Stage, scores: Mapping[str, float], due: Collection[str], where: str) -> float | None:
    """What `checkpoint.best` goes by; None where it was not evaluated."""
    best = stage.checkpoint.best
    if best in scores or best.partition('/')[0] not in due:
        return scores.get(best)
    raise unknown('metric', best, scores, where)


def _start(
    stage: Stage,
    task: steps.Task,
    tx: optax.GradientTransformation,
    info: optimizer.Info,
    mesh: Mesh,
    saver: Checkpointer,
    initial_params: Callable[[Any], Any] | None,
    overwritten: Collection[str],
    extra: dict[str, Any],
    initial_state: Callable[[TrainState], TrainState] | None = None,
) -> tuple[TrainState, Past]:
    """Of the newest checkpoint, or of the beginning."""
    options = state_options(stage, info)
    if saver.latest_step() is not None:
        state, stored = saver.restore(steps.abstract_state(task, tx, mesh, **options))
        now = _as_json(extra)
        # An older checkpoint does not say what its contract has said since; its workdir's config does.
        lacking = {key: now[key] | stored[key] for key in now if isinstance(now[key], dict) and key in stored}
        if changes := remembered.told(remembered.changes({key: stored.get(key) for key in now} | lacking, now)):
            raise UserError(
                f'{saver.directory}: its checkpoint was made with another config ({changes}): keep it as it was, or '
                'choose another workdir'
            )
        return state, Past.from_dict(stored)
    if initial_state is not None:
        return initial_state(steps.abstract_state(task, tx, mesh, **options)), Past()
    state = steps.init_state(task, tx, mesh, stage.seed, zeros=overwritten, **options)
    if initial_params is not None:
        weights = trees.flat(initial_params(tasks.weights(state.params, state.stats)))
        params, stats = (trees.like(part, trees.flat(part) | weights) for part in (state.params, state.stats))
        ema = jax.tree.map(jax.numpy.copy, steps.first_averages(options['averaged'], params))
        state = TrainState(state.step, params, stats, state.opt_state, ema)
    return state, Past()


def _go_back(astray: guards.Astray, past: Past, saver: Checkpointer, most: int) -> tuple[tuple[int, int], ...]:
    """All roll-backs including the one to before it went astray; raises what it is given where there is none.

    The data goes on behind the batch that was too much. A run killed before it saves again comes this way again: what
    led here is in its checkpoint.
    """
    number = len(past.rollbacks) + 1
    if number > most:
        raise UserError(f'{astray}; {most} roll-backs did not help') if most else astray
    step = saver.go_back(astray.since)
    if step is None:
        raise UserError(
            f'{astray}. There is no checkpoint from before it to go back to: raise checkpoint.keep, or '
            'lower checkpoint.every'
        )
    guards.say(
        f'{astray.what}: back to the checkpoint of step {step}, past the {astray.step - step} batches since; roll-back '
        f'{number} of {most}'
    )
    return (*past.rollbacks, (astray.step, step))


def _as_json(value: Any) -> Any:
    """What JSON makes of tuples."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _due(stage: Stage, step: int, total: int) -> list[str]:
    """Evaluations of this step: all at the end, else those whose turn it is; none before the first step."""
    return [name for name, e in stage.evals.items() if step == total or (e.every and step and step % e.every == 0)]


def _shown(stage: Stage, step: int, total: int) -> bool:
    """Steps whose metrics are written. The same ones in a run that was cut off."""
    return step % stage.log_every == 0 or step in (1, total)


def _fetch(
    source: Iterator[Mapping[str, np.ndarray]], step: int, mesh: Mesh, log: Log
) -> tuple[Any, np.ndarray | None]:
    """(the batch on the devices, the ids of this process's examples)."""
    with log.waiting():
        batch = next(source, None)
    if batch is None:
        raise UserError(f'the training data ended before step {step}: its sources must repeat for ever')
    ids = batch.get('id')
    return meshes.put_batch(batch, mesh), None if ids is None else ids.reshape(-1, ids.shape[-1])
