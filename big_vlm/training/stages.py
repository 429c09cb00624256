"""The stages of a run, one after another: data, task, first weights, training, evaluations, bundle.

    WORKDIR/config.json, tokenizer.model       of the whole run
    WORKDIR/STAGE/checkpoints, metrics.csv, tb, evals.json, predictions_*.jsonl, bundle, adapters (of LoRA),
                                               masks.npz (of a mask autoencoder)

A stage whose bundle is there is finished and skipped, but for evaluations that it has no scores of; one that has a
checkpoint goes on from it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from big_vlm import bundle, config, tasks
from big_vlm.config import Stage, UserError
from big_vlm.data import loader, packing, sources, transforms
from big_vlm.data.contract import Contract
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import mask_codes
from big_vlm.reports import writers
from big_vlm.sharding import mesh as meshes
from big_vlm.sharding import rules
from big_vlm.training import (
    accumulation,
    evaluation,
    evaluation_settings,
    initial_state,
    initial_weights,
    loop,
    offloading,
    remembered,
    signals,
    tokenizers,
    workdirs,
)
from big_vlm.training import step as steps
from big_vlm.training.state import TrainState


def check(stages: Mapping[str, Stage]) -> None:
    """Refuses, before any data is read or a device computes, what the config's schema could not know to be wrong.

    Raises UserError: unknown operations, datasets, splits, variants, metrics, optimizers; rules that miss a parameter;
    a batch that the mesh cannot divide; first weights that are not there or do not fit.
    """
    vocab_sizes = tokenizers.vocab_sizes(stages)
    shapes: dict[str, Any] = {}
    states: dict[str, Callable[[], TrainState]] = {}
    for name, stage in stages.items():
        where = workdirs.where(stages, name)
        for key, source in stage.data.sources.items():
            place = f'{where}.data.sources.{key}'
            pipeline = transforms.parse(source.pipeline, where=f'{place}.pipeline')
            pipeline.check_size(stage.contract, where=f'{place}.pipeline')
            sources.check(source.dataset, source.split, stage.data.data_dir, where=place)
        evaluation_settings.check(stage, where)
        if stage.wandb and importlib.util.find_spec('wandb') is None:
            raise UserError(f"{where}.wandb: the package is not here: pip install wandb, or set it to ''")
        with config.located(where):
            mesh = _mesh(stage)
            accumulation.check(mesh, stage.batch_size, stage.accumulate, stage.pack.examples)
            if stage.optimizer.offload:
                offloading.check(mesh)
            task = tasks.make(stage, draft_contract(stage, vocab_sizes[name]), mesh)
            params, stats = steps.init_shapes(task)
            shapes[name] = tasks.weights(params, stats)
        with config.located(f'{where}.mesh.rules'):
            rules.param_shardings(params, mesh, stage.mesh.rules)
        tx, info = loop.make_optimizer(stage, params, loop.any_epoch(stage), where)
        initial_weights.check(stages, shapes, name, where)
        states[name] = functools.partial(steps.abstract_state, task, tx, mesh, **loop.state_options(stage, info))
        if stage.init_from.state:
            init = stage.init_from.stage
            initial_state.check(states[init](), states[name](), f'{where}.init_from: {init}')


def run(stages: Mapping[str, Stage], workdir: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Runs all stages that are not finished yet. Returns the bundle of each.

    Raises UserError for whatever a person can mend; where the run was asked to stop, `loop.Interrupted` in training and
    `signals.Stopped` in evaluations of a stage that is finished.
    """
    workdir = pathlib.Path(workdir)
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            remembered.remember(workdir, stages)
        except OSError as error:
            raise UserError(
                f'--workdir={workdir}: cannot be written ({error.strerror}): name a folder that can'
            ) from error
    meshes.wait('workdir')
    made = tokenizers.make(workdir, stages)
    bundles = {name: workdir / name / 'bundle' for name in stages}
    finished = {name for name in stages if (bundles[name] / 'bundle.json').is_file()}
    for name, stage in stages.items():
        if name not in finished:
            rehearse(stage, made[name], workdirs.where(stages, name))
    for name, stage in stages.items():
        if name in finished:
            workdirs.say(f'{name}: finished already, {bundles[name]}')
            _evaluate_what_is_new(stage, workdir / name, bundles[name], workdirs.where(stages, name))
        else:
            before = stages.get(stage.init_from.stage)
            run_stage(name, stage, workdir / name, made[name], bundles, before, where=workdirs.where(stages, name))
    return bundles


