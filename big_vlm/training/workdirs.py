"""What all of a run's working directory needs: keys of stages in errors, scores by stage, lines to the user."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from big_vlm import config
from big_vlm.config import Stage, whole_file

_SCORES = 'evals.json'


def where(stages: Mapping[str, Stage], name: str) -> str:
    """The dotted key of a stage."""
    return 'config' if len(stages) == 1 and name == 'train' else f'config.{name}'


def scores(folder: pathlib.Path) -> dict[str, Any]:
    """Evaluation → its scores, of a stage's folder; {} where nothing was evaluated."""
    file = folder / _SCORES
    return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}


def write_scores(folder: pathlib.Path, scores: Mapping[str, Any], must: bool = True) -> None:
    """In the place of those that are there. Raises as `whole_file.write_text` does."""
    whole_file.write_text(folder / _SCORES, json.dumps(scores, indent=1), must)


def say(line: str) -> None:
    """One line on standard output, from the first process."""
    if jax.process_index() == 0:
        config.say(line)
