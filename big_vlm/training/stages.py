"""The stages of a run, one after another: data, task, first weights, training, evaluations, bundle.

    WORKDIR/config.json, tokenizer.model       of the whole run
    WORKDIR/STAGE/checkpoints, metrics.csv, tb, evals.json, predictions_*.jsonl, bundle

A stage whose bundle is there is finished and skipped; one that has a checkpoint goes on from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from big_vlm import bundle, checkpoints, config, tasks
from big_vlm.checkpoints import trees
from big_vlm.config import Stage, UserError
from big_vlm.data import loader, sources, transforms
from big_vlm.data.contract import Contract
from big_vlm.data.coordinates import NUM_LOCATIONS, NUM_SEGMENTS
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.ops import position_resize
from big_vlm.reports import writers
from big_vlm.sharding import mesh as meshes
from big_vlm.training import evaluation, loop, optimizer
from big_vlm.training import step as steps

POSITION = 'img/pos_embedding'
# What may change between two runs in one workdir: where it runs, what is logged, kept and evaluated.
_FREE = ('mesh', 'log_every', 'checkpoint', 'evals')
_FREE_DATA = ('data_dir', 'workers', 'threads', 'prefetch')


def check(stages: Mapping[str, Stage]) -> None:
    """Refuses, before any data is read or a device computes, what the config's schema could not know to be wrong.

    Raises UserError: unknown operations, datasets, variants, metrics, optimizers; rules that miss a parameter; a batch
    that the mesh cannot divide; image slots or weights that do not fit together.
    """
    single = len(stages) == 1
    for name, stage in stages.items():
        where = 'config' if single and name == 'train' else f'config.{name}'
        for key, source in stage.data.sources.items():
            transforms.parse(source.pipeline, where=f'{where}.data.sources.{key}.pipeline')
            sources.check(source.dataset)
        evaluation.check(stage, where)
        mesh = _mesh(stage)
        meshes.check_batch(mesh, stage.batch_size)
        if stage.tokenizer.path:
            vocab_size = Tokenizer.load(stage.tokenizer.path).vocab_size
        else:
            vocab_size = stage.tokenizer.vocab_size + NUM_LOCATIONS + NUM_SEGMENTS
        try:
            task = tasks.make(stage, _draft_contract(stage, vocab_size), mesh)
            shapes = steps.param_shapes(task)
        except UserError as error:
            raise UserError(f'{where}: {error}') from None
        optimizer.make(
            stage.optimizer,
            100,
            shapes,
            batch_size=stage.batch_size,
            examples_per_epoch=100,
            where=f'{where}.optimizer',
        )
        if stage.init_from.path and not pathlib.Path(stage.init_from.path).expanduser().exists():
            raise UserError(
                f'{where}.init_from.path: no folder {stage.init_from.path!r}: name a bundle or a checkpoint'
            )


def run(stages: Mapping[str, Stage], workdir: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Runs all stages that are not finished yet. Returns the bundle of each.

    Raises UserError for whatever a person can mend, `loop.Interrupted` where the run was asked to stop.
    """
    workdir = pathlib.Path(workdir)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        _remember(workdir, stages)
    wait('workdir')
    tokenizers = _tokenizers(workdir, stages)
    bundles = {}
    for name, stage in stages.items():
        folder = workdir / name
        bundles[name] = folder / 'bundle'
        if (bundles[name] / 'bundle.json').is_file():
            say(f'{name}: finished already, {bundles[name]}')
            continue
        run_stage(name, stage, folder, tokenizers[name], bundles)
    return bundles


