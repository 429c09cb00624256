"""Classification by the largest score, as zero-shot evaluation reports it."""

import numpy as np


def correct_class(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the best-scoring class is the label, for each example.

    Args:
      scores: float [N, C], higher is better. Equal scores go to the lower class index.
      labels: int [N], each in 0..C-1.

    Returns:
      float64 [N] of 0 and 1; its mean is the accuracy.

    Raises:
      ValueError: shapes that do not agree, or a label outside 0..C-1.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(f'scores [N, C] and labels [N] expected, got {scores.shape} and {labels.shape}')
    if labels.size and not (0 <= labels.min() and labels.max() < scores.shape[1]):
        raise ValueError(f'labels must lie in 0..{scores.shape[1] - 1}, got {labels.min()}..{labels.max()}')
    return (scores.argmax(axis=1) == labels).astype(np.float64)


def accuracy_chance(num_classes: int) -> float:
    """Accuracy of guessing one of `num_classes` uniformly: 1 / classes."""
    return 1.0 / num_classes
