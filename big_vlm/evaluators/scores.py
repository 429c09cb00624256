"""What every evaluator returns, how it is cut up, and how it is printed.

    {name: {'score': float, 'low': float, 'high': float, 'chance': float, 'n': int}}

`score` is that of `n` examples; 95 of 100 other samples of as many would score between `low` and `high` (bootstrap,
percentiles, seeded); `chance` is what a model that sees no image (or guesses) would get for the same examples. Where an
interval takes too long, or chance means nothing, they are not there. Names of slices read 'accuracy/held_out=True':
the metric, then field=value. Where less is better, as of an error, the entry says so: 'lower_is_better': True. Where
records could not be read, and so are in no score, 'unreadable' says how many, in the entries that are of no slice.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from big_vlm.config import UserError, say
from big_vlm.metrics import bootstrap

Scores = dict[str, dict[str, float | int]]


def real_rows(batch: Mapping[str, Any], records: Sequence[dict]) -> list[tuple[int, dict]]:
    """The rows of an evaluation batch that are not padding, each with its record.

    Args:
      batch: may hold `_mask` bool [B], False on padded rows; without it every row counts.
      records: one per row, or one per real row in order.
    """
    if '_mask' not in batch:
        return list(enumerate(records))
    mask = np.asarray(batch['_mask'], bool)
    rows = np.flatnonzero(mask).tolist()
    if len(records) == len(mask):
        return [(row, records[row]) for row in rows]
    if len(records) != len(rows):
        raise ValueError(f'{len(records)} records for a batch of {len(mask)} rows, {len(rows)} of them real')
    return list(zip(rows, records, strict=True))


def field(record: Mapping[str, Any], name: str) -> Any:
    """A record's field, or column ('captions/text'), as a plain Python value (bytes become text).

    Raises UserError if it is not there, ValueError where it lacks the one within, as this record's may alone.
    """
    first, *within = name.split('/')
    if first not in record:
        raise UserError(f'the evaluation needs field {name!r}, but its records have {sorted(record)}')
    value = record[first]
    for key in within:
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f'no {key!r} in it for {name}')
        value = value[key]
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    return value.decode('utf-8') if isinstance(value, bytes) else value


def finite(embeddings: Any, what: str) -> np.ndarray:
    """Embeddings [N, E] as float32 on the host. UserError if one is not finite: it would rank like any other."""
    embeddings = np.asarray(embeddings, np.float32)
    if not np.isfinite(embeddings).all():
        raise UserError(f'the {what} embeddings hold NaN or infinity: training diverged, or the weights are damaged')
    return embeddings


def score(values: Sequence[float], chance: Sequence[float] | float) -> dict[str, float | int]:
    """Mean of values [N] beside the mean of their chance levels ([N] or one number). UserError if N is 0."""
    return total(np.asarray(values, np.float64), np.mean, float(np.mean(chance)) if len(values) else None)


def total(
    parts: np.ndarray, of: Callable[[np.ndarray], float], chance: float | None, *, intervals: bool = True
) -> dict[str, float | int]:
    """The score `of` what N examples contribute, parts [N, …], with its interval and chance. UserError if N is 0."""
    if not len(parts):
        raise UserError('nothing to evaluate: no example passed the `where` of the pipeline (or the split is empty)')
    entry: dict[str, float | int] = {'score': float(of(parts))}
    if intervals:
        entry['low'], entry['high'] = bootstrap.interval(len(parts), lambda rows: of(parts[rows]))
    if chance is not None:
        entry['chance'] = chance
    return entry | {'n': len(parts)}


def sliced(
    name: str,
    records: Sequence[dict],
    slices: Sequence[str],
    measure: Callable[[np.ndarray], dict[str, float | int]],
) -> Scores:
    """A score over all examples, then one for every value of every slice field.

    Args:
      name: the metric's name.
      records: N records, one per example.
      slices: record fields to cut by, one at a time.
      measure: indices int [n] into the examples -> their score. Chance is worked out anew on each slice, so it is the
        bar for that slice alone.
    """
    scores = {name: measure(np.arange(len(records)))}
    for key in slices:
        values = [field(record, key) for record in records]
        for value in sorted(set(values), key=str):
            indices = np.array([i for i, other in enumerate(values) if other == value])
            scores[f'{name}/{key}={value}'] = measure(indices)
    return scores


def with_unreadable(title: str, scores: Scores, count: int) -> Scores:
    """The scores with `unreadable`, how many records are in none of them because they failed. Prints it too."""
    if not count:
        return scores
    say(f'{title}  {count} record{"s" if count > 1 else ""} left out: unreadable')
    return {name: entry if '=' in name else entry | {'unreadable': count} for name, entry in scores.items()}


def print_scores(title: str, scores: Scores) -> None:
    """One line per score on standard output, its interval and chance beside it."""
    width = max(map(len, scores), default=0)
    for name, entry in scores.items():
        interval = f' [{entry["low"]:.4f}, {entry["high"]:.4f}]' if 'low' in entry else ''
        chance = f'chance {entry["chance"]:.4f}, ' if 'chance' in entry else ''
        say(f'{title}  {name:<{width}}  {entry["score"]:.4f}{interval}  ({chance}n={entry["n"]})')
