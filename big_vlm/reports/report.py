"""The report of a run: what was trained, how well it does, and what it looks like from inside, as one HTML file.

The file needs nothing else: no network, no scripts, no fonts; pictures are part of its text. The caller gathers plain
data into a `Report`; what is left out of it is left out of the page.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from big_vlm.config import whole_file


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the training.

    name: 'pretrain'.
    curves: {column: [(step, value), …]}, as `writers.read_csv` gives. Columns with 'loss' in their name are drawn
      together, so are learning rates ('lr' or 'learning_rate' in the name); the others are folded away below.
    facts: what to say about it, {'steps': '2,000', 'time': '3 min'}.
    """

    name: str
    curves: Mapping[str, Sequence[tuple[int, float]]] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How near images and texts of one test batch are.

    matrix: float [N, N], images down, texts across; pair i belongs together. Any range; shown as it is.
    images: N uint8 [H, W, 3]; captions: N texts.
    """

    matrix: np.ndarray
    images: Sequence[np.ndarray]
    captions: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One test image, what was asked, and what came back.

    image: uint8 [H, W, 3]. boxes: float [P, 4] as (y1, x1, y2, x2) in 0..1, predicted; true_boxes [T, 4] likewise.
    correct: True, False, or None where the answer is neither right nor wrong (a caption).
    note: a few words for the corner, 'IoU 0.83'.
    """

    image: np.ndarray
    prompt: str
    answer: str
    truth: str
    correct: bool | None = None
    boxes: np.ndarray | Sequence = ()
    true_boxes: np.ndarray | Sequence = ()
    note: str = ''


@dataclasses.dataclass(frozen=True)
class Patches:
    """What the image tower sees: image uint8 [H, W, 3], cut into grid = (rows, columns) patches of `size` px."""

    image: np.ndarray
    grid: tuple[int, int]
    size: int


@dataclasses.dataclass(frozen=True)
class Attention:
    """Where an answer's tokens look.

    image: uint8 [H, W, 3]. tokens: T generated pieces. weights: float [T, rows, columns], the attention each of them
      (strictly: the query that predicts it) pays to each patch, averaged over heads (and layers); one token's sum is
      at most 1, the rest goes to text.
    """

    image: np.ndarray
    prompt: str
    tokens: Sequence[str]
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Whether confidence can be believed.

    before, after: (mean confidence, accuracy, count) of bins, without and with the fitted temperature.
    selective: (share of answers kept, their accuracy), the surest first. All but the counts in 0..1.
    """

    name: str
    temperature: float
    before: Sequence[tuple[float, float, int]]
    after: Sequence[tuple[float, float, int]]
    selective: Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a page can show. Only the title is needed.

    title: 'SigLIP and PaliGemma on digit scenes'. summary: one or two sentences on what was trained.
    facts: of the whole run, {'parameters': '1.3 M', 'device': 'CPU', 'time': '9 min'}.
    scores: {evaluation: {metric: {'score', 'chance', 'n'}}}, as evaluators return them, with 'lower_is_better' where it
      is. The first score of each evaluation is a headline.
    commands: {what for: command line or code}, how to talk to the model.
    config: the run's config, as text or as anything json can write.
    """

    title: str
    summary: str = ''
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = dataclasses.field(default_factory=dict)
    calibration: Sequence[Calibration] = ()
    answers: Sequence[Answer] = ()
    attention: Sequence[Attention] = ()
    patches: Patches | None = None
    similarity: Similarity | None = None
    stages: Sequence[Stage] = ()
    commands: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Any = None


def write(path: str | os.PathLike, report: Report) -> None:
    """Writes the page to `path`, by way of a second file that is moved into place."""
    whole_file.write_text(path, render(report))


def render(report: Report) -> str:
    """The page as text."""
    from big_vlm.reports import page, sections  # They know `Report`; and matplotlib loads only where a page is made.

    body = [
        sections.header(report),
        sections.scores(report.scores),
        sections.calibration(report.calibration),
        sections.answers(report.answers),
        sections.attention(report.attention),
        sections.patches(report.patches),
        sections.similarity(report.similarity),
        sections.training(report.stages),
        sections.config(report.config),
    ]
    return page.document(report.title, ''.join(body))
