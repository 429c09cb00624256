"""Image-text retrieval, both ways: which of N captions belongs to an image, which of N images to a caption."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from big_vlm.evaluators import generation
from big_vlm.evaluators import scores as scores_lib
from big_vlm.metrics import retrieval

CAPTIONS = 5  # of an image, at most
_KS = (1, 5, 10)
_WAYS = ('image_to_text', 'text_to_image')
METRICS = tuple(f'{way}/R@{k}' for way in _WAYS for k in _KS)


def run(
    embed_image: Callable[[dict[str, Any]], np.ndarray],
    embed_text: Callable[[list[str]], np.ndarray],
    batches: Iterable[tuple[dict[str, Any], list[dict]]],
    text_field: str = 'caption',
    *,
    examples: int = 0,
    title: str = 'retrieval',
) -> scores_lib.Scores:
    """Embeds N images and their texts, ranks one by the other, and prints and returns Recall@k.

    Args:
      embed_image: batch -> float [B, E]; embed_text: texts -> float [M, E]. Both of unit length, as towers give them.
      batches: (batch, records) pairs; rows whose `_mask` is False are padding. Reading stops once N are found.
      text_field: the record field with the text, or the column of several ('captions/text'), of which the first five
        count, as on COCO and Flickr30k (Karpathy and Fei-Fei 2015, arXiv 1412.2306): to an image any of its own is
        right, to each of them its image alone. A single text that was seen before is passed over, so that each query
        has one right answer.
      examples: N; 0 takes all there are.
      title: what the printed lines begin with.

    Returns:
      {'image_to_text/R@1': {'score', 'chance', 'n'}, …, 'text_to_image/R@1': …}; chance is that of a random order. A k
      of N or above says nothing and is left out, but for 1.

    Raises:
      UserError: a record without the field, or no examples.
    """
    images, texts, seen = [], [], set()  # texts[i]: of image i, one or several
    for batch, records in batches:
        rows = []
        for row, record in scores_lib.real_rows(batch, records):
            text = generation.truth_of(record, text_field)
            several = not isinstance(text, str)
            if (examples and len(texts) == examples) or (not several and text in seen):
                continue
            rows.append(row)
            texts.append(text[:CAPTIONS] if several else [text])
            seen |= {*texts[-1]}
        if rows:
            images.append(scores_lib.finite(np.asarray(embed_image(batch))[rows], 'image'))
        if examples and len(texts) == examples:
            break
    if not texts:
        scores_lib.score([], 0.0)  # Raises the error that every evaluator gives.
    of_image = np.arange(len(texts))
    of_text = np.repeat(of_image, [len(own) for own in texts])
    similarity = np.concatenate(images) @ scores_lib.finite(embed_text([t for own in texts for t in own]), 'text').T
    ks = [k for k in _KS if k < len(texts)] or _KS[:1]
    result: scores_lib.Scores = {}
    sides = (similarity, of_image, of_text), (similarity.T, of_text, of_image)
    for name, (matrix, queries, targets) in zip(_WAYS, sides, strict=True):
        recall = retrieval.recall_at_k(matrix, queries, targets, ks)
        for k in ks:
            chance = retrieval.recall_at_k_chance(queries, targets, k)
            result[f'{name}/R@{k}'] = scores_lib.score(recall[k], chance)
    scores_lib.print_scores(title, result)
    return result
