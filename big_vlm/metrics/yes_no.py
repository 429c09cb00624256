"""Yes-or-no questions about what is in an image: accuracy, precision, recall, F1, and how often the answer is yes.

Li et al. 2023 (arXiv 2305.10355): POPE asks as often for objects that are there as for some that are not; a model that
sees what is not there says yes too often.
"""

from collections.abc import Sequence

import numpy as np

_NO = {'No', 'no', 'not'}


def says_yes(answer: str) -> bool:
    """POPE's reading of a free answer: yes, unless 'No', 'no' or 'not' stands between spaces in its first sentence.

    As its evaluate.py has it: commas do not count, but all else does, so that 'NO' and 'Not' are yes too.
    """
    words = answer.partition('.')[0].replace(',', '').split(' ')
    return _NO.isdisjoint(words)


def counts(predictions: Sequence[str], truths: Sequence[str]) -> np.ndarray:
    """int64 [N, 4]: is each a true positive, false positive, true negative, false negative? 'yes' is positive."""
    said = np.array([says_yes(text) for text in predictions], bool)
    true = np.array([says_yes(text) for text in truths], bool)
    return np.stack([said & true, said & ~true, ~said & ~true, ~said & true], axis=-1).astype(np.int64).reshape(-1, 4)


def scores(table: np.ndarray) -> dict[str, float]:
    """accuracy, precision, recall, f1 and yes_ratio of `counts` [N, 4], each in 0..1; 0 where nothing is divided."""
    tp, fp, tn, fn = (int(n) for n in np.asarray(table).sum(axis=0))
    return {
        'accuracy': _share(tp + tn, tp + fp + tn + fn),
        'precision': _share(tp, tp + fp),
        'recall': _share(tp, tp + fn),
        'f1': _share(2 * tp, 2 * tp + fp + fn),
        'yes_ratio': _share(tp + fp, tp + fp + tn + fn),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
