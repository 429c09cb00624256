"""Reading a config file and the command line's overrides. Values are parsed by the schema's types, never evaluated."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import pathlib
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from big_vlm.config.coercion import plain, section_types
from big_vlm.config.errors import UserError, unknown
from big_vlm.config.schema import Stage


def load_config(spec: str, overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The nested dict of a config file, overridden; not yet validated.

    Args:
      spec: 'configs/NAME.py' or 'configs/NAME.py:ARG'. The file's `get_config` receives ARG, '' if there is none.
      overrides: dotted key → text, such as {'pretrain.optimizer.lr': '3e-4', 'evals.test.metrics': "('cider',)"}. The
        text is read by the type of the schema's field. Names inside dicts (sources, evals) must exist already.

    Raises:
      UserError: no such file, no `get_config`, a file or argument that fails, an unknown key, a text of another type.
    """
    path, _, arg = spec.partition(':')
    config = call(path, 'get_config', arg)
    if config is None:
        raise UserError(f'{path}: no function get_config(arg)')
    config = plain(config)
    if not isinstance(config, dict):
        raise UserError(f'{path}: get_config must return a ConfigDict, not {type(config).__name__}')
    for key, text in (overrides or {}).items():
        _override(config, key, text)
    return config


def call(path: str, function: str, arg: str) -> Any:
    """What a config file's function of that name makes of `arg`; None if it has no such function.

    Raises UserError: no such file, a file or a function that fails.
    """
    try:
        made = getattr(_module(path), function, None)
        if not callable(made):
            return None
        if inspect.signature(made).parameters:
            return made(arg)
        if arg and function == 'get_config':
            raise UserError(f'{path}: {function} takes no argument, got {arg!r}')
        return made()
    except UserError:
        raise
    except Exception as error:  # whatever a person's config file raises is about that file
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if pathlib.Path(f.filename).resolve() == pathlib.Path(path).resolve()]
        place = f'{path}:{lines[-1]}' if lines else path
        if isinstance(error, SyntaxError):  # of this file, or of one that it imports
            place = f'{error.filename}:{error.lineno}'
        kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
        message = error.msg if isinstance(error, SyntaxError) else ' '.join(str(error).split())
        raise UserError(f'{place}: {kind}{message}' + (f' (argument {arg!r})' if arg else '')) from error


def take_overrides(argv: Sequence[str], flag: str = 'config') -> tuple[list[str], dict[str, str]]:
    """Splits a command line into (all else, what is given as --`flag`.KEY=TEXT).

    >>> take_overrides(['main', '--config=a.py', '--config.optimizer.lr=1e-4', '--config.seed', '3'])
    (['main', '--config=a.py'], {'optimizer.lr': '1e-4', 'seed': '3'})
    """
    rest, overrides, words = [], {}, iter(argv)
    for word in words:
        key = word.lstrip('-')
        if not (word.startswith('-') and key.startswith(f'{flag}.')):
            rest.append(word)
            continue
        key, equals, text = key.removeprefix(f'{flag}.').partition('=')
        if not equals:
            text = next(words, None)
            if text is None:
                raise UserError(f'--{flag}.{key} has no value: write --{flag}.{key}=VALUE')
        if overrides.get(key, text) != text:
            raise UserError(f'--{flag}.{key} is given twice, as {overrides[key]!r} and {text!r}: keep one')
        overrides[key] = text
    return rest, overrides


def _module(path: str) -> types.ModuleType:
    file = pathlib.Path(path)
    if not file.is_file():
        near = sorted(str(f) for f in file.parent.glob('*.py')) if file.parent.is_dir() else []
        raise unknown('config file', path, near, '--config') if near else UserError(f'--config: no file {path!r}')
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    # A config may import its neighbours, as `configs.arguments`.
    root = str(file.resolve().parent.parent)
    sys.path.insert(0, root)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(root)
    return module


def _override(config: dict[str, Any], key: str, text: str) -> None:
    """Sets one dotted key in place."""
    flag = f'--config.{key}'
    if key == 'stages':
        config['stages'] = _read(tuple[str, ...], text, flag)
        return
    names, node, kind = key.split('.'), config, Stage
    if 'stages' in config:
        stages = {name: section for name, section in config.items() if isinstance(section, dict)}
        if len(names) == 1 or names[0] not in stages:
            raise unknown('key', names[0], ['stages', *(f'{stage}.…' for stage in stages)], flag)
        node, names = stages[names[0]], names[1:]
    for i, name in enumerate(names):
        if dataclasses.is_dataclass(kind):
            hints = section_types(kind)
            if name not in hints:
                raise unknown('key', name, hints, flag)
            kind = hints[name]
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            if dataclasses.is_dataclass(kind) and name not in node:
                raise unknown('name', name, node, flag)
        else:
            raise UserError(f'{flag}: {names[i - 1]} has no fields')
        if i < len(names) - 1:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UserError(f'{flag}: {name} is {node!r} and has no fields')
    node[names[-1]] = _read(kind, text, flag)


def _read(kind: Any, text: str, where: str) -> Any:
    """The value that `text` means for a field of type `kind`; `validate` checks the rest."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _read(args[0], text, where)
    if origin in (types.UnionType, typing.Union):
        return None if text == 'None' else _read(args[0], text, where)
    if kind is str or origin is Literal:
        return text
    if kind is bool:
        value = {'true': True, '1': True, 'false': False, '0': False}.get(text.lower())
        if value is None:
            raise UserError(f'{where}: must be True or False, got {text!r}')
        return value
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UserError(f'{where}: must be {kind.__name__}, got {text!r}') from None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UserError(f"{where}: {text!r} is no Python literal; write quotes inside, as in \"('a', 'b')\"") from None