def run_stage(
    name: str, stage: Stage, folder: pathlib.Path, tokenizer: Tokenizer, bundles: Mapping[str, pathlib.Path]
) -> None:
    """Trains, evaluates and bundles one stage. `bundles`: those of the earlier stages, for `init_from.stage`."""
    began = time.time()
    mesh = _mesh(stage)
    contract = make_contract(stage, tokenizer)
    task = tasks.make(stage, contract, mesh)
    first = jax.process_index() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    wait('stage folder')
    examples = loader.num_examples(stage.data)
    total = loop.total_steps(stage, examples, name)
    shapes = steps.param_shapes(task)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    say(
        f'{name}: {stage.task}, {count:,} parameters, {total:,} steps of {stage.batch_size} examples on '
        f'{mesh.size} {jax.devices()[0].platform} device{"s" if mesh.size > 1 else ""}'
    )
    ds = loader.train_batches(stage.data, contract, tokenizer, stage.batch_size, stage.seed, meshes.data_shard(mesh))

    def batches(start: int) -> loader.Batches:
        return loader.iterate(ds, start, stage.data.threads, stage.data.workers, stage.data.prefetch)

    evaluator = evaluation.Evaluator(stage, task, contract, tokenizer, mesh, folder)
    scores_file = folder / 'evals.json'

    def evaluate(which: str, step: int, state: Any) -> dict[str, float]:
        scores = evaluator(which, state.params if state.ema is None else state.ema)
        if first:
            known = json.loads(scores_file.read_text()) if scores_file.is_file() else {}
            write_text(scores_file, json.dumps(known | {which: scores}, indent=1))
        return {f'{which}/{metric}': entry['score'] for metric, entry in scores.items()}

    writer = writers.MultiWriter(
        *(
            [
                writers.CsvWriter(folder / 'metrics.csv'),
                writers.TensorBoardWriter(folder / 'tb'),
                writers.ProgressWriter(total, name),
            ]
            if first
            else []
        )
    )
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
            initial_params=_initial_params(stage, bundles),
            extra={'contract': contract.to_dict()},
            where=f'config.{name}',
        )
    finally:
        writer.close()
    scores = json.loads(scores_file.read_text()) if scores_file.is_file() else {}
    params = state.params if state.ema is None else state.ema
    bundle.save(folder / 'bundle', params, stage, contract, tokenizer, scores=scores)
    say(f'{name}: done in {(time.time() - began) / 60:.1f} min, {folder / "bundle"}')


def make_contract(stage: Stage, tokenizer: Tokenizer) -> Contract:
    """The contract of a stage's model and tokenizer."""
    return Contract.make(stage.contract, tokenizer, tasks.image_slots(stage), stage.model.decoder.final_softcap)


def _draft_contract(stage: Stage, vocab_size: int) -> Contract:
    """As far as it is known before there is a tokenizer: enough to know every parameter's name."""
    settings = {f.name: getattr(stage.contract, f.name) for f in dataclasses.fields(stage.contract)}
    ids = dict(separator_ids=(), pad_id=0, bos_id=0, eos_id=0, tokenizer_sha256='')
    return Contract(**settings, **ids, image_tokens=tasks.image_slots(stage), vocab_size=vocab_size)


def _mesh(stage: Stage) -> jax.sharding.Mesh:
    return meshes.make_mesh(stage.mesh.data, stage.mesh.fsdp, stage.mesh.model)


def _tokenizers(workdir: pathlib.Path, stages: Mapping[str, Stage]) -> dict[str, Tokenizer]:
    """Given ones are loaded; the stages that have none share one, trained on all their text."""
    file = workdir / 'tokenizer.model'
    untold = {name: stage for name, stage in stages.items() if not stage.tokenizer.path}

    def train() -> None:
        if jax.process_index() == 0 and untold and not file.is_file():
            sections = [(stage.data, stage.contract.lower) for stage in untold.values()]
            texts = (text for data, lower in sections for text in loader.training_texts(data, lower))
            size = max(stage.tokenizer.vocab_size for stage in untold.values())
            made = Tokenizer.train(texts, size, file)
            say(f'tokenizer: {made.vocab_size:,} ids, {file}')

    _one_at_a_time(train)
    given = {name: Tokenizer.load(stage.tokenizer.path) for name, stage in stages.items() if stage.tokenizer.path}
    return given | ({} if not untold else dict.fromkeys(untold, Tokenizer.load(file)))


