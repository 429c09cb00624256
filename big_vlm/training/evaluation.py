"""The evaluations that a stage's config names, run on parameters: before the end, at the end, and by whoever asks."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from big_vlm.config import Eval, Stage, UserError, located
from big_vlm.data import eval_loader, fields, prompts, sources, transforms
from big_vlm.data.contract import Contract
from big_vlm.data.failures import Failures
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.decoding import choices as tries
from big_vlm.decoding import constraints
from big_vlm.decoding.generate import make_generate
from big_vlm.decoding.scoring import make_score
from big_vlm.evaluators import (
    answer_metrics,
    calibration,
    generation,
    linear_probe,
    perplexity,
    reconstruction,
    retrieval,
    zero_shot,
)
from big_vlm.evaluators.scores import Scores, field, with_unreadable
from big_vlm.metrics.text import exact_match
from big_vlm.sharding import mesh as meshes
from big_vlm.tasks import Task
from big_vlm.training import signals
from big_vlm.training.evaluation_settings import NEEDS, TAKEN_BY


class Evaluator:
    """Runs a stage's evaluations; compiles each of its programs once, however often it is asked.

    Args:
      stage, task, contract, tokenizer, mesh: of the training run, or of a bundle.
      predictions: folder for `predictions_NAME.jsonl` of generations and `calibration_NAME.json`; None writes none.
    """

    def __init__(
        self,
        stage: Stage,
        task: Task,
        contract: Contract,
        tokenizer: Tokenizer,
        mesh: Mesh,
        predictions: pathlib.Path | None = None,
    ):
        self.stage, self.task, self.contract, self.tokenizer, self.mesh = stage, task, contract, tokenizer, mesh
        self.predictions = predictions
        self._compiled: dict[Any, Any] = {}
        self._failures: list[Failures] = []  # of the sources that were read

    def __call__(self, name: str, params: Any, must: bool = True) -> Scores:
        """Scores of `stage.evals[name]`; prints each beside its chance level.

        Every process of a run calls this and gets the same scores. Records that cannot be read are in none of them,
        and counted; UserError if those are more than a tenth. With `must=False` the answers beside them that the disk
        refuses are no error. Raises signals.Stopped between two batches, once the run is asked to stop.
        """
        self._failures.clear()
        scores = self._run(name, self.stage.evals[name], params, must)
        return with_unreadable(name, scores, sum(failures.failed for failures in self._failures))

    def _run(self, name: str, settings: Eval, params: Any, must: bool) -> Scores:
        with jax.set_mesh(self.mesh):
            if settings.kind == 'zero_shot':
                return zero_shot.run(
                    lambda batch: self._embed('embed_image', params, batch),
                    lambda texts: self._embed_texts(params, texts),
                    self.batches(settings),
                    settings.templates,
                    settings.classes,
                    settings.label,
                    slices=settings.slices,
                    title=name,
                )
            if settings.kind == 'retrieval':
                return retrieval.run(
                    lambda batch: self._embed('embed_image', params, batch),
                    lambda texts: self._embed_texts(params, texts),
                    self.batches(settings, examples=0),
                    settings.label,
                    examples=settings.examples,
                    title=name,
                )
            if settings.kind == 'linear_probe':
                return linear_probe.run(
                    lambda batch: self._embed('embed_image', params, batch),
                    self.batches(dataclasses.replace(settings, split=settings.fit_split, examples=0)),
                    self.batches(settings),
                    settings.label,
                    settings.shots,
                    slices=settings.slices,
                    title=name,
                )
            if settings.kind == 'perplexity':
                return perplexity.run(
                    self._predict_truths(params),
                    self.batches(settings),
                    slices=settings.slices,
                    title=name,
                )
            if settings.kind == 'reconstruction':
                return reconstruction.run(self._reconstruct(params), self.batches(settings), title=name)
            folder = self.predictions if jax.process_index() == 0 else None
            if settings.kind == 'calibration':
                return calibration.run(
                    self._confident(settings, params),
                    self.allowed(dataclasses.replace(settings, split=settings.fit_split)),
                    self.allowed(settings),
                    path=folder and folder / f'calibration_{name}.json',
                    must=must,
                    title=name,
                )
            say = self._generate(settings, params)
            return generation.run(
                lambda batch: say(batch)[0],
                self.allowed(settings),
                [answer_metrics.metric(metric, codes=settings.codes) for metric in settings.metrics],
                truth_field=settings.answers or 'suffix',
                slices=settings.slices,
                predictions_path=folder and folder / f'predictions_{name}.jsonl',
                must=must,
                title=name,
            )

    def rehearse(self, where: str) -> None:
        """Makes the first batch of every evaluation: what could not be evaluated is refused before it is trained.

        Raises UserError, with `where`, the stage's dotted key: a field that the records do not have, or with several
        values where one is meant, too few true answers for a metric, a first hundred of records of which none is good.
        """
        for name, settings in self.stage.evals.items():
            splits = (settings.split, *((settings.fit_split,) if settings.fit_split else ()))
            with located(f'{where}.evals.{name}'):
                for part in (dataclasses.replace(settings, split=split) for split in splits):
                    for record in next(self.allowed(part), ({}, []))[1]:
                        classes = (settings.label,) if settings.kind in ('zero_shot', 'linear_probe') else ()
                        for key in (*classes, *settings.slices):
                            _check_one(key, field(record, key))
                        if settings.kind == 'generation':
                            _check_people(settings, generation.truth_of(record, settings.answers or 'suffix'))

    def batches(
        self, settings: Eval, examples: int | None = None
    ) -> Iterator[tuple[dict[str, np.ndarray], list[dict]]]:
        """(batch, records) of an evaluation, `examples` of it if given; every process gets all of them."""
        source = sources.subset(
            sources.load(settings.dataset, settings.split, self.stage.data.data_dir), settings.where
        )
        total, count = len(source), settings.examples if examples is None else examples
        # A report that draws a few of them forgives what the evaluation did.
        of = min(max(count, settings.examples), total) if count and settings.examples else total
        failures = Failures(source.name, 'left out', of)
        self._failures.append(failures)
        for batch in eval_loader.eval_batches(
            source,
            transforms.parse(settings.pipeline, where='pipeline'),
            self.contract,
            self.tokenizer,
            self._batch_size(settings.batch_size),
            count,
            check=lambda record: self._check(settings, record),
            failures=failures,
            anywhere=lambda failed: meshes.anywhere(failed, self.mesh),
        ):
            signals.check()
            yield batch

    def _check(self, settings: Eval, record: dict) -> None:
        """Refuses a record that the evaluation can make nothing of: UserError as of all, or ValueError, of this one."""
        _check_fields(settings, record)
        if settings.kind == 'perplexity' and not str(field(record, 'suffix')).strip():
            raise ValueError('the true answer is empty')
        if settings.choices_field:
            choices = self._choices(settings, record)
            try:
                self._table(settings, [choices])
                if settings.kind == 'calibration':
                    calibration.of_choices(np.zeros(len(choices)), choices, field(record, 'suffix'))
            except UserError as error:
                raise ValueError(str(error)) from None

    def allowed(self, settings: Eval) -> Iterator[tuple[dict[str, np.ndarray], list[dict]]]:
        """`batches`, with the answers that each row may give (`decoding.choices`), where the settings restrict them."""
        for batch, records in self.batches(settings):
            if settings.choices or settings.choices_field:
                sets = [self._choices(settings, record) for record in records]
                sets += sets[:1] * (len(batch['segment']) - len(sets))
                batch[tries.KEY] = self._table(settings, sets)
            yield batch, records

    def _choices(self, settings: Eval, record: dict) -> list[str]:
        if not settings.choices_field:
            return list(settings.choices)
        return fields.texts(field(record, settings.choices_field), settings.choices_field)

    def _table(self, settings: Eval, sets: list[list[str]]) -> np.ndarray:
        limit, lower = settings.max_new_tokens, self.contract.lower
        return constraints.table(
            self.tokenizer, sets, rows=len(sets), limit=limit, lower=lower, labels=bool(settings.grammar)
        )

    def _batch_size(self, size: int = 0) -> int:
        """`size`, 0 for the stage's, rounded up to what the mesh divides."""
        shards = meshes.data_parts(self.mesh)
        return -(-(size or self.stage.batch_size) // shards) * shards

    def _reconstruct(self, params: Any) -> Any:
        """batch → float32 [B,64,64], what its masks' codes decode to."""
        encode, decode = self.task.predict['encode'], self.task.predict['decode']
        run = self._once('reconstruct', lambda: jax.jit(lambda weights, batch: decode(weights, encode(weights, batch))))
        return lambda batch: _on_host(run(params, self._put({'mask': batch['mask']})))

    def _embed(self, name: str, params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
        run = self._once(name, lambda: jax.jit(self.task.predict[name]))
        names = ('image', 'patches', 'patch_mask', 'patch_grid', 'text', 'text_mask')
        arrays = {key: batch[key] for key in names if key in batch}
        return _on_host(run(params, self._put(arrays)))

    def _embed_texts(self, params: Any, texts: list[str]) -> np.ndarray:
        rows = [text.lower() if self.contract.lower else text for text in texts]
        rows = [prompts.contrastive_text(self.tokenizer.encode(text), self.contract) for text in rows]
        size = self._batch_size()
        parts = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            some = some + [some[0]] * (size - len(some))
            batch = {'text': np.stack([row for row, _ in some]), 'text_mask': np.stack([mask for _, mask in some])}
            parts.append(self._embed('embed_text', params, batch))
        return np.concatenate(parts)[: len(rows)]

    def _generate(self, settings: Eval, params: Any) -> Any:
        """batch → (texts, log-probabilities float32 [B])."""
        # As long as the longest of all evaluations: one program serves them all.
        takers = TAKEN_BY['max_new_tokens']
        longest = max(e.max_new_tokens for e in self.stage.evals.values() if e.kind in takers)
        run = self._once(
            'generate',
            lambda: make_generate(
                self.task.predict, max_new_tokens=longest, eos_id=self.contract.ends, pad_id=self.contract.pad_id
            ),
        )
        weights, limit = self.task.predict['decode_params'](params), settings.max_new_tokens
        restricted = bool(settings.choices or settings.choices_field)
        processors = constraints.processors(self.tokenizer, settings.grammar, choices=restricted, limit=limit)

        def say(batch: dict[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
            out = run(weights, self._put(batch), processors=processors, limit=limit)
            ids, lengths = _on_host(out.ids), _on_host(out.length)
            rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
            texts = [self.tokenizer.decode([i for i in row if i not in self.contract.ends]) for row in rows]
            return texts, _on_host(out.log_probs).sum(axis=1)

        return say

    def _score(self, params: Any) -> Any:
        """(batch, table int32 [R, A, M] of its R real rows' choices) → float32 [R, A, M], see `decoding.scoring`."""
        run = self._once('score', lambda: make_score(self.task.predict))
        weights = self.task.predict['decode_params'](params)

        def score(batch, table):
            filling = np.repeat(table[:1], len(batch['segment']) - len(table), axis=0)
            return _on_host(run(weights, self._put(batch | {tries.KEY: np.concatenate([table, filling])})))[
                : len(table)
            ]

        return score

    def _predict_truths(self, params: Any) -> Any:
        """(batch, records) → (ids, log-probabilities) of the true answer to each record."""
        score = self._score(params)

        def predict(batch, records):
            table = constraints.table(self.tokenizer, [[field(r, 'suffix')] for r in records], rows=len(records))
            parts = zip(table[:, 0], score(batch, table)[:, 0], strict=True)
            return [(ids[ids >= 0].tolist(), values[ids >= 0]) for ids, values in parts]

        return predict

    def _confident(self, settings: Eval, params: Any) -> Any:
        """(batch, records) → the answer to each record, as confident as the model is."""
        if settings.choices or settings.choices_field:
            score = self._score(params)

            def choose(batch, records):
                totals = score(batch, batch[tries.KEY][: len(records)]).sum(axis=2)
                sets = [self._choices(settings, record) for record in records]
                pairs = zip(totals, sets, records, strict=True)
                return [calibration.of_choices(row[: len(c)], c, field(r, 'suffix')) for row, c, r in pairs]

            return choose
        say = self._generate(settings, params)

        def answer(batch, records):
            triples = zip(*say(batch), records, strict=False)  # what follows the records is filling
            return [calibration.of_answer(p, bool(exact_match(text, field(r, 'suffix')))) for text, p, r in triples]

        return answer

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch that every process has whole → global arrays."""
        sharding = meshes.batch_sharding(self.mesh)
        return {
            key: jax.make_array_from_callback(value.shape, sharding, lambda index, value=value: value[index])
            for key, value in batch.items()
        }

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._compiled:
            self._compiled[key] = make()
        return self._compiled[key]


def _on_host(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def _check_fields(settings: Eval, record: dict) -> None:
    """Refuses a record without a truth, or without another field that the evaluation takes."""
    truths = {
        'generative': ('prefix', settings.answers or 'suffix'),
        'contrastive': (settings.label,),
        'mask_autoencoder': (),
    }[NEEDS[settings.kind]]
    for key in truths:
        generation.truth_of(record, key)
    for key in (*settings.slices, *((settings.choices_field,) if settings.choices_field else ())):
        field(record, key)


def _check_one(name: str, value: Any) -> None:
    if isinstance(value, list | tuple | dict) or np.ndim(value):
        raise UserError(f'{name} has several values in one example: take one in the pipeline, first("{name}", "one")')


def _check_people(settings: Eval, truths: str | list[str]) -> None:
    count = 1 if isinstance(truths, str) else len(truths)
    for name in settings.metrics:
        if count < (needed := answer_metrics.METRICS[name].people):
            raise UserError(
                f'metrics: {name} compares with the answers of {needed} people or more, and an example has {count}: '
                'set answers to the column of them, or choose exact_match'
            )
