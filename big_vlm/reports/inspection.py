"""A training batch before it is trained on, as a page: images, tokens, loss, who sees whom, and what was cut.

Plain data in; `contact_sheet` draws the same as one picture.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from big_vlm.config import whole_file
from big_vlm.reports import page, pictures
from big_vlm.reports.sections import section

KINDS = {
    'image': 'image slots',
    'prefix': 'prefix',
    'suffix': 'suffix',
    'text': 'text',
    'padding': 'padding',
}  # and what the legend calls them
_CELL = 13  # of the mask, in its picture's units
_MOST_LABELLED = 60  # rows of a mask that still have their token beside them


@dataclasses.dataclass(frozen=True)
class Token:
    """One slot of a row, or `slots` neighbours that all see and are seen alike: those of an image, padding.

    text: the piece; kind: of KINDS; loss: the weight of its loss.
    """

    text: str
    kind: str
    loss: float = 0.0
    slots: int = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the batch.

    images: uint8 [H, W, 3] each, as the model gets them. sees: bool [n, n], (query, key), of the n `tokens`; None where
    nothing attends. note: what else there is to say.
    """

    source: str
    record: int
    images: Sequence[np.ndarray]
    tokens: Sequence[Token]
    sees: np.ndarray | None = None
    note: str = ''


@dataclasses.dataclass(frozen=True)
class Cut:
    """A text that did not fit: of `length` tokens the last `lost` were cut; in two parts, the kept and the lost."""

    source: str
    record: int
    kept: str
    left_out: str
    lost: int
    length: int


@dataclasses.dataclass
class Counts:
    """Of one source: examples; texts (suffixes, or a dual encoder's), and how many were cut; turns left out of a row;
    prompts that did not fit, for which, as for the `replaced`, another example was taken.
    """

    examples: int = 0
    texts: int = 0
    cut: int = 0
    turns_left_out: int = 0
    prompts_refused: int = 0
    replaced: int = 0


@dataclasses.dataclass(frozen=True)
class Inspection:
    """All that is shown of a stage.

    counts: by source. worst: those that lost most. problems: one line each, that say why it should not be trained.
    """

    title: str
    facts: Mapping[str, str]
    rows: Sequence[Row]
    counts: Mapping[str, Counts]
    worst: Sequence[Cut] = ()
    problems: Sequence[str] = ()


def write(path: str | os.PathLike, inspection: Inspection) -> None:
    """Writes the page."""
    whole_file.write_text(path, render(inspection))


def render(inspection: Inspection) -> str:
    """The page as text."""
    facts = ''.join(f'<div><span>{escape(k)}</span><b>{escape(v)}</b></div>' for k, v in inspection.facts.items())
    kinds = dict.fromkeys(token.kind for row in inspection.rows for token in row.tokens)
    legend = ''.join(f'<span class="tok {kind}">{KINDS[kind]}</span>' for kind in KINDS if kind in kinds)
    if {'prefix', 'suffix'} & set(kinds):
        legend += '<span class="tok suffix loss">carries loss</span>'
    body = [
        f'<header><div class="eyebrow">big_vlm, before training</div><h1>{escape(inspection.title)}</h1>',
        f'<div class="facts">{facts}</div></header>',
        ''.join(f'<p class="card problem">{escape(problem)}</p>' for problem in inspection.problems),
        section('Cut and replaced', 'Over all batches that were read.', _counts(inspection)),
        section(
            'Rows',
            'Each image as the model gets it; the tokens of its row, a thick line under those that carry loss; and '
            'whom each of them (a line of the square) sees (a column). Image slots and padding are drawn as one.',
            f'<div class="key">{legend}</div>' + ''.join(map(_row, inspection.rows)),
        ),
    ]
    return page.document(inspection.title, ''.join(body))


def spelt(token: Token) -> str:
    """A token as it is shown."""
    if token.slots > 1 or token.kind in ('image', 'padding'):
        return f'{KINDS[token.kind]} × {token.slots}'
    return token.text.replace('▁', ' ').replace('\n', '⏎').replace('<0x0A>', '⏎')


def _row(row: Row) -> str:
    images = ''.join(
        f'<img{" class=photo" if max(image.shape[:2]) > 128 else ""} src="{pictures.data_uri(image)}" alt="">'
        for image in row.images
    )
    tokens = ''.join(
        f'<span class="tok {token.kind}{" loss" if token.loss else ""}"'
        f' title="{token.slots} × loss {token.loss:.4g}">{escape(spelt(token))}</span>'
        for token in row.tokens
    )
    note = f'<p class="about">{escape(row.note)}</p>' if row.note else ''
    return (
        f'<div class="card inspected"><div class="images">{images}</div><div><h3>{escape(row.source)}, '
        f'record {row.record}</h3><div class="toks">{tokens}</div>{note}</div>{_mask(row)}</div>'
    )


def _mask(row: Row) -> str:
    """Who sees whom, as SVG: what a row sees, in the colours of what is seen."""
    if row.sees is None:
        return ''
    count = len(row.tokens)
    labelled = count <= _MOST_LABELLED
    margin = 8 * _CELL if labelled else _CELL
    side = margin + count * _CELL
    shapes = []
    for query, (token, line) in enumerate(zip(row.tokens, row.sees, strict=True)):
        y = margin + query * _CELL
        if labelled:
            name = escape(spelt(token)[:16])
            shapes.append(f'<text x="{margin - 4}" y="{y + _CELL - 3}" text-anchor="end">{name}</text>')
            x = margin + query * _CELL + _CELL - 3
            shapes.append(f'<text transform="translate({x} {margin - 4}) rotate(-90)">{name}</text>')
        # Neighbours of one kind are one shape.
        start = 0
        for key in range(1, count + 1):
            if key < count and (line[key], row.tokens[key].kind) == (line[start], row.tokens[start].kind):
                continue
            kind = row.tokens[start].kind if line[start] else 'unseen'
            x, width = margin + start * _CELL, (key - start) * _CELL
            shapes.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{_CELL}"/>')
            start = key
    return f'<svg class="sees" viewBox="0 0 {side} {side}" style="width:{min(side, 380)}px">{"".join(shapes)}</svg>'


def _counts(inspection: Inspection) -> str:
    names = [field.name.replace('_', ' ') for field in dataclasses.fields(Counts)]
    head = ''.join(f'<th>{name}</th>' for name in ('', *names))
    rows = ''.join(
        f'<tr><td>{escape(name)}</td>{"".join(f"<td>{value:,}</td>" for value in dataclasses.astuple(counts))}</tr>'
        for name, counts in inspection.counts.items()
    )
    worst = ''.join(
        f'<p><b>{escape(cut.source)}, record {cut.record}</b>, {cut.lost} of {cut.length} tokens cut: '
        f'{escape(cut.kept)}<del>{escape(cut.left_out)}</del></p>'
        for cut in inspection.worst
    )
    table = f'<div class="card"><table><thead><tr>{head}</tr></thead>{rows}</table></div>'
    return f'<div class="tables wide">{table}</div>' + (f'<div class="card worst">{worst}</div>' if worst else '')
