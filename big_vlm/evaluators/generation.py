"""Answers in text, scored by any list of metrics, whole and cut by question kind and by slices."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from big_vlm import config
from big_vlm.data import coordinates
from big_vlm.evaluators import scores as scores_lib
from big_vlm.metrics import boxes, text

KIND = 'kind'


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score per answer, and the chance level that belongs to it.

    name: as it appears in the results.
    score: (prediction, truth) -> number.
    chance: (N truths, N question kinds) -> float [N], what answering without the image would score.
    """

    name: str
    score: Callable[[str, str], float]
    chance: Callable[[Sequence[str], Sequence[Any]], np.ndarray]


def _parse_boxes(answer: str) -> np.ndarray:
    return np.array([box for box, _ in coordinates.text_to_boxes(answer)], np.float64).reshape(-1, 4)


METRICS = {
    metric.name: metric
    for metric in (
        Metric('exact_match', text.exact_match, text.exact_match_chance),
        Metric(
            'box_iou',
            lambda prediction, truth: boxes.mean_box_iou(_parse_boxes(prediction), _parse_boxes(truth)),
            lambda truths, kinds: boxes.mean_box_iou_chance([_parse_boxes(truth) for truth in truths]),
        ),
    )
}


def metric(name: str, where: str = '') -> Metric:
    """The metric of that name: 'exact_match', or 'box_iou' for answers of location tokens.

    Raises UserError for others, with `where`, the dotted key that names it.
    """
    if name not in METRICS:
        raise config.unknown('metric', name, METRICS, where)
    return METRICS[name]


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
      prompt_field, truth_field: record fields with the prompt and the true answer.
      slices: record fields that are kept with the prediction.

    Returns:
      One dict per example, ready for JSON: id (the record's, else the batch's [source, index]), prompt, prediction,
      truth, score ({metric: number}), the record's kind where it has one, and the slice fields.
    """
    chosen = [metric(m) if isinstance(m, str) else m for m in metrics]
    predictions = []
    for batch, records in batches:
        answers = generate(batch)
        for row, record in scores_lib.real_rows(batch, records):
            truth, answer = scores_lib.field(record, truth_field), answers[row]
            entry = {
                'id': _json_id(record, batch, row),
                'prompt': scores_lib.field(record, prompt_field),
                'prediction': answer,
                'truth': truth,
                'score': {m.name: float(m.score(answer, truth)) for m in chosen},
            }
            for key in (*((KIND,) if KIND in record else ()), *slices):
                entry[key] = scores_lib.field(record, key)
            predictions.append(entry)
    return predictions


def summarise(
    predictions: Sequence[dict[str, Any]], metrics: Sequence[Metric | str], slices: Sequence[str] = ()
) -> scores_lib.Scores:
    """Scores of `predict`'s output: each metric over all, by kind (if the examples have kinds), by slice.

    Chance on a subset is that of the subset: for exact match its most common answer, question kind by question kind.
    """
    truths = [entry['truth'] for entry in predictions]
    kinds = [entry.get(KIND) for entry in predictions]
    cuts = (*((KIND,) if predictions and all(KIND in entry for entry in predictions) else ()), *slices)
    result: scores_lib.Scores = {}
    for chosen in (metric(m) if isinstance(m, str) else m for m in metrics):
        values = np.array([entry['score'][chosen.name] for entry in predictions])

        def measure(
            indices: np.ndarray, chosen: Metric = chosen, values: np.ndarray = values
        ) -> dict[str, float | int]:
            chance = chosen.chance([truths[i] for i in indices], [kinds[i] for i in indices])
            return scores_lib.score(values[indices], chance)

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
    title: str = 'generation',
) -> scores_lib.Scores:
    """Answers, scores, prints; see `predict` for the arguments.

    Args:
      predictions_path: where to write the predictions, one JSON object a line; a file already there is replaced.
      title: what the printed lines begin with.

    Returns:
      {'exact_match': {'score', 'chance', 'n'}, 'exact_match/kind=count': …, 'exact_match/held_out=True': …}

    Raises:
      UserError: an unknown metric, a record without a field that is needed, or no examples.
    """
    chosen = [metric(m) if isinstance(m, str) else m for m in metrics]
    predictions = predict(generate, batches, chosen, prompt_field=prompt_field, truth_field=truth_field, slices=slices)
    if predictions_path is not None:
        write_predictions(predictions_path, predictions)
    result = summarise(predictions, chosen, slices)
    scores_lib.print_scores(title, result)
    return result


def write_predictions(path: str | os.PathLike, predictions: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line, UTF-8. Written aside and moved into place, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + '.part')
    lines = (json.dumps(entry, ensure_ascii=False, default=_plain) + '\n' for entry in predictions)
    part.write_text(''.join(lines), encoding='utf-8')
    os.replace(part, path)


def _json_id(record: dict, batch: dict[str, Any], row: int) -> Any:
    value = scores_lib.field(record, 'id') if 'id' in record else np.asarray(batch['id'])[row]
    return value.tolist() if isinstance(value, np.ndarray) else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f'{type(value).__name__} does not belong in a predictions file')
