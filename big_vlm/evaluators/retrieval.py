"""Image-text retrieval, both ways: which of N captions belongs to an image, which of N images to a caption."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from big_vlm.evaluators import scores as scores_lib
from big_vlm.metrics import retrieval


def run(
    embed_image: Callable[[dict[str, Any]], np.ndarray],
    embed_text: Callable[[list[str]], np.ndarray],
    batches: Iterable[tuple[dict[str, Any], list[dict]]],
    text_field: str = 'caption',
    *,
    examples: int = 0,
    distinct: bool = True,
    ks: Sequence[int] = (1, 5, 10),
    title: str = 'retrieval',
) -> scores_lib.Scores:
    """Embeds N images and their texts, ranks one by the other, and prints and returns Recall@k.

    Args:
      embed_image: batch -> float [B, E]; embed_text: texts -> float [M, E]. Both of unit length, as towers give them.
      batches: (batch, records) pairs; rows whose `_mask` is False are padding. Reading stops once N are found.
      text_field: the record field with the text.
      examples: N; 0 takes all there are.
      distinct: take an example only if its text was not seen before, so that each query has one right answer. False
        keeps them all, and any copy of a caption is right for every image that has it.
      ks: cut-offs. Those of N and above say nothing and are left out, unless all are.
      title: what the printed lines begin with.

    Returns:
      {'image_to_text/R@1': {'score', 'chance', 'n'}, …, 'text_to_image/R@1': …}; chance is k / N for distinct texts.

    Raises:
      UserError: a record without the field, or no examples.
    """
    images, texts = [], []
    for batch, records in batches:
        rows = []
        for row, record in scores_lib.real_rows(batch, records):
            text = scores_lib.field(record, text_field)
            if (examples and len(texts) == examples) or (distinct and text in texts):
                continue
            rows.append(row)
            texts.append(text)
        if rows:
            images.append(scores_lib.finite(np.asarray(embed_image(batch))[rows], 'image'))
        if examples and len(texts) == examples:
            break
    if not texts:
        scores_lib.score([], 0.0)  # Raises the error that every evaluator gives.
    unique = {text: group for group, text in enumerate(dict.fromkeys(texts))}
    image_groups, text_groups = np.array([unique[text] for text in texts]), np.arange(len(unique))
    similarity = np.concatenate(images) @ scores_lib.finite(embed_text(list(unique)), 'text').T
    ks = [k for k in ks if k < len(unique)] or list(ks)[:1]
    result: scores_lib.Scores = {}
    for name, matrix, queries, targets in (
        ('image_to_text', similarity, image_groups, text_groups),
        ('text_to_image', similarity.T, text_groups, image_groups),
    ):
        recall = retrieval.recall_at_k(matrix, queries, targets, ks)
        for k in ks:
            chance = retrieval.recall_at_k_chance(queries, targets, k)
            result[f'{name}/R@{k}'] = scores_lib.score(recall[k], chance)
    scores_lib.print_scores(title, result)
    return result
