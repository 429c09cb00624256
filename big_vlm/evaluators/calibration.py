"""Whether a model knows when it is right: its confidence made honest on one split, and judged on another."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from big_vlm.config import UserError, say, whole_file
from big_vlm.evaluators import generation
from big_vlm.evaluators import scores as scores_lib
from big_vlm.metrics import calibration
from big_vlm.metrics.text import normalise_answer

ERRORS = ('ece_before', 'ece_after')  # lower is better
_POINTS = 100  # of the curve that is written
Batches = Iterable[tuple[dict[str, Any], list[dict]]]


class Confident(NamedTuple):
    """One answer. logits: [C], of which softmax makes probabilities; `said` is the answer's place among them, `true`
    that of the truth: the answer is right if they are the same."""

    logits: np.ndarray
    said: int
    true: int


def of_answer(log_prob: float, correct: bool) -> Confident:
    """An answer out of all texts: right or wrong are the classes, the answer's probability that of being right."""
    log_prob = min(float(log_prob), -1e-7)  # its complement has a logarithm too
    return Confident(np.array([log_prob, np.log(-np.expm1(log_prob))]), 0, 0 if correct else 1)


def of_choices(scores: Sequence[float], choices: Sequence[str], truth: str) -> Confident:
    """The likeliest of some choices, by log-probabilities [C]. Raises UserError if the truth is none of them."""
    scores, names = np.asarray(scores, np.float64), [normalise_answer(choice) for choice in choices]
    if normalise_answer(truth) not in names:
        raise UserError(
            f'the true answer {truth!r} is none of the choices {list(choices)}: add it, or leave choices out'
        )
    return Confident(scores, int(scores.argmax()), names.index(normalise_answer(truth)))


def run(
    answer: Callable[[dict[str, Any], list[dict]], list[Confident]],
    fit: Batches,
    batches: Batches,
    *,
    truth_field: str = 'suffix',
    path: str | os.PathLike | None = None,
    must: bool = True,
    title: str = 'calibration',
) -> scores_lib.Scores:
    """Fits the temperature of the confidence on `fit`, judges it on `batches`, prints.

    Args:
      answer: batch, records → one answer for each row that is not padding.
      fit, batches: (batch, records) pairs, of different splits.
      path: where to write what a report draws (JSON).
      must: raise UserError where it cannot be written; else that is said, and nothing more.

    Returns:
      accuracy; ece_before and ece_after, the calibration error without and with the temperature (chance: of one who
      claims certainty); selective_accuracy, the area under accuracy over the share of answers kept, the surest first
      (chance: with a confidence that says nothing).

    Raises:
      UserError: no examples, or a record without a truth.
    """
    fitted, _ = _collect(answer, fit, truth_field)
    temperature = calibration.fit_temperature(_logits(fitted), np.array([c.true for c in fitted]))
    found, truths = _collect(answer, batches, truth_field)
    said = np.array([c.said for c in found])
    correct = said == np.array([c.true for c in found])
    before, after = (
        calibration.probabilities(_logits(found), t)[np.arange(len(found)), said] for t in (1.0, temperature)
    )
    curve = calibration.selective_accuracy(after, correct)
    kinds = [record.get(generation.KIND) for record, _ in truths]
    guess = generation.metric('exact_match').chance([[truth] for _, truth in truths], kinds)
    certain = 1 - correct.mean()
    n = len(found)
    result: scores_lib.Scores = {'accuracy': scores_lib.score(correct, guess)}
    for name, confidence in zip(ERRORS, (before, after), strict=True):
        error = calibration.expected_calibration_error(confidence, correct)
        result[name] = {'score': error, 'chance': float(certain), 'n': n, 'lower_is_better': True}
    result['selective_accuracy'] = {'score': float(curve.mean()), 'chance': float(correct.mean()), 'n': n}
    scores_lib.print_scores(title, result)
    say(f'{title}  temperature {temperature:.4g}, fitted on {len(fitted)} others')
    if path is not None:
        drawn = {
            'temperature': temperature,
            'before': calibration.reliability(before, correct),
            'after': calibration.reliability(after, correct),
            'selective': _thinned(curve),
        }
        whole_file.write_text(path, json.dumps(drawn, indent=1), must)
    return result


def _collect(answer: Callable, batches: Batches, truth_field: str) -> tuple[list[Confident], list[tuple[dict, str]]]:
    found, truths = [], []
    for batch, records in batches:
        real = [record for _, record in scores_lib.real_rows(batch, records)]
        truths += [(record, scores_lib.field(record, truth_field)) for record in real]
        found += answer(batch, real)
    if not found:
        scores_lib.score([], 0.0)  # raises the error that every evaluator gives
    return found, truths


def _logits(found: Sequence[Confident]) -> np.ndarray:
    """[N, C], -inf where an answer has fewer classes."""
    result = np.full((len(found), max(len(c.logits) for c in found)), -np.inf)
    for row, answer in zip(result, found, strict=True):
        row[: len(answer.logits)] = answer.logits
    return result


def _thinned(curve: np.ndarray) -> list[tuple[float, float]]:
    """(share kept, accuracy) at no more than so many places, the last among them."""
    places = np.unique(np.linspace(1, len(curve), min(len(curve), _POINTS)).round().astype(int))
    return [(place / len(curve), float(curve[place - 1])) for place in places]
