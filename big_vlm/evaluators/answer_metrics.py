"""The metrics of answers by name: what each contributes, how that is summed up, what not looking would score."""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from big_vlm import config
from big_vlm.data import coordinates, mask_codes, objects, run_lengths
from big_vlm.metrics import boxes, captions, detection, edit_distance, masks, meteor, ptb, text, vqa, yes_no

Predictions, Truths = Sequence[str], Sequence[Sequence[str]]  # N answers; for each, one or several true ones
Kinds = Sequence[Hashable] | None
MASKS = 'mask_iou'  # the metric that needs codes
_BOX = re.compile(r'\s*(?:<loc\d{4}>){4}')


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score of N answers.

    name: as it appears in the results.
    measure: (predictions, truths) -> array [N, …], what each answer contributes.
    total: those of some of the answers -> their score; the mean, unless it is something else.
    guess: (truths, kinds of the questions) -> sheets of N answers by one who never looks; chance is what they score on
      average. None: it means nothing here.
    judges: whether a single answer with half a point or more is right.
    intervals: whether a confidence interval is drawn; not where a total takes long.
    lower_is_better: of an error.
    relative: whether what one answer contributes depends on the truths of all N.
    people: true answers that a question needs for an answer like all of them to be right.
    """

    name: str
    measure: Callable[[Predictions, Truths], np.ndarray]
    total: Callable[[np.ndarray], float] = np.mean
    guess: Callable[[Truths, Kinds], Sequence[Predictions]] | None = None
    judges: bool = False
    intervals: bool = True
    lower_is_better: bool = False
    relative: bool = False
    people: int = 1

    def chance(self, truths: Truths, kinds: Kinds) -> float | None:
        """What the sheets of `guess` score on average."""
        if self.guess is None:
            return None
        sheets = self.guess(truths, kinds)
        return float(np.mean([self.total(self.measure(sheet, truths)) for sheet in sheets]))

    def chances(self, truths: Truths, kinds: Kinds) -> Callable[[np.ndarray], float | None]:
        """Some of the examples -> their chance: `chance` of these alone, or, if relative, their part in that of all."""
        if not self.relative or self.guess is None:
            return lambda rows: self.chance([truths[i] for i in rows], [kinds[i] for i in rows])
        sheets = [self.measure(sheet, truths) for sheet in self.guess(truths, kinds)]
        return lambda rows: float(np.mean([self.total(parts[rows]) for parts in sheets]))


def metric(name: str, where: str = '', codes: str = '') -> Metric:
    """The metric of that name. Raises UserError for others, with `where`, the dotted key that names it.

    `codes`: the .npz by which the metric of masks, and no other, reads answers (`mask_codes`); a UserError without.
    """
    if name not in METRICS:
        raise config.unknown('metric', name, METRICS, where)
    found = METRICS[name]
    if name == 'meteor':
        meteor.command(where)  # before a model is trained, and not after
    if name != MASKS:
        return found
    if not codes:
        raise config.UserError(f'{where or name}: {name} reads masks by their codes: set codes to an .npz of them')
    return dataclasses.replace(found, measure=functools.partial(found.measure, codes=mask_codes.load(codes)))


def _commonest(truths: Truths, kinds: Kinds) -> list[list[str]]:
    """The commonest answer of each kind of question."""
    return [text.commonest_answers(truths, kinds)]


def _others(sheets: int) -> Callable[[Truths, Kinds], list[list[str]]]:
    """Answers to other questions: of the right form, blind to the image. Empty where there is no other question."""

    def guess(truths: Truths, kinds: Kinds) -> list[list[str]]:
        count = len(truths)
        if count < 2:
            return [[''] * count]
        # A step of 1..N-1 never lands on the question itself.
        steps = np.random.default_rng(0).integers(1, count, (sheets, count))
        return [[truths[(i + step) % count][0] for i, step in enumerate(row)] for row in steps]

    return guess


def _each(score: Callable[[str, Sequence[str]], object]) -> Callable[[Predictions, Truths], np.ndarray]:
    """A measure that looks at one answer at a time."""
    return lambda predictions, truths: np.array([score(p, t) for p, t in zip(predictions, truths, strict=True)])


def _exact_match(prediction: str, truths: Sequence[str]) -> float:
    return max(text.exact_match(prediction, truth) for truth in truths)


def _words(predictions: Predictions, truths: Truths) -> tuple[list[list[str]], list[list[list[str]]]]:
    return [ptb.tokenize(p) for p in predictions], [[ptb.tokenize(t) for t in several] for several in truths]


def _rouge_l(predictions: Predictions, truths: Truths) -> np.ndarray:
    words = zip(*_words(predictions, truths), strict=True)
    return np.array([captions.rouge_l(prediction, several) for prediction, several in words])


def _bleu(n: int) -> Metric:
    return Metric(
        f'bleu{n}',
        lambda predictions, truths: captions.bleu_counts(*_words(predictions, truths)),
        lambda counts: captions.bleu(counts, n),
        _others(1),
    )


def _error_rate(name: str, errors: Callable[[str, Sequence[str]], object]) -> Metric:
    return Metric(name, _each(errors), edit_distance.error_rate, _others(1), lower_is_better=True)


def _yes_no(name: str) -> Metric:
    # How often the answer is yes is no achievement, and has no chance level.
    return Metric(
        f'yes_no_{name}',
        lambda predictions, truths: yes_no.counts(predictions, [several[0] for several in truths]),
        lambda counts: yes_no.scores(counts)[name],
        None if name == 'yes_ratio' else _commonest,
        judges=name == 'accuracy',
    )


def _boxes(answer: str) -> np.ndarray:
    """Edges float64 [N, 4] in 0..1, of a true answer too: as its tokens say them, which is to within 1/2046."""
    return np.array([box for box, _ in coordinates.text_to_boxes(answer)], np.float64).reshape(-1, 4)


def _matches(predictions: Predictions, truths: Truths) -> np.ndarray:
    """Objects [N]: boxes and labels of answers matched with those of truths, an answer's first box its surest."""
    made = np.empty(len(predictions), object)
    for i, (prediction, several) in enumerate(zip(predictions, truths, strict=True)):
        found, true = coordinates.text_to_boxes(prediction), coordinates.text_to_boxes(several[0])
        made[i] = detection.match(
            detection.Detections(_boxes(prediction), [label for _, label in found], -np.arange(len(found))),
            detection.Truths(_boxes(several[0]), [label for _, label in true]),
        )
    return made


