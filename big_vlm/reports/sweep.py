"""A sweep's results in one table: what each run changed, beside the score of every evaluation, the best ones marked.

Read from the runs' working directories (STAGE/evals.json, STAGE/metrics.csv), finished or not.
"""

import csv
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from big_vlm.config import whole_file
from big_vlm.reports import page, writers
from big_vlm.reports.sections import section


@dataclasses.dataclass
class Column:
    """One column of the table.

    head: its name, in parts. cells: of each run, '' where there is none. best: the runs that have the best value.
    intervals: of each run, in words.
    """

    head: tuple[str, ...]
    cells: list[str]
    best: set[int] = dataclasses.field(default_factory=set)
    intervals: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def of_slice(self) -> bool:
        """Whether it is a part of the examples that was scored apart."""
        return '=' in self.head[-1]


def table(workdir: str | os.PathLike, runs: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """The columns for runs by name, each with the values of its swept keys."""
    folders = [Path(workdir) / name for name in runs]
    keys = dict.fromkeys(key for values in runs.values() for key in values)
    columns = [
        Column(tuple(key.lstrip(':').split('.')), [_shown(values.get(key, '')) for values in runs.values()])
        for key in keys
    ]
    losses = [_losses(folder) for folder in folders]
    columns += [
        Column((stage, 'loss'), [f'{found[stage]:.4g}' if stage in found else '' for found in losses])
        for stage in dict.fromkeys(stage for found in losses for stage in found)
    ]
    scores = [_scores(folder) for folder in folders]
    for head in dict.fromkeys(head for found in scores for head in found):
        entries = {i: found[head] for i, found in enumerate(scores) if head in found}
        values = {i: entry['score'] for i, entry in entries.items()}
        best = (min if any(entry.get('lower_is_better') for entry in entries.values()) else max)(values.values())
        columns.append(
            Column(
                head,
                [f'{values[i]:.4g}' if i in values else '' for i in range(len(folders))],
                {i for i, value in values.items() if value == best} if len(values) > 1 else set(),
                {i: f'{entry["low"]:.4g} to {entry["high"]:.4g}' for i, entry in entries.items() if 'low' in entry},
            )
        )
    return columns


def text(columns: Sequence[Column]) -> str:
    """For a terminal: heads in lines one below another, a star behind the best of each column; no slices."""
    columns = [column for column in columns if not column.of_slice]
    height = max(len(column.head) for column in columns)
    printed = []
    for column in columns:
        cells = [f'{cell}{"*" if i in column.best else " "}' for i, cell in enumerate(column.cells)]
        head = [f'{part} ' for part in (*[''] * (height - len(column.head)), *column.head)]
        width = max(map(len, [*head, *cells]))
        printed.append([line.rjust(width) for line in (*head, *cells)])
    return '\n'.join(' '.join(line).rstrip() for line in zip(*printed, strict=True))


def write(workdir: str | os.PathLike, names: Sequence[str], columns: Sequence[Column]) -> Path:
    """Writes WORKDIR/sweep.csv and sweep.html. Returns the page's path."""
    workdir = Path(workdir)
    with whole_file.writing(workdir / 'sweep.csv') as part, part.open('w', newline='', encoding='utf-8') as file:
        sheet = csv.writer(file, lineterminator='\n')
        sheet.writerow(['run', *('/'.join(column.head) for column in columns)])
        sheet.writerows([name, *cells] for name, *cells in zip(names, *(c.cells for c in columns), strict=True))
    about = 'The last loss of each stage and the scores of its evaluations, the best in bold, intervals to point at.'
    body = f'<header><div class="eyebrow">big_vlm, a sweep</div><h1>{escape(workdir.resolve().name)}</h1></header>'
    body += section('Runs', about, _html(names, [column for column in columns if not column.of_slice]))
    if slices := [column for column in columns if column.of_slice]:
        body += section('Slices', 'The same on parts of the examples.', _html(names, slices))
    path = workdir / 'sweep.html'
    whole_file.write_text(path, page.document(workdir.resolve().name, body))
    return path


def _html(names: Sequence[str], columns: Sequence[Column]) -> str:
    head = ''.join(f'<th>{"<br>".join(map(escape, parts))}</th>' for parts in (('run',), *(c.head for c in columns)))
    rows = ''
    for i, name in enumerate(names):
        cells = ''
        for column in columns:
            about = f' title="{column.intervals[i]}"' if i in column.intervals else ''
            cell = escape(column.cells[i])
            cells += f'<td{about}>{f"<b>{cell}</b>" if i in column.best else cell}</td>'
        rows += f'<tr><td>{escape(name)}</td>{cells}</tr>'
    return f'<div class="tables wide"><div class="card"><table><thead><tr>{head}</tr></thead>{rows}</table></div></div>'


def _scores(folder: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    files = {stage: folder / stage / 'evals.json' for stage in _stages(folder)}
    return {
        (stage, evaluation, *metric.split('/')): entry
        for stage, file in files.items()
        if file.is_file()
        for evaluation, metrics in json.loads(file.read_text(encoding='utf-8')).items()
        for metric, entry in metrics.items()
    }


def _losses(folder: Path) -> dict[str, float]:
    """Stage → the last one that was written."""
    tables = {stage: writers.read_csv(folder / stage / 'metrics.csv') for stage in _stages(folder)}
    return {stage: table['loss'][-1][1] for stage, table in tables.items() if table.get('loss')}


def _stages(folder: Path) -> list[str]:
    file = folder / 'config.json'
    return list(json.loads(file.read_text(encoding='utf-8'))) if file.is_file() else []


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f'{value:.6g}' if isinstance(value, float) else str(value)
