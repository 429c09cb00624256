"""The sections of a report, each a function from plain data to HTML; nothing to show is an empty string.

Every text that comes from outside passes through `escape`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from big_vlm.reports import pictures
from big_vlm.reports.report import Answer, Attention, Calibration, Patches, Report, Similarity, Stage

_MOST_PAIRS = 12
_MOST_TOKENS = 24


def header(report: Report) -> str:
    """What was trained, its best scores, how to talk to it."""
    tiles = []
    for evaluation, entries in report.scores.items():
        for name, entry in list(entries.items())[:1]:
            tiles.append(
                f'<div class="card tile"><div class="what">{escape(evaluation)}<b>{escape(_readable(name))}</b></div>'
                f'<div class="big">{_percent(entry["score"], "<small>%</small>")}</div>{_bar(entry)}'
                f'<div class="chance">{_chance(entry)}{int(entry["n"]):,} examples</div></div>'
            )
    commands = ''.join(
        f'<div>{escape(purpose)}</div><pre>{escape(command)}</pre>' for purpose, command in report.commands.items()
    )
    lead = f'<p class="lead">{escape(report.summary)}</p>' if report.summary else ''
    opening = f'<div><div class="eyebrow">big_vlm run report</div><h1>{escape(report.title)}</h1>{lead}'
    opening += _facts(report.facts) + '</div>'
    shot = next((shot for shot in report.answers if shot.correct and not len(shot.boxes)), None)
    if shot is not None:
        said = f'<p class="ask">{_spoken(shot.prompt)}</p><p class="say">{_spoken(shot.answer)}</p>'
        opening += f'<div class="card talk"><div class="view">{_img(shot.image)}</div>{said}</div>'
    return (
        f'<header><div class="{"plain" if shot is None else "hero"}">{opening}</div>'
        + (f'<div class="tiles">{"".join(tiles)}</div>' if tiles else '')
        + (f'<div class="card commands">{commands}</div>' if commands else '')
        + '</header>'
    )


def scores(evaluations: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One small table per evaluation: score and chance as a bar and as numbers."""
    tables = []
    for evaluation, entries in evaluations.items():
        rows = []
        for name, entry in entries.items():
            kind = 'slice' if '=' in name else 'whole'
            rows.append(
                f'<tr class="{kind}"><td>{escape(_readable(name, last=kind == "slice"))}</td>'
                f'<td class="bars">{_bar(entry)}</td><td{_interval(entry)}>{_small(entry["score"])}</td>'
                f'<td class="quiet">{_small(entry["chance"]) if "chance" in entry else ""}</td>'
                f'<td class="quiet">{int(entry["n"]):,}</td></tr>'
            )
        tables.append(
            f'<div class="card"><h3>{escape(evaluation)}</h3><table><thead><tr><th></th><th></th><th>score</th>'
            f'<th>chance</th><th>n</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        )
    about = (
        'The tick on each bar is chance, on the same examples: what a model scores that never sees the image; of a '
        'calibration error, one that is always certain; of selective accuracy, a confidence that says nothing; of '
        'perplexity, to know only how often each token occurs.'
    )
    return section('Evaluation', about, f'<div class="tables">{"".join(tables)}</div>' if tables else '')


def calibration(found: Sequence[Calibration]) -> str:
    """For each evaluation of confidence, a reliability diagram and the curve of selective accuracy."""
    blocks = []
    for one in found:
        bins = [('var(--muted)', one.before), ('var(--accent)', one.after)]
        most = max((count for _, part in bins for _, _, count in part), default=1)
        dots = ''.join(
            f'<circle cx="{100 * x:.2f}" cy="{100 - 100 * y:.2f}" r="{1 + 3 * (n / most) ** 0.5:.2f}" fill="{ink}"/>'
            for ink, part in bins
            for x, y, n in part
        )
        diagonal = '<path d="M0 100L100 0" stroke="var(--line)" fill="none"/>'
        line = 'L'.join(f'{100 * x:.2f} {100 - 100 * y:.2f}' for x, y in one.selective)
        curve = f'<path d="M{line}" stroke="var(--accent)" fill="none"/>'
        plots = ((diagonal + dots, 'accuracy over confidence'), (curve, 'accuracy over the share of answers kept'))
        drawn = ''.join(
            f'<div><svg viewBox="-4 -4 108 108"><path d="M0 0V100H100" stroke="var(--line)" fill="none"/>{plot}</svg>'
            f'<div class="mass">{what}</div></div>'
            for plot, what in plots
        )
        facts = _facts({'temperature': f'{one.temperature:.3g}'})
        blocks.append(
            f'<div class="card stage"><h3>{escape(one.name)}</h3>{facts}<div class="plots small">{drawn}</div></div>'
        )
    about = (
        'Left: answers by how sure the model is, grey as it says, coloured with the temperature that was fitted on '
        'other examples; on the diagonal it is right as often as it thinks. Right: how often it is right on the '
        'answers it is surest of. Both axes run from 0 to 1.'
    )
    return section('Does it know when it is right?', about, ''.join(blocks))


def answers(shots: Sequence[Answer]) -> str:
    """Cards of test images with what was asked and answered."""
    if not shots:
        return ''
    judged = [shot.correct for shot in shots if shot.correct is not None]
    about = f'{sum(judged)} of the {len(judged)} judged answers here are right.' if judged else ''
    key = ''
    if any(len(shot.boxes) or len(shot.true_boxes) for shot in shots):
        key = ''.join(
            f'<span><svg viewBox="0 0 22 12">{_box((0.1, 0.05, 0.9, 0.95), 22, 12, kind)}</svg>{kind} box</span>'
            for kind in ('predicted', 'true')
        )
    filter_ = (
        '<input type="checkbox" id="only"><label for="only">only the wrong ones</label>' if False in judged else ''
    )
    cards = ''.join(map(_shot, shots))
    # The check box filters by CSS alone, so it has to stand beside the grid, not inside the key.
    return section(
        'Asked and answered',
        f'Images the model was not trained on. {about}',
        f'<div class="asked">{filter_}<div class="key">{key}</div><div class="grid">{cards}</div></div>',
    )


def _shot(shot: Answer) -> str:
    mark = {True: 'good', False: 'bad', None: ''}[None if shot.correct is None else bool(shot.correct)]
    badge = {'good': '✓', 'bad': '✗'}.get(mark, '') + (f' {escape(shot.note)}' if shot.note else '')
    height, width = np.shape(shot.image)[:2]
    drawn = [_box(box, width, height, 'true') for box in np.reshape(shot.true_boxes, (-1, 4))]
    drawn += [_box(box, width, height, 'predicted') for box in np.reshape(shot.boxes, (-1, 4))]
    over = f'<svg viewBox="0 0 {width} {height}">{"".join(drawn)}</svg>' if drawn else ''
    return (
        f'<div class="card shot {mark}"><div class="view">{_img(shot.image)}{over}</div><div class="text">'
        f'<div class="top"><div class="prompt">{_spoken(shot.prompt)}</div>'
        + (f'<span class="badge">{badge.strip()}</span>' if badge else '')
        + f'</div><div class="answer">{_spoken(shot.answer) or "(nothing)"}</div>'
        f'<div class="truth">truth: {_spoken(shot.truth)}</div></div></div>'
    )


def attention(looks: Sequence[Attention]) -> str:
    """For each generated token, a heat map over the image."""
    blocks = []
    for look in looks:
        weights = np.asarray(look.weights, np.float64)
        if weights.ndim != 3 or len(weights) != len(look.tokens):
            raise ValueError(f'{len(look.tokens)} tokens need weights [T, rows, columns], got {weights.shape}')
        cells = [f'<div><div class="view">{_img(look.image)}</div><div class="mass">the image</div></div>']
        for token, weight in list(zip(look.tokens, weights, strict=True))[:_MOST_TOKENS]:
            over = pictures.data_uri(pictures.heat(weight))
            cells.append(
                f'<div><div class="view">{_img(look.image)}<img class="over" src="{over}" alt=""></div>'
                f'<div class="token">{escape(token)}</div>'
                f'<div class="mass">{100 * weight.sum():.0f}% on the image</div></div>'
            )
        blocks.append(
            f'<div class="card looks"><h3>{_spoken(look.prompt)}</h3><div class="strip">{"".join(cells)}</div></div>'
        )
    about = (
        'Attention of each answer token over the image patches, bright where it looks most. The percentage is how much '
        'of its attention goes to the image at all; the rest goes to the prompt and to the answer so far.'
    )
    return section('Where the answer looks', about, ''.join(blocks))


def patches(cut: Patches | None) -> str:
    """The image beside its patches, in the order in which they become tokens."""
    if cut is None:
        return ''
    rows, columns = cut.grid
    height, width = np.shape(cut.image)[:2]
    lines = [f'M0 {y * cut.size}H{columns * cut.size}' for y in range(rows + 1)]
    lines += [f'M{x * cut.size} 0V{rows * cut.size}' for x in range(columns + 1)]
    grid = (
        f'<path d="{"".join(lines)}" fill="none" stroke="#fff" stroke-opacity="0.75" stroke-width="{width / 240:.3f}"/>'
    )
    over = f'<svg viewBox="0 0 {width} {height}">{grid}</svg>'
    apart = pictures.data_uri(pictures.exploded(cut.image, cut.grid, cut.size))
    body = (
        f'<div class="card cut"><div class="view">{_img(cut.image)}{over}</div><div class="arrow">→</div>'
        f'<img src="{apart}" alt="patches"></div>'
    )
    about = (
        f'{width} × {height} pixels become {rows} × {columns} patches of {cut.size} × {cut.size}: '
        f'{rows * columns} image tokens, read row by row.'
    )
    return section('What the image tower sees', about, body)


def similarity(near: Similarity | None) -> str:
    """Captions down, images across, each cell as dark as the pair is near."""
    if near is None:
        return ''
    count = min(len(near.captions), _MOST_PAIRS)
    matrix = np.asarray(near.matrix, np.float64)[:count, :count].T  # One row per caption.
    low, high = float(matrix.min()), float(matrix.max())
    share = (matrix - low) / max(high - low, 1e-12)
    best = matrix.argmax(axis=0)
    head = ''.join(f'<th>{_img(image)}</th>' for image in near.images[:count])
    rows = []
    for i in range(count):
        cells = []
        for j in range(count):
            mark = ('own ' if i == j else '') + ('first ' if best[j] == i else '')
            mark += 'wrong' if best[j] == i and i != j else ''
            ink = 'var(--card)' if share[i, j] > 0.55 else 'var(--ink)'
            color = f'color-mix(in srgb, var(--accent) {100 * share[i, j]:.0f}%, var(--wash))'
            style = f'background:{color};color:{ink}'
            cells.append(f'<td><span class="{mark.strip()}" style="{style}">{matrix[i, j]:z.2f}</span></td>')
        rows.append(f'<tr><th>{escape(near.captions[i])}</th>{"".join(cells)}</tr>')
    right = int((best == np.arange(count)).sum())
    about = (
        f'Similarity of {count} test images and their captions. A green frame marks the pairs that belong together, '
        f'the largest value of each column is bold: {right} of {count} images find their own caption.'
    )
    body = f'<div class="card near"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
    return section('Images and captions', about, body)


def training(stages: Sequence[Stage]) -> str:
    """Loss and learning rate of each stage; other columns folded away, those of one value in words."""
    blocks = []
    for stage in stages:
        drawn = {name: points for name, points in stage.curves.items() if len(points)}
        losses = {name: points for name, points in drawn.items() if 'loss' in name}
        rates = {name: points for name, points in drawn.items() if re.search(r'\blr\b|learning_rate', name)}
        plots = [pictures.curves(losses, 'loss', loss=True)] if losses else []
        plots += [pictures.curves(rates, 'learning rate')] if rates else []
        others = {name: points for name, points in drawn.items() if name not in losses and name not in rates}
        still = {name: points[0][1] for name, points in others.items() if len({value for _, value in points}) == 1}
        moving = ''.join(
            pictures.curves({name: points}, name, size=(3.6, 1.9))
            for name, points in others.items()
            if name not in still
        )
        more = f'<div class="plots small">{moving}</div>' if moving else ''
        more += _facts({name: f'{value:.4g}' for name, value in still.items()})
        more = f'<details><summary>more curves</summary>{more}</details>' if more else ''
        blocks.append(
            f'<div class="card stage"><h3>{escape(stage.name)}</h3>{_facts(stage.facts)}'
            f'<div class="plots">{"".join(plots)}</div>{more}</div>'
        )
    return section('Training', '', ''.join(blocks))


def config(settings: Any) -> str:
    """The run's config, folded."""
    if not settings:
        return ''
    text = settings if isinstance(settings, str) else json.dumps(settings, indent=2, default=str, ensure_ascii=False)
    body = f'<details class="card"><summary>every setting of this run</summary><pre>{escape(text)}</pre></details>'
    return section('Config', '', body)


def section(title: str, about: str, body: str) -> str:
    """A titled part of a page, nothing where there is no body. All three are HTML."""
    if not body:
        return ''
    return f'<section><h2>{title}</h2><p class="about">{about}</p>{body}</section>'


def _facts(facts: Mapping[str, str]) -> str:
    items = ''.join(f'<div><span>{escape(k)}</span><b>{escape(str(v))}</b></div>' for k, v in facts.items())
    return f'<div class="facts">{items}</div>' if items else ''


def _img(image: np.ndarray) -> str:
    photo = ' class="photo"' if max(np.shape(image)[:2]) > 128 else ''
    return f'<img{photo} src="{pictures.data_uri(image)}" alt="">'


def _box(box: Sequence[float], width: float, height: float, kind: str) -> str:
    """A rectangle that shows on any ground: a dark line under a bright one, dashed for the truth."""
    y1, x1, y2, x2 = (float(v) for v in box)
    shape = f'x="{x1 * width:.2f}" y="{y1 * height:.2f}" width="{max(x2 - x1, 0) * width:.2f}"'
    shape += f' height="{max(y2 - y1, 0) * height:.2f}" fill="none" vector-effect="non-scaling-stroke"'
    color, dash = ('#ffd43b', '') if kind == 'predicted' else ('#ffffff', ' stroke-dasharray="4 3"')
    return (
        f'<rect {shape} stroke="#10131a" stroke-opacity="0.65" stroke-width="4"/>'
        f'<rect {shape} stroke="{color}" stroke-width="2"{dash}/>'
    )


def _bar(entry: Mapping[str, float]) -> str:
    values, lower = [float(entry.get(key, 0.0)) for key in ('score', 'chance')], entry.get('lower_is_better')
    full = max(*values, 1e-12) if lower else 1.0  # of an error, a perplexity: the worse of the two
    score, chance = (100 * min(max(value / full, 0.0), 1.0) for value in values)
    below = ' below' if (score > chance if lower else score < chance) else ''
    fill, tick = f'<i style="width:{score:.1f}%"></i>', f'<b style="left:calc({chance:.1f}% - 1px)"></b>'
    return f'<div class="bar{below}">{fill}{tick if "chance" in entry else ""}</div>'


def _chance(entry: Mapping[str, float]) -> str:
    return f'chance {_percent(entry["chance"])}, ' if 'chance' in entry else ''


def _interval(entry: Mapping[str, float]) -> str:
    """The 95 % interval, shown where the pointer rests on the score."""
    return f' title="95 %: {_small(entry["low"])} to {_small(entry["high"])}"' if 'low' in entry else ''


def _percent(value: float, sign: str = '%') -> str:
    return f'{100 * value:.1f}{sign}' if 0 <= value <= 1 else f'{value:.3g}'


def _small(value: float) -> str:
    return f'{value:.3f}' if abs(value) < 100 else f'{value:.1f}'


def _readable(name: str, last: bool = False) -> str:
    """'image_to_text/R@1' -> 'image to text · R@1'; of a slice, 'accuracy/held_out=True' -> 'held out: True'."""
    parts = name.split('/')[-1:] if last else name.split('/')
    text = ' · '.join(part.replace('_', ' ').replace('=', ': ') for part in parts)
    return re.sub(r'\biou\b', 'IoU', text)


def _spoken(text: str) -> str:
    """Escaped text in which location tokens are set small."""
    return re.sub(r'((?:&lt;(?:loc\d{4}|seg\d{3})&gt;)+)', r'<span class="loc">\1</span>', escape(text))
