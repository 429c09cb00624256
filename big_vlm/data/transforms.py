"""The pipeline language: 'decode | resize(48) | text("caption")' read without running anything in it.

A pipeline is a chain of operations (see `operations`), each a name or a call with literal arguments. It is parsed with
`ast`, checked against the operations' signatures, and then maps one record to one example.
"""

import ast
import inspect
import itertools
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np

from big_vlm.config import UserError, located, unknown
from big_vlm.data import fields, operations
from big_vlm.data.contract import Contract
from big_vlm.data.tokenizer import Tokenizer


class Context:
    """What an operation may use besides the example: `contract`, `tokenizer`, `train`, and its own random numbers."""

    def __init__(self, contract: Contract, tokenizer: Tokenizer, *, train: bool, seed: tuple[int, ...] = (0,)):
        self.contract, self.tokenizer, self.train = contract, tokenizer, train
        self._seed = seed
        self._rng: np.random.Generator | None = None

    @property
    def rng(self) -> np.random.Generator:
        """This example's generator, a function of `seed` alone. Made on first use: it costs as much as an operation."""
        if self._rng is None:
            self._rng = np.random.default_rng(self._seed)
        return self._rng


class Pipeline:
    """A parsed pipeline. `pipeline(record, context)` → example dict; the record is left as it is."""

    def __init__(self, text: str, steps: list[tuple[str, tuple, dict[str, Any]]]):
        self.text = text
        self._steps = steps

    def __call__(self, record: dict, context: Context) -> dict:
        example = dict(record)
        for name, args, kwargs in self._steps:
            operations.OPERATIONS[name](example, context, *args, **kwargs)
        return example

    def texts(self, record: dict) -> Iterator[str]:
        """Every text the pipeline may take from a record, to train a tokenizer on."""
        yield from _texts(record, self._steps)

    def check_size(self, contract: Any, where: str) -> None:
        """Refuses a `resize` or `naflex` to another size than the contract's, as running it would.

        Raises UserError, naming `where`. `contract`: of a config, or of a model.
        """
        for name, args, kwargs in self._steps:
            if name in operations.CHECKS:
                with located(where):
                    operations.CHECKS[name](contract, *args, **kwargs)

    def added(self, contract: Contract) -> dict[str, np.ndarray]:
        """Zeros like the arrays that training examples get beside those of the picture and the text."""
        made = [
            operations.ADDS[name](contract, *args, **kwargs)
            for name, args, kwargs in self._steps
            if name in operations.ADDS
        ]
        return {name: np.zeros(shape, dtype) for arrays in made for name, (shape, dtype) in arrays.items()}

    def __repr__(self) -> str:
        return f'Pipeline({self.text!r})'


def parse(pipeline: str, *, where: str) -> Pipeline:
    """Reads a pipeline.

    Raises UserError, naming `where`, for bad syntax, an unknown operation, wrong arguments, or an operation after one
    that has to follow it (`operations.ORDER`).
    """
    hint = "write 'decode | resize(48) | …'"
    if not pipeline.strip():
        raise UserError(f'{where}: the pipeline is empty; {hint}')
    try:
        # A pipeline reads as Python's `|` between names and calls; the parentheses let it span lines.
        tree = ast.parse(f'({pipeline.strip()})', mode='eval').body
    except (SyntaxError, ValueError) as error:
        reason = getattr(error, 'msg', str(error))
        raise UserError(f'{where}: cannot read pipeline {pipeline!r}: {reason}; {hint}') from None
    steps = [_step(node, where) for node in _chain(tree)]
    _check_order([name for name, *_ in steps], where)
    return Pipeline(pipeline, steps)


def _texts(record: dict, steps: list[tuple[str, tuple, dict[str, Any]]]) -> Iterator[str]:
    for i, (name, args, kwargs) in enumerate(steps):
        if name in fields.MADE:
            for made in fields.MADE[name](record, *args, **kwargs):
                yield from _texts(record | made, steps[i + 1 :])
            return
        if name in operations.TEXTS:
            yield from operations.TEXTS[name](record, *args, **kwargs)


def _chain(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _chain(node.left)
        yield from _chain(node.right)
    else:
        yield node


def _step(node: ast.expr, where: str) -> tuple[str, tuple, dict[str, Any]]:
    function = node.func if isinstance(node, ast.Call) else node
    if not isinstance(function, ast.Name):
        raise UserError(f'{where}: {ast.unparse(node)!r} is no operation: write a name, or a name with arguments')
    name = function.id
    if name not in operations.OPERATIONS:
        raise unknown('operation', name, operations.OPERATIONS, where)
    args, kwargs = [], {}
    if isinstance(node, ast.Call):
        args = [_literal(argument, name, where) for argument in node.args]
        kwargs = {str(k.arg): _literal(k.value, name, where) for k in node.keywords}
    _check_arguments(name, args, kwargs, where)
    return name, tuple(args), kwargs


def _check_order(names: list[str], where: str) -> None:
    for before, after in itertools.combinations(names, 2):
        for first, second, reason in operations.ORDER:
            if before in first and after in second:
                raise UserError(f'{where}: {after} after {before}: {reason.format(before=before, after=after)}')


def _literal(node: ast.expr, name: str, where: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        raise UserError(
            f'{where}: argument {ast.unparse(node)!r} of {name} is not a literal: write a number, a quoted text, True, '
            'False or None'
        ) from None


def _check_arguments(name: str, args: list, kwargs: dict[str, Any], where: str) -> None:
    parameters = list(inspect.signature(operations.OPERATIONS[name]).parameters.values())[2:]
    signature = inspect.Signature(parameters)
    usage = name + re.sub(r'typing\.Annotated\[(\w+), (\d+)\]', r'\1 ≥ \2', str(signature))
    for key in kwargs:
        if key not in signature.parameters:
            raise unknown('argument', key, signature.parameters, f'{where}, {usage}')
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(f'{where}: {error}: it is {usage}') from None
    for key, value in bound.arguments.items():
        parameter = signature.parameters[key]
        values = value if parameter.kind is inspect.Parameter.VAR_POSITIONAL else (value,)
        for one in values:
            if not _fits(one, parameter.annotation):
                raise UserError(f'{where}: {key}={one!r} does not fit: it is {usage}')


def _fits(value: Any, annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return value in typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        kind, least = typing.get_args(annotation)
        return _fits(value, kind) and value >= least
    if annotation is None:
        return value is None
    if annotation is float:
        return isinstance(value, float) or _fits(value, int)
    # True is an int to Python, not to a person.
    return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))
