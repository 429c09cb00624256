"""Exact match of answers, and what always giving the most common answer would score."""

import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def normalise_answer(text: str) -> str:
    """The form in which answers are compared.

    Unicode NFKC, lower case (casefold), runs of white space become one space, none at the ends, and the full stops,
    exclamation and question marks that end the text are dropped. Articles, inner punctuation and the order of words
    stay: '  A red\\nThree. ' becomes 'a red three', and 'the red three' differs from it.
    """
    words = unicodedata.normalize('NFKC', text).casefold().split()
    return ' '.join(words).rstrip('.!? ')


def exact_match(prediction: str, truth: str) -> float:
    """1.0 if both texts are equal after `normalise_answer`, else 0.0."""
    return float(normalise_answer(prediction) == normalise_answer(truth))


def exact_match_chance(truths: Sequence[str], kinds: Sequence[Hashable] | None = None) -> np.ndarray:
    """Score of always answering the most common answer, the honest bar for a model that ignores the image.

    Args:
      truths: N true answers.
      kinds: N question kinds; the guesser knows them and answers with the kind's most common truth. None: one kind.

    Returns:
      float64 [N]: for each example the share of its kind's examples that have the kind's most common answer. The mean
      is the score of the guesser. Four counts '1', '1', '1', '2' give 0.75 each.
    """
    kinds = [None] * len(truths) if kinds is None else list(kinds)
    if len(kinds) != len(truths):
        raise ValueError(f'{len(truths)} truths but {len(kinds)} kinds')
    answers: dict[Hashable, Counter] = {}
    for truth, kind in zip(truths, kinds, strict=True):
        answers.setdefault(kind, Counter())[normalise_answer(truth)] += 1
    share = {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
    return np.array([share[kind] for kind in kinds], np.float64)
