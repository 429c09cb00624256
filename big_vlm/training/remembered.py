"""A working directory remembers its config, and refuses another one."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from big_vlm import config
from big_vlm.config import Eval, Stage, UserError, whole_file
from big_vlm.training import tokenizers, workdirs

# Section ('': the stage) → what may change between two runs in one workdir: where it runs, how it fits there, what is
# logged, kept and evaluated.
_FREE = {
    '': ('mesh', 'accumulate', 'log_every', 'checkpoint', 'guards', 'evals', 'profile', 'wandb'),
    'data': ('data_dir', 'workers', 'threads', 'prefetch'),
    'model': ('loss_form', 'token_loss', 'token_chunk', 'remat', 'scan'),
    'optimizer': ('offload',),
}

_CONFIG = 'config.json'
_NOT_SCORED = ('every', 'batch_size')  # settings of an evaluation that its scores do not depend on


def remember(workdir: pathlib.Path, stages: Mapping[str, Stage]) -> None:
    """Writes the config beside what it makes, once `check` has let it pass.

    Scores of evaluations that have changed since are taken away.
    """
    before = check(workdir, stages)
    for name, kept in scores(workdir, stages).items():
        if kept != workdirs.scores(workdir / name):
            workdirs.write_scores(workdir / name, kept)
    whole_file.write_text(workdir / _CONFIG, json.dumps(before | _plain(stages), indent=1))


def scores(workdir: pathlib.Path, stages: Mapping[str, Stage]) -> dict[str, dict[str, Any]]:
    """Stage → evaluation → scores, of evaluations that are what they were. UserError for a damaged config.json."""
    before, now = _stored(workdir), _plain(stages)

    def asked(evaluation: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in evaluation.items() if key not in _NOT_SCORED}

    def is_same(name: str, which: str) -> bool:
        wanted = now[name]['evals'].get(which)
        if wanted is None or 'evals' not in before.get(name, {}):
            return True
        made = before[name]['evals'].get(which)
        return made is not None and asked(made) == asked(wanted)

    return {
        name: {which: made for which, made in workdirs.scores(workdir / name).items() if is_same(name, which)}
        for name in now
    }


def scored(stage: Stage) -> dict[str, Any]:
    """What the scores that `checkpoint.best` goes by are of, as JSON brings it back; {} without it.

    Defaults are left out, so that a setting which comes later makes no score another's.
    """
    best = stage.checkpoint.best
    if not best:
        return {}
    evaluation = stage.evals[best.partition('/')[0]]
    given, default = (config.to_dict(one) for one in (evaluation, Eval(kind=evaluation.kind)))
    own = {key: value for key, value in given.items() if key not in _NOT_SCORED and value != default[key]}
    return {'best': best, 'kind': evaluation.kind, **own}


def check(workdir: pathlib.Path, stages: Mapping[str, Stage]) -> dict[str, dict[str, Any]]:
    """Stage → the config with which a run in this folder was begun, {} where none was.

    Raises UserError if that is another one, or cannot be read.
    """
    before, now = _stored(workdir), _plain(stages)
    changed = told(
        key
        for name in now
        if name in before and (workdir / name).is_dir()
        for key in changes(_binding(before[name]), _binding(now[name]), name)
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
    return before


def _stored(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    file = workdir / _CONFIG
    if not file.is_file():
        return {}
    try:
        return {name: _today(section) for name, section in json.loads(file.read_text()).items()}
    except (ValueError, AttributeError):
        raise UserError(f'{file}: damaged: remove it, or choose another workdir') from None


def _plain(stages: Mapping[str, Stage]) -> dict[str, dict[str, Any]]:
    """As JSON brings them back."""
    return {name: json.loads(json.dumps(config.to_dict(stage))) for name, stage in stages.items()}


def _today(stage: dict[str, Any]) -> dict[str, Any]:
    """A stored config with what has become a setting since: such a run used its default."""
    try:
        return _plain({'': config.parse_stage(stage)})['']
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