def rehearse(stage: Stage, tokenizer: Tokenizer, where: str) -> None:
    """Makes the first batch of a stage's training and of each of its evaluations, before any stage is trained.

    Raises UserError, with `where`, the stage's dotted key: a field that the records do not have, a condition that none
    meets, a first hundred of records that all fail, a pipeline that does not make what the model takes, a warmup that
    is longer than so many epochs of the data.
    """
    mesh, contract = _mesh(stage), make_contract(stage, tokenizer)
    task = tasks.make(stage, contract, mesh)
    with config.located(where):
        _check_taken(task, _batches(stage, contract, tokenizer, mesh)[0], stage.rows, mesh)
    loop.make_optimizer(stage, steps.param_shapes(task), loader.num_examples(stage.data), where)
    evaluation.Evaluator(stage, task, contract, tokenizer, mesh).rehearse(where)


def _check_taken(task: tasks.Task, batch: loader.Batch, rows: int, mesh: Mesh) -> None:
    """Traces the loss of a batch, which computes nothing. Raises UserError where the two do not fit.

    Also where steps accumulate: then they take embeddings alone, and would leave the rest of a batch aside.
    """
    shapes = {key: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for key, x in batch.items()}
    try:
        with jax.set_mesh(mesh):
            jax.eval_shape(task.loss, *steps.init_shapes(task), shapes, jax.random.key(0))
    except KeyError as error:
        missing = error.args[0]
        if missing in batch or missing not in loader.ARRAYS:
            raise
        raise UserError(
            f'the pipelines make no {missing}, which a {task.kind} model takes, but {", ".join(batch)}'
        ) from error


def run_stage(
    name: str,
    stage: Stage,
    folder: pathlib.Path,
    tokenizer: Tokenizer,
    bundles: Mapping[str, pathlib.Path],
    before: Stage | None = None,
    *,
    mesh: Mesh | None = None,
    where: str = 'config',
) -> None:
    """Trains, evaluates and bundles one stage.

    Args:
      name: of the stage, for what is said.
      stage: validated and checked.
      folder: of the stage.
      tokenizer: of the stage.
      bundles: those of the earlier stages, for `init_from.stage`.
      before: that stage, for `init_from.state`.
      mesh: where to train; None: all devices, as `stage.mesh` says.
      where: the stage's dotted key, for errors.
    """
    began = time.time()
    mesh = _mesh(stage) if mesh is None else mesh
    contract = make_contract(stage, tokenizer)
    task = tasks.make(stage, contract, mesh)
    first = jax.process_index() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    meshes.wait('stage folder')
    begin = _end_of(before, bundles[stage.init_from.stage], stage) if stage.init_from.state else None
    examples = loader.num_examples(stage.data)
    total = loop.total_steps(stage, examples, where)
    params, stats = steps.init_shapes(task)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    workdirs.say(
        f'{name}: {stage.task}, {count:,} parameters, {total:,} steps of {stage.batch_size} examples on '
        f'{mesh.size} {jax.devices()[0].platform} device{"s" if mesh.size > 1 else ""}'
    )
    ds = _batches(stage, contract, tokenizer, mesh)

    def batches(start: int) -> loader.Batches:
        names = loader.source_names(stage.data)
        return loader.iterate(ds, start, stage.data.threads, stage.data.workers, stage.data.prefetch, names)

    evaluator = evaluation.Evaluator(stage, task, contract, tokenizer, mesh, folder)

    def evaluate(which: str, step: int, state: Any) -> dict[str, float]:
        weights = tasks.weights(_trained(stage, state), state.stats)
        # At the end what cannot be written is evaluated once more; before, the run goes on without it.
        scores = _evaluate(evaluator, which, weights, folder, where, must=step == total)
        return {f'{which}/{metric}': entry['score'] for metric, entry in scores.items()}

    writer = writers.MultiWriter(*(_writers(name, stage, folder, total) if first else []))
    try:
        state = loop.train(
            stage,
            task,
            batches,
            folder,
            writer,
            mesh=mesh,
            examples_per_epoch=examples,
            evaluate=evaluate,
            initial_params=initial_weights.make(stage.init_from, bundles, where),
            overwritten=initial_weights.overwritten(stage.init_from, bundles, tasks.weights(params, stats), where),
            initial_state=begin,
            extra={'contract': contract.to_dict()},
            where=where,
        )
    finally:
        writer.close()
    of_run = dict(stats=state.stats, scores=workdirs.scores(folder))
    if stage.task == tasks.MaskAutoencoder.kind:
        gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
        whole = gather(tasks.weights(_trained(stage, state), state.stats))
        if first:
            mask_codes.write(folder / 'masks.npz', whole)
    if stage.lora.rules:
        bundle.adapters.save(folder / 'adapters', _trained(stage, state), stage)
    alone = dataclasses.replace(stage, lora=config.Lora())
    bundle.save(folder / 'bundle', bundle.adapters.merged(_trained(stage, state)), alone, contract, tokenizer, **of_run)
    workdirs.say(f'{name}: done in {(time.time() - began) / 60:.1f} min, {folder / "bundle"}')