def _one_at_a_time(prepare: Callable[[], Any]) -> None:
    """Process 0 writes what is missing on disk before the others look."""
    if jax.process_index() == 0:
        prepare()
    wait('prepared')


def _initial_params(stage: Stage, bundles: Mapping[str, pathlib.Path]) -> Callable[[Any], Any] | None:
    """A function from fresh parameters to those of `init_from`; None where everything starts fresh."""
    init = stage.init_from
    if not (init.stage or init.path):
        return None
    folder = bundles[init.stage] if init.stage else pathlib.Path(init.path).expanduser()

    def load(fresh: Any) -> Any:
        params = trees.flat(fresh)
        for ours, theirs in (init.parts or {'': ''}).items():
            below = f'{ours}/' if ours else ''
            wanted = {
                path.removeprefix(below): leaf
                for path, leaf in params.items()
                if path.startswith(below) and not any(re.fullmatch(pattern, path) for pattern in init.fresh)
            }
            if not wanted:
                raise config.unknown('part', ours, {path.split('/')[0] for path in params}, 'init_from.parts')
            loaded = _load(folder, theirs, wanted, POSITION.removeprefix(below), init.resize_position)
            params |= {below + path: leaf for path, leaf in loaded.items()}
        return trees.like(fresh, params)

    return load


def _load(
    folder: pathlib.Path, part: str, wanted: dict[str, jax.Array], position: str, resize: bool
) -> dict[str, jax.Array]:
    """The stored weights of the wanted paths, placed like them; the position embedding resized where it must be."""
    like = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in wanted.items()}
    stored = trees.flat(checkpoints.weight_shapes(folder, part))
    resized = resize and position in like and position in stored and stored[position].shape != like[position].shape
    if resized:
        like[position] = jax.ShapeDtypeStruct(stored[position].shape, wanted[position].dtype)
    loaded = trees.flat(checkpoints.load_weights(folder, trees.nested(like), part))
    if resized:
        side = math.isqrt(wanted[position].shape[1])
        new = np.asarray(position_resize.bilinear(loaded[position], (side, side)))
        loaded[position] = jax.device_put(new, wanted[position].sharding)
    return loaded


def _remember(workdir: pathlib.Path, stages: Mapping[str, Stage]) -> None:
    """Writes the config beside what it makes, and refuses a workdir that another config has begun."""
    file = workdir / 'config.json'
    now = {name: config.to_dict(stage) for name, stage in stages.items()}
    if file.is_file():
        try:
            before = json.loads(file.read_text())
        except ValueError:
            raise UserError(f'{file}: damaged: remove it, or choose another workdir') from None
        changed = [
            key
            for name in now
            if name in before and (workdir / name).is_dir()
            for key in _changes(_binding(before[name]), _binding(json.loads(json.dumps(now[name]))), name)
        ]
        if changed:
            raise UserError(
                f'{workdir} was begun with another config ({"; ".join(changed[:3])}'
                f'{"; …" if len(changed) > 3 else ""}): choose another --workdir, or remove this one'
            )
        now = before | now
    write_text(file, json.dumps(now, indent=1))


def _binding(stage: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in stage.items() if key not in _FREE}
    return kept | {'data': {key: value for key, value in stage['data'].items() if key not in _FREE_DATA}}


def _changes(before: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _changes(before.get(key), now.get(key), f'{path}.{key}')
    elif before != now:
        yield f'{path}: {before!r} → {now!r}'


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file whole."""
    part = path.with_name(path.name + '.part')
    part.write_text(text, encoding='utf-8')
    os.replace(part, path)


def say(line: str) -> None:
    """One line on standard output, from the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)


def wait(name: str) -> None:
    """Until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
