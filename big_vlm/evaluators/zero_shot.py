"""Zero-shot classification: each class is the mean of its prompts' embeddings, the nearest one is the answer.

The recipe of CLIP (Radford et al. 2021, section 3.1.4) for any pair of embedding functions.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from big_vlm import config
from big_vlm.evaluators import scores as scores_lib
from big_vlm.metrics import classification


def check(templates: Sequence[str], classes: Sequence[str], where: str = 'zero-shot ') -> None:
    """Refuses what cannot be embedded: no template, no class, a class named twice, a template without '{}'.

    Raises UserError; `where` is what its key begins with: 'config.evals.NAME.'.
    """
    for name, values in (('templates', templates), ('classes', classes)):
        if not values:
            raise config.UserError(f'{where}{name}: give at least one')
    if repeated := sorted({name for name in classes if list(classes).count(name) > 1}):
        raise config.UserError(f'{where}classes: they must differ, but {repeated[0]!r} is there twice')
    for template in templates:
        if '{}' not in template:
            raise config.UserError(f"{where}templates: {template!r} has no '{{}}' for the class name: write 'a {{}}'")


def class_embeddings(
    embed_text: Callable[[list[str]], np.ndarray], templates: Sequence[str], classes: Sequence[str]
) -> np.ndarray:
    """One unit vector per class.

    Args:
      embed_text: texts -> float [M, E]. It is called once, with all classes of a template after all of the one before.
      templates: each contains '{}', which the class name fills: 'a {} in the center'.
      classes: C names.

    Returns:
      float32 [C, E]: each prompt's embedding normalised, averaged over the templates, normalised again.

    Raises:
      UserError: see `check`.
    """
    check(templates, classes)
    # Not str.format: a brace elsewhere in a template or a class name is just a character.
    texts = [template.replace('{}', name) for template in templates for name in classes]
    embeddings = _normalise(scores_lib.finite(embed_text(texts), 'text'))
    return _normalise(embeddings.reshape(len(templates), len(classes), -1).mean(axis=0))


def run(
    embed_image: Callable[[dict[str, Any]], np.ndarray],
    embed_text: Callable[[list[str]], np.ndarray],
    batches: Iterable[tuple[dict[str, Any], list[dict]]],
    templates: Sequence[str],
    classes: Sequence[str],
    label_field: str,
    *,
    slices: Sequence[str] = (),
    title: str = 'zero_shot',
) -> scores_lib.Scores:
    """Classifies every image and prints and returns the accuracy.

    Args:
      embed_image: batch -> float [B, E].
      embed_text: texts -> float [M, E].
      batches: (batch, records) pairs; rows whose `_mask` is False are padding. Examples that have no label belong out
        of the pipeline (its `where`).
      templates, classes: see `class_embeddings`.
      label_field: the record field with the true class, by name or by index into `classes`.
      slices: record fields to report apart, each value on its own ('accuracy/held_out=True').
      title: what the printed lines begin with.

    Returns:
      {'accuracy': {'score', 'chance', 'n'}} and the slices; chance is 1 / classes.

    Raises:
      UserError: a record without the field, a label that is no class, or no examples.
    """
    prototypes = class_embeddings(embed_text, templates, classes)
    correct, kept = [], []
    for batch, records in batches:
        rows = scores_lib.real_rows(batch, records)
        if not rows:
            continue
        embeddings = scores_lib.finite(np.asarray(embed_image(batch))[[row for row, _ in rows]], 'image')
        labels = [_label(scores_lib.field(record, label_field), classes, label_field) for _, record in rows]
        correct.extend(classification.correct_class(embeddings @ prototypes.T, np.array(labels)))
        kept.extend(record for _, record in rows)
    chance = classification.accuracy_chance(len(classes))
    values = np.array(correct)
    result = scores_lib.sliced('accuracy', kept, slices, lambda i: scores_lib.score(values[i], chance))
    scores_lib.print_scores(title, result)
    return result


def _label(value: Any, classes: Sequence[str], label_field: str) -> int:
    if isinstance(value, str):
        if value not in classes:
            raise config.unknown('class', value, classes, where=f'record field {label_field!r}')
        return list(classes).index(value)
    if not isinstance(value, int) or not 0 <= value < len(classes):
        raise config.UserError(
            f'record field {label_field!r} holds {value!r}: no class name, no index below {len(classes)}'
        )
    return int(value)


def _normalise(x: np.ndarray) -> np.ndarray:
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)