def _end_of(before: Stage, path: pathlib.Path, stage: Stage) -> Callable[[TrainState], TrainState]:
    """The first state of a stage that goes on where `before`, whose bundle `path` is, has ended."""
    total = loop.total_steps(before, loader.num_examples(before.data) if before.total.epochs else None)
    return initial_state.make(path.parent / 'checkpoints', total, stage.init_from.resize_method)


def _batches(stage: Stage, contract: Contract, tokenizer: Tokenizer, mesh: Mesh) -> Sequence[loader.Batch]:
    """Step → this process's rows of that batch."""
    settings, shard = (stage.batch_size, stage.seed), meshes.data_shard(mesh)
    return loader.train_batches(stage.data, contract, tokenizer, *settings, shard, packing.packer(stage, contract))


def _writers(name: str, stage: Stage, folder: pathlib.Path, total: int) -> Iterator[writers.Writer]:
    yield writers.CsvWriter(folder / 'metrics.csv')
    yield writers.TensorBoardWriter(folder / 'tb')
    yield writers.ProgressWriter(total, name)
    if stage.wandb:
        yield writers.WandbWriter(stage.wandb, f'{folder.parent.name}/{name}', folder, config.to_dict(stage))


def _trained(stage: Stage, state: TrainState) -> Any:
    """The parameters to evaluate and keep."""
    return state.params if stage.optimizer.ema_use == 'last' else state.averaged


def _evaluate(
    evaluator: evaluation.Evaluator, which: str, params: Any, folder: pathlib.Path, where: str, must: bool = True
) -> evaluation.Scores:
    """Scores of one evaluation, written among those of the stage. `must` as in `whole_file.write_text`."""
    with config.located(f'{where}.evals.{which}'):
        scores = evaluator(which, params, must)
    if jax.process_index() == 0:
        workdirs.write_scores(folder, workdirs.scores(folder) | {which: scores}, must)
    return scores


def _evaluate_what_is_new(stage: Stage, folder: pathlib.Path, path: pathlib.Path, where: str) -> None:
    """The evaluations of a finished stage that have no scores yet, on its bundle. Raises signals.Stopped."""
    new = [which for which in stage.evals if which not in workdirs.scores(folder)]
    if new:
        model = bundle.load(path, mesh=_mesh(stage))
        evaluator = evaluation.Evaluator(stage, model.task, model.contract, model.tokenizer, model.mesh, folder)
        with signals.catch() as stop:
            for which in new:
                _evaluate(evaluator, which, model.params, folder, where)
                if stop.now(agree=True):  # after its last batch, too
                    raise signals.Stopped


def make_contract(stage: Stage, tokenizer: Tokenizer) -> Contract:
    """The contract of a stage's model and tokenizer."""
    softcap, patch_size = stage.model.decoder.final_softcap, tasks.patch_size(stage)
    return Contract.make(stage.contract, tokenizer, tasks.image_slots(stage), softcap, patch_size)


def draft_contract(stage: Stage, vocab_size: int) -> Contract:
    """As far as it is known before there is a tokenizer: enough to know the shapes of every parameter and batch."""
    settings = {f.name: getattr(stage.contract, f.name) for f in dataclasses.fields(stage.contract)}
    ids = dict(separator_ids=(), pad_id=0, bos_id=0, eos_id=0, tokenizer_sha256='')
    made = dict(image_tokens=tasks.image_slots(stage), patch_size=tasks.patch_size(stage))
    return Contract(**settings, **ids, **made, vocab_size=vocab_size)


def _mesh(stage: Stage) -> Mesh:
    return meshes.make_mesh(stage.mesh.data, stage.mesh.fsdp, stage.mesh.model)