def _mask_ious(predictions: Predictions, truths: Truths, codes: mask_codes.MaskCodes) -> np.ndarray:
    """[N], the best IoU of an answer's first mask and one of the true ones, boxes with run lengths, in their picture.

    As big_vision's segmentation evaluator has it: an answer that does not begin with a box and its 16 codes gets 0.
    """
    pairs = zip(predictions, truths, strict=True)
    return np.array([max(_mask_iou(prediction, one, codes) for one in several) for prediction, several in pairs])


def _mask_iou(prediction: str, truth: str, codes: mask_codes.MaskCodes) -> float:
    true = _run_lengths(truth)
    if true is None:
        raise config.UserError(f"{truth[:60]!r} is no true mask: set answers='true_masks', which segment(…) makes")
    found = coordinates.first_mask(prediction)
    if found and found[1]:
        return masks.mask_iou(masks.paste(codes.decode(np.array([found[1]]))[0], found[0], true.shape), true)
    other = _run_lengths(prediction)  # a guess: what is true of another picture
    return 0.0 if other is None else masks.mask_iou(objects.sized(other[None], true.shape)[0], true)


def _run_lengths(text: str) -> np.ndarray | None:
    """The mask bool [H,W] behind a box, also one so thin that both its edges have one token."""
    box = _BOX.match(text)
    try:
        return box and run_lengths.from_text(text[box.end() :])
    except ValueError:
        return None


def _average_precision(name: str) -> Callable[[np.ndarray], float]:
    return lambda matches: max(detection.summarise(list(matches))[name], 0.0)


METRICS = {
    metric.name: metric
    for metric in (
        Metric('exact_match', _each(_exact_match), guess=_commonest, judges=True),
        Metric('vqa_accuracy', _each(vqa.vqa_accuracy), guess=_commonest, judges=True, people=4),
        Metric('direct_answer', _each(vqa.direct_answer), guess=_commonest, judges=True, people=3),
        Metric('relaxed_accuracy', _each(vqa.relaxed_accuracy), guess=_commonest, judges=True),
        Metric('science_qa', _each(vqa.science_qa), guess=_commonest, judges=True),
        Metric('anls', _each(edit_distance.anls), guess=_commonest, judges=True),
        *(_yes_no(name) for name in ('accuracy', 'precision', 'recall', 'f1', 'yes_ratio')),
        Metric(
            'cider',
            lambda predictions, truths: captions.cider_d(*_words(predictions, truths)),
            guess=_others(1),
            relative=True,
        ),
        *(_bleu(n) for n in (1, 2, 3, 4)),
        Metric('rouge_l', _rouge_l, guess=_others(1)),
        Metric(
            'meteor',
            lambda predictions, truths: meteor.counts(*_words(predictions, truths)),
            meteor.meteor,
            guess=_others(1),
        ),
        _error_rate('character_error_rate', edit_distance.character_errors),
        _error_rate('word_error_rate', edit_distance.word_errors),
        Metric(
            'box_iou',
            _each(lambda prediction, truths: boxes.mean_box_iou(_boxes(prediction), _boxes(truths[0]))),
            guess=_others(8),
            judges=True,
        ),
        Metric(
            'box_accuracy',
            _each(lambda prediction, truths: boxes.first_box_right(_boxes(prediction), _boxes(truths[0]))),
            guess=_others(8),
            judges=True,
        ),
        Metric(MASKS, _mask_ious, guess=_others(1), judges=True),
        Metric('map', _matches, _average_precision('ap'), _others(1), intervals=False),
        Metric('map50', _matches, _average_precision('ap@0.5'), _others(1), intervals=False),
    )
}
