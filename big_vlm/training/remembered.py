"""A working directory remembers its config, and refuses another one."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from big_vlm import config
from big_vlm.config import Stage, UserError, whole_file
from big_vlm.training import tokenizers, workdirs

# Section ('': the stage) → what may change between two runs in one workdir: where it runs, how it fits there, what is
# logged, kept and evaluated.
_FREE = {
    '': ('mesh', 'accumulate', 'log_every', 'checkpoint', 'guards', 'evals', 'profile', 'wandb'),
    'data': ('data_dir', 'workers', 'threads', 'prefetch'),
    'model': ('loss_form', 'token_loss', 'token_chunk', 'remat', 'scan'),
}

_NOT_SCORED = ('every', 'batch_size')  # settings of an evaluation that its scores do not depend on


def remember(workdir: pathlib.Path, stages: Mapping[str, Stage]) -> None:
    """Writes the config beside what it makes, and refuses a workdir that another config has begun.

    Scores of evaluations that have changed since are taken away.
    """
    file = workdir / 'config.json'
    now = {name: config.to_dict(stage) for name, stage in stages.items()}
    if file.is_file():
        try:
            before = {name: _today(section) for name, section in json.loads(file.read_text()).items()}
        except (ValueError, AttributeError):
            raise UserError(f'{file}: damaged: remove it, or choose another workdir') from None
        changed = told(
            key
            for name in now
            if name in before and (workdir / name).is_dir()
            for key in changes(_binding(before[name]), _binding(json.loads(json.dumps(now[name]))), name)
        )
        if changed:
            raise UserError(
                f'{workdir} was begun with another config ({changed}): choose another --workdir, or remove this one'
            )
        # What the tokenizer there was asked to have: it may have fewer pieces.
        made = [section['tokenizer']['vocab_size'] for section in before.values() if not section['tokenizer']['path']]
        asked, tokenizer = tokenizers.asked_size(stages), workdir / 'tokenizer.model'
        if asked and made and asked not in made and tokenizer.is_file():
            raise tokenizers.another_size(tokenizer, made[0], asked)
        for name in now.keys() & before.keys():
            _forget_scores(workdir / name, before[name].get('evals', {}), json.loads(json.dumps(now[name]['evals'])))
        now = before | now
    whole_file.write_text(file, json.dumps(now, indent=1))


def _forget_scores(folder: pathlib.Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Of evaluations that are others now under the same name: they are made again."""

    def asked(evaluation: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in evaluation.items() if key not in _NOT_SCORED}

    scores = workdirs.scores(folder)
    kept = {n: s for n, s in scores.items() if n not in now or n not in before or asked(now[n]) == asked(before[n])}
    if kept != scores:
        workdirs.write_scores(folder, kept)


def _today(stage: dict[str, Any]) -> dict[str, Any]:
    """A stored config with what has become a setting since: such a run used its default."""
    try:
        return json.loads(json.dumps(config.to_dict(config.parse_stage(stage))))
    except UserError:  # Something it says is none any more, which the comparison then shows.
        return stage


def _binding(stage: dict[str, Any]) -> dict[str, Any]:
    return {
        key: {k: v for k, v in value.items() if k not in _FREE[key]} if key in _FREE else value
        for key, value in stage.items()
        if key not in _FREE['']
    }


def told(changes: Iterable[str]) -> str:
    """The first three of them."""
    first, *more = [*changes][:4] or ['']
    return '; '.join([first, *more[:2], *['…'] * (len(more) > 2)])


def changes(before: Any, now: Any, path: str = '') -> Iterator[str]:
    """'key: before → now' of all that differs in two nested dicts, by dotted keys below `path`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from changes(before.get(key), now.get(key), f'{path}.{key}' if path else key)
    elif before != now:
        yield f'{path}: {before!r} → {now!r}'
