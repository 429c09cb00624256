"""Two runs' answers to the same examples: where they differ, and whether one is better by more than chance."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from big_vlm.config import UserError
from big_vlm.evaluators.answer_metrics import METRICS
from big_vlm.metrics import bootstrap


def compare(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> tuple[dict[str, dict[str, float | int]], list[dict[str, Any]]]:
    """What `generation.predict` made in two runs, example by example.

    Args:
      ours, theirs: the predictions, of which those with the same id and prompt are compared; the n-th of several such
        with the n-th.

    Returns:
      ({metric: {'better', 'worse': examples, 'difference': of the mean scores, 'low', 'high': its interval, 'n'}},
      the examples with other answers: {'id', 'prompt', 'truth', 'ours', 'theirs', 'score', 'their_score'}). Differences
      are of examples' own scores, ours less theirs: a paired bootstrap. Less of an error is better.

    Raises:
      UserError: no example in common.
    """
    other = _keyed(theirs)
    pairs = [(entry, other[key]) for key, entry in _keyed(ours).items() if key in other]
    if not pairs:
        raise UserError('the two runs have no example in common: compare evaluations of one dataset and pipeline')
    summary = {}
    for name in pairs[0][0]['score']:
        if any(name not in entry['score'] for pair in pairs for entry in pair):
            continue
        apart = np.array([a['score'][name] - b['score'][name] for a, b in pairs])
        low, high = bootstrap.interval(len(apart), lambda rows, apart=apart: apart[rows].mean())
        gained = -apart if name in METRICS and METRICS[name].lower_is_better else apart
        counts = {'better': int((gained > 0).sum()), 'worse': int((gained < 0).sum())}
        summary[name] = counts | {'difference': float(apart.mean()), 'low': low, 'high': high, 'n': len(apart)}
    differing = [
        {
            **{key: a.get(key) for key in ('id', 'prompt', 'truth')},
            'ours': a['prediction'],
            'theirs': b['prediction'],
            'score': a['score'],
            'their_score': b['score'],
        }
        for a, b in pairs
        if a['prediction'] != b['prediction']
    ]
    return summary, differing


def _keyed(entries: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The entries by id, prompt and which of those with both it is: three captions of one image are three examples."""
    seen: Counter[tuple[str, str]] = Counter()
    keyed = {}
    for entry in entries:
        key = repr(entry['id']), entry['prompt']
        keyed[*key, seen[key]] = entry
        seen[key] += 1
    return keyed
