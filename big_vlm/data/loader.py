"""From sources to batches: one Grain MapDataset whose position is the number of global batches consumed.

Global batch `step` is a pure function of the data's config, the seed and `step`: position p = step · batch_size + row
picks a record (a weighted mixture of sources, each shuffled anew every epoch), and the record's random operations draw
from (seed, p). Nothing is dropped: an example that fails is replaced by the next good one of an order drawn from
(seed, p), and the batch says so. Where examples share rows (`packing`), those of a window of p do.
"""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.data import sources, transforms
from big_vlm.data.contract import Contract
from big_vlm.data.failures import NAMED, Failures, is_for_all
from big_vlm.data.packing import Packer
from big_vlm.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

# What becomes part of a batch, if the pipeline makes it.
ARRAYS = ('image', 'image_mask', 'text', 'text_mask', 'segment', 'position', 'mask_ar', 'mask_loss')
ARRAYS += ('patches', 'patch_mask', 'patch_grid', 'grounded', 'grounded_mask', 'global_view', 'local_views', 'mask')
_JUDGED_AFTER = 200  # examples of a source, a tenth of which may fail at once
_ATTEMPTS = 100  # records, to fill one row
_COUNTED = ('examples', 'replaced')

Batch = dict[str, np.ndarray]


@dataclasses.dataclass
class _Part:
    """One source of a mixture, and how it fares in this process."""

    name: str
    source: Any
    pipeline: transforms.Pipeline
    weight: float
    failures: Failures
    cut: int = 0


@dataclasses.dataclass(frozen=True)
class Made:
    """What one example of a batch was made of.

    source: its key in `data.sources`; record: number of the one that it is made of.
    arrays: of the row, as `stack` takes them; example: all that the pipeline made, texts too.
    failures: (record, error) of those that were to be here and failed.
    """

    source: str
    record: int
    arrays: Batch
    example: dict[str, Any]
    failures: tuple[tuple[int, Exception], ...]


def source_names(data: config.Data) -> tuple[str, ...]:
    """Of the sources that have a weight, by the numbers in a batch's `id`."""
    return tuple(name for name, settings in data.sources.items() if settings.weight > 0)


def open_sources(data: config.Data) -> list[_Part]:
    """The sources of a mixture with their pipelines. Raises UserError as `sources.load` and `transforms.parse` do."""
    if not data.sources:
        raise UserError('data.sources is empty: name at least one source')
    parts = []
    for name, settings in data.sources.items():
        pipeline = transforms.parse(settings.pipeline, where=f'data.sources.{name}.pipeline')
        with config.located(f'data.sources.{name}'):
            source = sources.subset(sources.load(settings.dataset, settings.split, data.data_dir), settings.where)
        if settings.weight > 0:
            failures = Failures(f'data.sources.{name}', 'replaced', _JUDGED_AFTER)
            parts.append(_Part(name, source, pipeline, settings.weight, failures))
    if not parts:
        raise UserError('data.sources: every weight is 0')
    return parts


def num_examples(data: config.Data) -> int:
    """Examples of one epoch: the records of all sources that have a weight, however large."""
    return sum(len(part.source) for part in open_sources(data))


