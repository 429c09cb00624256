"""Recall at k between two sets of items, where several targets may be right for one query."""

from collections.abc import Sequence
from math import comb

import numpy as np


def recall_at_k(
    similarity: np.ndarray, query_groups: np.ndarray, target_groups: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, np.ndarray]:
    """Whether a target of the query's own group is among its k nearest.

    Image to text and text to image are one function: pass the matrix or its transpose, and swap the groups.

    Args:
      similarity: float [Q, M], higher is nearer. Among equal values a wrong target ranks before a right one, so that a
        model which gives every pair the same score gets nothing for it.
      query_groups: int [Q], target_groups: int [M]. Equal ids belong together: two copies of one caption share an id,
        and either is right for both their images.
      ks: cut-offs, each at least 1. Beyond M it means M.

    Returns:
      {k: float64 [Q] of 0 and 1}; the mean over queries is Recall@k. A query with no target of its group scores 0.

    Raises:
      ValueError: shapes that do not agree, a k below 1, or a similarity that is not a number.
    """
    similarity = np.asarray(similarity)
    right = _same_group(query_groups, target_groups)
    if similarity.shape != right.shape:
        raise ValueError(f'similarity {similarity.shape} does not fit the groups, {right.shape}')
    if any(k < 1 for k in ks):
        raise ValueError(f'k must be at least 1, got {tuple(ks)}')
    if np.isnan(similarity).any():
        raise ValueError('similarity holds NaN')
    # Rank of the best right target = number of wrong targets at least as near. A count needs no sort.
    best = np.where(right, similarity, -np.inf).max(axis=1, initial=-np.inf, keepdims=True)
    rank = ((similarity >= best) & ~right).sum(axis=1)
    found = right.any(axis=1)
    return {k: (found & (rank < k)).astype(np.float64) for k in ks}


def recall_at_k_chance(query_groups: np.ndarray, target_groups: np.ndarray, k: int) -> np.ndarray:
    """Recall@k of a random ranking: float64 [Q].

    A query with g right targets among M finds one among k random ones with probability 1 - C(M-g, k) / C(M, k), which
    is k / M where every query has a single right target.
    """
    right = _same_group(query_groups, target_groups)
    num_targets, k = right.shape[1], min(k, right.shape[1])
    return np.array([1.0 - comb(num_targets - int(g), k) / comb(num_targets, k) for g in right.sum(axis=1)], np.float64)


def _same_group(query_groups: np.ndarray, target_groups: np.ndarray) -> np.ndarray:
    return np.asarray(query_groups)[:, None] == np.asarray(target_groups)[None, :]
