"""Two runs on one page: their curves in the same axes, what their configs say differently, their scores side by side.

Read from the working directories alone (config.json, STAGE/metrics.csv, STAGE/evals.json), finished or not.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from big_vlm.config import UserError, whole_file
from big_vlm.reports import page, pictures, writers
from big_vlm.reports.sections import section

_ABSENT = '—'


def write(path: str | os.PathLike, first: str | os.PathLike, second: str | os.PathLike) -> None:
    """Writes the page of two working directories. Raises UserError if one is none, or for what the disk refuses."""
    runs = [Path(run) for run in (first, second)]
    # Names that tell them apart: `runs/a/x` and `runs/b/x` are both x.
    names = [run.resolve().name for run in runs]
    names = [str(run) for run in runs] if names[0] == names[1] else names
    whole_file.write_text(path, render(names, [_config(run) for run in runs], runs))


def render(names: Sequence[str], configs: Sequence[Mapping[str, Any]], runs: Sequence[Path]) -> str:
    """The page as text, of two names, two configs as config.json has them, and two working directories."""
    title = f'{names[0]} and {names[1]}'
    rows = [(key, *map(_shown, values)) for key, *values in differences(*configs)]
    body = [
        f'<header><div class="eyebrow">big_vlm, two runs</div><h1>{escape(title)}</h1></header>',
        section('Config', 'What they say differently.', _table(names, rows) or '<p>Nothing: they say the same.</p>'),
    ]
    if scores := _scores(names, runs):
        body.append(section('Scores', 'Of the evaluations; the difference is second less first.', scores))
    stages = list(dict.fromkeys(stage for run in configs for stage in run))
    curves = ''.join(_curves(names, runs, stage) for stage in stages)
    body.append(section('Curves', 'Both runs in the same axes.', curves))
    return page.document(title, ''.join(body))


def differences(first: Any, second: Any, path: str = '') -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, value) where two nested dicts differ; None stands for a key that one does not have."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys([*first, *second]):
            yield from differences(first.get(key), second.get(key), f'{path}.{key}' if path else str(key))
    elif first != second:
        yield path, first, second


def _config(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        raise UserError(f'{run} is no working directory: it has no config.json that can be read') from None


def _curves(names: Sequence[str], runs: Sequence[Path], stage: str) -> str:
    tables = [writers.read_csv(run / stage / 'metrics.csv') for run in runs]
    columns = sorted(dict.fromkeys([*tables[0], *tables[1]]), key=lambda name: 'loss' not in name)
    plots = [
        pictures.curves(
            {name: table[column] for name, table in zip(names, tables, strict=True) if table.get(column)},
            column,
            loss='loss' in column,
            size=(3.6, 1.9),
        )
        for column in columns
    ]
    last = [(column, *(_number(table.get(column, ())) for table in tables)) for column in columns]
    more = f'<details><summary>last values</summary>{_table(names, last)}</details>'
    plots = f'<div class="plots small">{"".join(plots)}</div>'
    return f'<div class="card stage"><h3>{escape(stage)}</h3>{plots}{more}</div>' if columns else ''


def _number(points: Sequence[tuple[int, float]]) -> str:
    return f'{points[-1][1]:.6g} at {points[-1][0]:,}' if points else _ABSENT


def _scores(names: Sequence[str], runs: Sequence[Path]) -> str:
    scores = [dict(_entries(run)) for run in runs]
    rows = []
    for key in dict.fromkeys([*scores[0], *scores[1]]):
        a, b = (score.get(key) for score in scores)
        both = a is not None and b is not None
        rows.append((key, *(_ABSENT if x is None else f'{x:.4g}' for x in (a, b)), f'{b - a:+.4g}' if both else ''))
    return _table([*names, 'difference'], rows)


def _entries(run: Path) -> Iterator[tuple[str, float]]:
    for file in sorted(run.glob('*/evals.json')):
        try:
            for evaluation, metrics in json.loads(file.read_text(encoding='utf-8')).items():
                for metric, entry in metrics.items():
                    yield f'{file.parent.name}: {evaluation}: {metric}', float(entry['score'])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f'{file} is damaged: {type(error).__name__}: {error}') from error


def _shown(value: Any) -> str:
    return _ABSENT if value is None else json.dumps(value, ensure_ascii=False)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ''
    head = ''.join(f'<th>{escape(text)}</th>' for text in ('', *heads))
    body = ''.join('<tr>' + ''.join(f'<td>{escape(cell)}</td>' for cell in row) + '</tr>' for row in rows)
    return f'<div class="tables wide"><div class="card"><table><thead><tr>{head}</tr></thead>{body}</table></div></div>'