def training_texts(data: config.Data, lower: bool = True, records: int = 4000) -> Iterator[str]:
    """What the pipelines make of the sources' text, to train a tokenizer on: of each up to `records`, evenly spaced.

    Raises UserError for a source all of whose records fail.
    """
    for part in open_sources(data):
        good, failure = 0, None
        for index in range(0, len(part.source), max(len(part.source) // records, 1)):
            record = None
            try:
                record = part.source[index]
                texts = list(part.pipeline.texts(record))
            except Exception as error:
                if is_for_all(error, record, part.source):
                    raise UserError(f'data.sources.{part.name}: {error}') from error
                failure = error
                continue  # training counts it and names it
            good += 1
            yield from (text.lower() if lower else text for text in texts)
        if not good:
            raise UserError(f'data.sources.{part.name}: no record has text for a tokenizer, the last one: {failure}')


def train_batches(
    data: config.Data,
    contract: Contract,
    tokenizer: Tokenizer,
    batch_size: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    pack: Packer | None = None,
) -> grain.MapDataset:
    """`ds[step]` is this shard's rows of global batch `step`, for any step from 0 on; resuming is `ds[step:]`.

    Shard (index, count) holds its contiguous part of the B rows, so the shards' batches, put together in order, are the
    batch of shard (0, 1). A batch has the arrays that docs/design.md lists, `id` int32 [b,2] (number of the source,
    record), `replaced` bool [b] and, where there are answers, `cut` bool [b]: did not fit. With `pack`, B examples are
    in B / k rows, and those three have an axis of k more. Raises UserError if count does not divide the rows, or k not
    B; a batch raises it for a source where more than a tenth of the examples fail.
    """
    index, count = shard
    together = pack.settings.examples if pack else 1
    if batch_size % (count * together):
        rows = f' in rows of {together}' if pack else ''
        raise UserError(
            f'batch_size {batch_size}{rows} does not divide among {count} data shards: use a multiple of '
            f'{count * together}'
        )
    load = _LoadBatch(data, contract, tokenizer, batch_size, seed, shard, pack)
    # As many steps as positions fit into a 64-bit integer.
    return grain.MapDataset.range(2**62 // batch_size).map(load)


def train_rows(
    data: config.Data, contract: Contract, tokenizer: Tokenizer, batch_size: int, seed: int
) -> Callable[[int], list[Made]]:
    """Step → the examples of that global batch of `train_batches`, packed or not, each with what it was made of."""
    return _LoadBatch(data, contract, tokenizer, batch_size, seed).made


def shard_rows(batch_size: int, shard: tuple[int, int]) -> range:
    """Of a batch, those of shard (index, count)."""
    index, count = shard
    return range(index * batch_size // count, (index + 1) * batch_size // count)


def _order(parts: list[_Part], seed: int) -> grain.MapDataset:
    """Position → (number of the source, record): every source shuffled each epoch, mixed by weight."""
    seeds = np.random.SeedSequence(seed).generate_state(len(parts))
    orders = [
        grain.MapDataset.range(len(part.source)).map(_Numbered(n)).shuffle(seed=int(seeds[n])).repeat()
        for n, part in enumerate(parts)
    ]
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, [part.weight for part in parts])


@dataclasses.dataclass(frozen=True)
class _Numbered:
    number: int

    def __call__(self, index: int) -> tuple[int, int]:
        return self.number, index


class _LoadBatch:
    """step → batch. Pickles (for worker processes); each process counts its own failures."""

    def __init__(
        self,
        data: config.Data,
        contract: Contract,
        tokenizer: Tokenizer,
        size: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
        pack: Packer | None = None,
    ):
        _let_grain_run()
        self.parts, self.contract, self.tokenizer = open_sources(data), contract, tokenizer
        self.size, self.seed, self.shard, self.pack = size, seed, shard, pack
        self._order = _order(self.parts, seed)
        self._lock = threading.Lock()

    def __call__(self, step: int) -> Batch:
        if self.pack is None:
            return stack([made.arrays for made in self._examples(step, shard_rows(self.size, self.shard))])
        each, window = self.pack.settings.examples, self.pack.settings.window
        count = self.size // each
        mine, rows = shard_rows(count, self.shard), []
        for start in range(mine.start // window * window, mine.stop, window):
            stop = min(start + window, count)
            packed = self.pack([made.arrays for made in self._examples(step, range(start * each, stop * each))])
            rows += packed[max(mine.start - start, 0) : mine.stop - start]
        return stack(rows)

    def made(self, step: int) -> list[Made]:
        """The examples of the batch of a step."""
        return self._examples(step, range(self.size))

    def _examples(self, step: int, numbers: range) -> list[Made]:
        """Those of global batch `step` that have these numbers in it."""
        positions = [int(step) * self.size + number for number in numbers]
        wanted = [self._order[position] for position in positions]
        records = self._read(wanted)
        return [self._example(p, *which, records.get(which)) for p, which in zip(positions, wanted, strict=True)]

    def _read(self, wanted: list[tuple[int, int]]) -> dict[tuple[int, int], dict]:
        """(number of the source, index) → record, read a source at a time: less than half the time of one by one.

        Where one cannot be read, its source's are left out, to be read and judged one by one.
        """
        records = {}
        for number, part in enumerate(self.parts):
            indices = sorted({index for of, index in wanted if of == number})
            with contextlib.suppress(Exception):
                records |= zip([(number, index) for index in indices], part.source.__getitems__(indices), strict=True)
        return records

    def _example(self, position: int, number: int, index: int, record: dict | None) -> Made:
        """`record`: the one at `index` of source `number` if it is read already. Where it fails, others are tried."""
        part = self.parts[number]
        replacements, failures = None, []
        for attempt in range(_ATTEMPTS):
            context = transforms.Context(self.contract, self.tokenizer, train=True, seed=(self.seed, position, attempt))
            origin = part.source.original(index)
            try:
                record = part.source[index] if record is None else record
                example = part.pipeline(record, context)
                made = arrays(example)
                with self._lock:
                    part.failures.good()
            except Exception as error:
                if is_for_all(error, record, part.source):
                    raise UserError(f'data.sources.{part.name}: {error} (record {origin})') from error
                with self._lock:
                    part.failures.bad(origin, error)
                failures.append((origin, error))
                if replacements is None:
                    replacements = np.random.default_rng((self.seed, position))
                index, record = int(replacements.integers(len(part.source))), None
                continue
            made['id'] = np.array([number, origin], np.int32)
            made['replaced'] = np.array(attempt > 0)
            if 'mask_loss' in made:
                made['cut'] = np.array(self._count_cut(part, index, made))
            return Made(part.name, origin, made, example, tuple(failures))
        raise UserError(
            f'data.sources.{part.name}: {_ATTEMPTS} records in a row failed, the last one with: {failures[-1][1]}'
        )

    def _count_cut(self, part: _Part, index: int, example: Batch) -> bool:
        """Whether an example's answer did not fit into its row: such a one does not end."""
        if (example['text'][example['mask_loss'] > 0] == self.contract.eos_id).any():
            return False
        with self._lock:
            part.cut += 1
            cut = part.cut
        if cut <= NAMED:
            more = ' (further ones are only counted)' if cut == NAMED else ''
            record, slots = part.source.original(index), self.contract.text_length
            _log.warning(
                'data.sources.%s: record %d: its answer does not fit into %d text slots and is cut: raise '
                'contract.text_length%s', part.name, record, slots, more,
            )  # fmt: skip
        return True

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != '_lock'}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def arrays(example: dict) -> Batch:
    """The arrays of an example that belong in a batch."""
    found = {key: example[key] for key in ARRAYS if key in example and isinstance(example[key], np.ndarray)}
    if not found:
        raise UserError('the pipeline makes no arrays: it needs decode, and text(…) or tokenize')
    return found


def stack(examples: list[Batch]) -> Batch:
    """Examples → batch. Raises UserError where they differ in keys or shapes."""
    keys = examples[0].keys()
    for example in examples:
        if example.keys() != keys:
            raise UserError(f'the pipelines make different arrays: {sorted(keys)} here, {sorted(example)} there')
        for key in keys:
            if example[key].shape != examples[0][key].shape:
                shapes = f'{list(examples[0][key].shape)} and {list(example[key].shape)}'
                raise UserError(f'{key} has shapes {shapes} in one batch: add resize(…) to the pipeline')
    return {key: np.stack([example[key] for example in examples]) for key in keys}


class Batches:
    """Iterates over a dataset of batches from a position on, loading ahead.

    `replaced` counts the replaced examples of the batches given out so far (this process's rows), `cut` those whose
    answer was cut; None where there are no answers. Where there are several sources, `by_source` counts the examples of
    each, and those replaced.
    """

    def __init__(
        self, ds: grain.MapDataset, start: int, threads: int, workers: int, prefetch: int, names: tuple[str, ...] = ()
    ):
        _let_grain_run()
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
        batches = ds[start:].to_iter_dataset(options)
        if workers:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch))
        self._iterator = iter(batches)
        self.replaced, self.cut = 0, None
        self._names, self._counts = names, np.zeros((len(names), 2), np.int64)

    @property
    def by_source(self) -> dict[str, int]:
        if len(self._names) < 2:
            return {}
        counted = zip(self._names, self._counts.tolist(), strict=True)
        return {f'{what}_of_{name}': n for name, two in counted for what, n in zip(_COUNTED, two, strict=True)}

    def __iter__(self) -> 'Batches':
        return self

    def __next__(self) -> Batch:
        batch = dict(next(self._iterator))
        replaced = batch.pop('replaced')
        self.replaced += int(replaced.sum())
        if self._names:
            np.add.at(self._counts, batch['id'][..., 0], np.stack([np.ones_like(replaced), replaced], -1))
        if 'cut' in batch:
            self.cut = (self.cut or 0) + int(batch.pop('cut').sum())
        return batch


def iterate(
    ds: grain.MapDataset,
    start_step: int = 0,
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 2,
    names: tuple[str, ...] = (),
) -> Batches:
    """Batches from `start_step` on, made ahead by threads, or by worker processes where `workers` > 0.

    `names`: of the sources that are to be counted apart, as `source_names` gives them.
    """
    return Batches(ds, start_step, threads, workers, prefetch, names)


def _let_grain_run() -> None:
    # Grain reads absl flags, which are unparsed outside absl programs.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
