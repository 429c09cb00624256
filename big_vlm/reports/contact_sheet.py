"""An inspection as one picture, for where no browser is. Letters that its font lacks are boxes; the page has them."""

import os
import textwrap

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from big_vlm.config import whole_file
from big_vlm.reports.inspection import KINDS, Inspection, Row, spelt

_PAPER, _CARD, _INK, _MUTED, _BAD = '#faf9f6', '#ffffff', '#1b2130', '#6b7280', '#c2360c'
_OF = {'image': '#7c6bd6', 'prefix': '#2f7fd0', 'text': '#2f7fd0', 'suffix': '#e08a1e', 'padding': '#9aa0aa'}
_WIDTH, _EDGE, _IMAGE, _MASK, _CELL = 1280, 28, 150, 220, 18  # pixels; a mask's cells are at most so large
_LINE, _MOST = 26, 144  # height, and letters of 14 pixels


def write(path: str | os.PathLike, inspection: Inspection) -> None:
    """Writes the picture, a PNG."""
    with whole_file.writing(path) as part:
        draw(inspection).save(part, 'PNG')


def draw(inspection: Inspection) -> Image.Image:
    """The picture: facts, problems, the legend, then a card for every row."""
    cards = [_card(row) for row in inspection.rows]
    head = _head(inspection)
    height = head.height + sum(card.height + 14 for card in cards) + _EDGE
    sheet = Image.new('RGB', (_WIDTH, height), _PAPER)
    sheet.paste(head, (0, 0))
    y = head.height
    for card in cards:
        sheet.paste(card, (_EDGE, y))
        y += card.height + 14
    return sheet


def _head(inspection: Inspection) -> Image.Image:
    lines = [(24, _INK, inspection.title)]
    lines += [(14, _MUTED, f'{key:10} {value}') for key, value in inspection.facts.items()]
    for name, counts in inspection.counts.items():
        parts = [f'{value:,} {key.replace("_", " ")}' for key, value in vars(counts).items()]
        lines.append((14, _INK, f'{name:10} {", ".join(parts)}'))
    for cut in inspection.worst:
        said = f'{cut.source}, record {cut.record}: {cut.lost} of {cut.length} tokens cut: {cut.kept} | {cut.left_out}'
        lines.append((14, _MUTED, said if len(said) < _MOST else said[: _MOST - 1] + '…'))
    for problem in inspection.problems:
        lines += [(14, _BAD, line) for line in textwrap.wrap(problem, _MOST)]
    image = Image.new('RGB', (_WIDTH, 2 * _EDGE + sum(size + 10 for size, *_ in lines) + _LINE), _PAPER)
    pen, y = ImageDraw.Draw(image), _EDGE
    for size, color, text in lines:
        pen.text((_EDGE, y), text, color, _font(size))
        y += size + 10
    kinds = dict.fromkeys(token.kind for row in inspection.rows for token in row.tokens)
    legend = [(KINDS[kind], kind, False) for kind in KINDS if kind in kinds]
    legend += [('carries loss', 'suffix', True)] * ('suffix' in kinds)
    _flow(pen, legend, (_EDGE, y + 6), _WIDTH - _EDGE)
    return image


def _card(row: Row) -> Image.Image:
    """One row: its images, its tokens, its mask."""
    left, right = _IMAGE + 40, _WIDTH - 2 * _EDGE - _MASK - 40
    tokens = [(spelt(token), token.kind, bool(token.loss)) for token in row.tokens]
    pictures = [_fitted(picture) for picture in row.images]
    text = 46 + _flow(None, tokens, (left, 0), right) + (24 if row.note else 0)
    below = sum(picture.height + 8 for picture in pictures)
    image = Image.new('RGB', (_WIDTH - 2 * _EDGE, max(text, below, _MASK if row.sees is not None else 0) + 40), _CARD)
    pen, y = ImageDraw.Draw(image), 20
    for picture in pictures:
        image.paste(picture, (20, y))
        y += picture.height + 8
    pen.text((left, 18), f'{row.source}, record {row.record}', _INK, _font(15))
    end = _flow(pen, tokens, (left, 46), right)
    if row.note:
        pen.text((left, 46 + end + 6), row.note[:110], _MUTED, _font(13))
    if row.sees is not None:
        image.paste(_mask(row), (right + 30, 20))
    return image


def _mask(row: Row) -> Image.Image:
    """Who sees whom: a square a pair, beside the colours of the queries and below those of the keys."""
    count = len(row.tokens)
    kinds = [token.kind for token in row.tokens]
    cells = np.full((count + 1, count + 1, 3), 255, np.uint8)
    colors = np.array([[int(_OF[kind][i : i + 2], 16) for i in (1, 3, 5)] for kind in kinds], np.uint8)
    cells[0, 1:], cells[1:, 0] = colors, colors
    cells[1:, 1:] = np.where(row.sees[..., None], colors[None], np.uint8(238))
    side = min(_MASK, _CELL * (count + 1))
    image = Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST)
    if side >= 5 * (count + 1):  # room for lines between them
        pen = ImageDraw.Draw(image)
        for i in range(count + 2):
            at = round(i * side / (count + 1))
            width = 3 if i == 1 else 1
            pen.line((at, 0, at, side), 'white', width)
            pen.line((0, at, side, at), 'white', width)
    return image


def _fitted(picture: np.ndarray) -> Image.Image:
    """As wide as its column; small pictures keep their pixels visible."""
    height = max(round(_IMAGE * picture.shape[0] / picture.shape[1]), 1)
    way = Image.Resampling.NEAREST if max(picture.shape[:2]) <= 128 else Image.Resampling.LANCZOS
    fitted = Image.fromarray(picture).resize((_IMAGE, height), way)
    fitted.thumbnail((_IMAGE, 2 * _IMAGE))
    return fitted


def _flow(pen: ImageDraw.ImageDraw | None, tokens: list[tuple[str, str, bool]], at: tuple[int, int], right: int) -> int:
    """Draws (text, kind, loss) from `at` on, line by line. Returns the height; without a pen, that alone."""
    font, (x, y) = _font(14), at
    for text, kind, loss in tokens:
        width = round(font.getlength(text)) + 10
        if x + width > right and x > at[0]:
            x, y = at[0], y + _LINE
        if pen:
            pen.rectangle((x, y, x + width, y + _LINE - 6), _blend(_OF[kind]))
            if loss:
                pen.rectangle((x, y + _LINE - 8, x + width, y + _LINE - 5), _OF[kind])
            pen.text((x + 5, y + 2), text, _INK, font)
        x += width + 3
    return y + _LINE - at[1]


def _blend(color: str) -> tuple[int, ...]:
    return tuple(round(255 - 0.28 * (255 - int(color[i : i + 2], 16))) for i in (1, 3, 5))


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f'{matplotlib.get_data_path()}/fonts/ttf/DejaVuSansMono.ttf', size)
