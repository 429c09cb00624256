"""Answers in text, scored by any list of metrics, whole and cut by question kind and by slices."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from big_vlm.config import UserError, whole_file
from big_vlm.data import fields
from big_vlm.evaluators import scores as scores_lib
from big_vlm.evaluators.answer_metrics import Metric, metric

KIND = 'kind'


def predict(
    generate: Callable[[dict[str, Any]], list[str]],
    batches: Iterable[tuple[dict[str, Any], list[dict]]],
    metrics: Sequence[Metric | str],
    *,
    prompt_field: str = 'prefix',
    truth_field: str = 'suffix',
    slices: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Answers every example and scores each answer.

    Args:
      generate: batch -> B answers.
      batches: (batch, records) pairs; rows whose `_mask` is False are padding.
      metrics: metrics, or names of them.
      prompt_field, truth_field: record fields with the prompt and the true answer, or a column of several true ones.
      slices: record fields that are kept with the prediction.

    Returns:
      One dict per example, ready for JSON: id (the record's, else the batch's [source, index]), prompt, prediction,
      truth (a list where there are several), score ({metric: number}, of this example alone, but cider's, which weighs
      words by all examples), the record's kind where it has one, and the slice fields.
    """
    chosen = [metric(m) if isinstance(m, str) else m for m in metrics]
    predictions = []
    for batch, records in batches:
        answers = generate(batch)
        for row, record in scores_lib.real_rows(batch, records):
            entry = {
                'id': _json_id(record, batch, row),
                'prompt': scores_lib.field(record, prompt_field),
                'prediction': answers[row],
                'truth': truth_of(record, truth_field),
                'score': {},
            }
            for key in (*((KIND,) if KIND in record else ()), *slices):
                entry[key] = scores_lib.field(record, key)
            predictions.append(entry)
    for m in chosen:
        parts = _measure(m, predictions)
        for i, entry in enumerate(predictions):
            entry['score'][m.name] = float(m.total(parts[i : i + 1]))
    return predictions


def truth_of(record: dict, name: str) -> str | list[str]:
    """The true answer in a field, or several in a column of texts. Raises ValueError for a record that has none, or
    what is no text."""
    value = scores_lib.field(record, name)
    if value is not None and not isinstance(value, list | tuple | np.ndarray | Mapping):
        return str(value)
    truths = [] if value is None else fields.texts(value, name)
    if not truths:
        raise ValueError(f'field {name!r} has no true answer for {record.get("id", record.get("prefix"))!r}')
    return truths


def summarise(
    predictions: Sequence[dict[str, Any]], metrics: Sequence[Metric | str], slices: Sequence[str] = ()
) -> scores_lib.Scores:
    """Scores of `predict`'s output: each metric over all, by kind (if the examples have kinds), by slice.

    Chance on a subset is its own: for exact match its most common answer, question kind by question kind; for CIDEr,
    which weighs words by all examples, the subset's part in what other examples' captions score.
    """
    truths = [_several(entry) for entry in predictions]
    kinds = [entry.get(KIND) for entry in predictions]
    cuts = (*((KIND,) if predictions and all(KIND in entry for entry in predictions) else ()), *slices)
    result: scores_lib.Scores = {}
    for chosen in (metric(m) if isinstance(m, str) else m for m in metrics):
        parts = _measure(chosen, predictions)
        chances = chosen.chances(truths, kinds) if predictions else lambda rows: None
        direction = {'lower_is_better': True} if chosen.lower_is_better else {}

        def measure(rows: np.ndarray, chosen=chosen, parts=parts, chances=chances, more=direction) -> dict:
            return scores_lib.total(parts[rows], chosen.total, chances(rows), intervals=chosen.intervals) | more

        result |= scores_lib.sliced(chosen.name, predictions, cuts, measure)
    return result


def run(
    generate: Callable[[dict[str, Any]], list[str]],
    batches: Iterable[tuple[dict[str, Any], list[dict]]],
    metrics: Sequence[Metric | str] = ('exact_match',),
    *,
    prompt_field: str = 'prefix',
    truth_field: str = 'suffix',
    slices: Sequence[str] = (),
    predictions_path: str | os.PathLike | None = None,
    must: bool = True,
    title: str = 'generation',
) -> scores_lib.Scores:
    """Answers, scores, prints; see `predict` for the arguments.

    Args:
      predictions_path: where to write the predictions, one JSON object a line; a file already there is replaced.
      must: raise UserError where they cannot be written; else that is said, and nothing more.
      title: what the printed lines begin with.

    Returns:
      {'exact_match': {'score', 'low', 'high', 'chance', 'n'}, 'exact_match/kind=count': …,
      'exact_match/held_out=True': …}; see `scores`.

    Raises:
      UserError: an unknown metric, a record without a field that is needed, or no examples.
    """
    chosen = [metric(m) if isinstance(m, str) else m for m in metrics]
    predictions = predict(generate, batches, chosen, prompt_field=prompt_field, truth_field=truth_field, slices=slices)
    if predictions_path is not None:
        write_predictions(predictions_path, predictions, must)
    result = summarise(predictions, chosen, slices)
    scores_lib.print_scores(title, result)
    return result


def read_predictions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """What `write_predictions` wrote. Raises UserError for a file that is none."""
    try:
        lines = Path(path).read_text(encoding='utf-8').split('\n')
        predictions = [json.loads(line) for line in lines if line]
        ok = all({'id', 'prompt', 'prediction', 'score'} <= entry.keys() for entry in predictions)
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error.strerror}') from error
    except (ValueError, AttributeError):
        ok = False
    if not ok:
        raise UserError(f'{path}: not a file of predictions: name a predictions_*.jsonl that an evaluation wrote')
    return predictions


def write_predictions(path: str | os.PathLike, predictions: Sequence[dict[str, Any]], must: bool = True) -> None:
    """One JSON object a line, UTF-8, all of them or none. Raises as `whole_file.write_text` does."""
    lines = (json.dumps(entry, ensure_ascii=False, default=_plain) + '\n' for entry in predictions)
    whole_file.write_text(path, ''.join(lines), must)


def _measure(chosen: Metric, predictions: Sequence[dict[str, Any]]) -> np.ndarray:
    answers, truths = [entry['prediction'] for entry in predictions], [_several(entry) for entry in predictions]
    return np.asarray(chosen.measure(answers, truths)) if predictions else np.empty(0)


def _several(entry: dict[str, Any]) -> list[str]:
    return [entry['truth']] if isinstance(entry['truth'], str) else list(entry['truth'])


def _json_id(record: dict, batch: dict[str, Any], row: int) -> Any:
    value = scores_lib.field(record, 'id') if 'id' in record else np.asarray(batch['id'])[row]
    return value.tolist() if isinstance(value, np.ndarray) else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f'{type(value).__name__} does not belong in a predictions file')
