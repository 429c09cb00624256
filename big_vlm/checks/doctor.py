"""The parity doctor: a model beside an oracle on the same input, stage by stage, and why they part.

Pixels and ids are compared as each side makes them; every later stage is computed from the oracle's. A cause is named
only if mending it makes the divergence vanish.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from big_vlm import bundle, interop
from big_vlm.checks import faults, transformers_oracle
from big_vlm.checks.states import Side, Tokens, open_pair, relative_error
from big_vlm.config import UserError, unknown
from big_vlm.data import images

LIMIT = 2e-5  # largest difference over the oracle's largest value; float32 in another order stays below a quarter
ORACLES = ('transformers', 'big_vlm')
PIXELS, TOKENS = 'pixels', 'token ids'


@dataclasses.dataclass(frozen=True)
class Finding:
    """Where the sides part. `causes`: (name, detail) of what makes it vanish when mended; empty: none known does."""

    stage: str
    causes: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What `examine` saw.

    Attributes:
      oracle: who computed the other side.
      errors: stage → largest difference over the oracle's largest value, or the share of ids that differ; inf for
        another shape, None for what the oracle has no files to make.
      weights: the same of every array that is not the oracle's.
      findings: in the order of computation. Each is what remains once those before it are mended.
    """

    oracle: str
    errors: Mapping[str, float | None]
    weights: Mapping[str, float]
    findings: tuple[Finding, ...]

    @property
    def first(self) -> str | None:
        """The first divergent stage."""
        return first_divergence(self.errors)

    @property
    def agrees(self) -> bool:
        """Every stage, and every weight."""
        return self.first is None and not self.weights


def examine(
    source: str | os.PathLike,
    against: str | os.PathLike,
    *,
    oracle: str = '',
    image: images.ImageLike | None = None,
    prompt: str = 'A red Apple',
    answer: str = 'on a table',
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Compares a model with an oracle.

    Args:
      source: a bundle, or any checkpoint that `bundle.convert` reads.
      against: a Hugging Face folder, an `.npz`, or another of those.
      oracle: 'transformers' (torch; what is no folder of Hugging Face is written as one first) or 'big_vlm' (our own
        models on the weights of `against`, which shows differences of weights, settings and preprocessing but not of
        mathematics); '': transformers for a folder of Hugging Face, else big_vlm.
      image: None draws one, of another size than the model's.
      prompt: the text; capitals show a difference in case, and fewer tokens than fit one in padding.
      answer: of a PaliGemma, after the prompt.
      say: called with a line before what takes time.

    Raises:
      UserError: a checkpoint that cannot be read, two of unlike architecture, no torch, a prompt that does not fit, an
        image for a decoder alone.
    """
    folder = interop.format_of(against) == 'hugging_face'
    oracle = oracle or ORACLES[0 if folder else 1]
    if oracle not in ORACLES:
        raise unknown('oracle', oracle, ORACLES)
    if oracle == 'transformers':  # before gigabytes are read
        transformers_oracle.require()
    say(f'reading {source} and {against}')
    side, other = open_pair(source, against)
    if image is not None and not side.sees:
        raise UserError(f'{source} is a decoder alone and sees no images: leave the image out')
    theirs, name = other, f"big_vlm's own code on the weights of {against}"
    if oracle == 'transformers':
        say('starting transformers')
        theirs = _transformers(pathlib.Path(against).expanduser(), other, written=not folder)
        name = theirs.name
    # The preprocessing of a folder that was written here would be no oracle of it.
    maker = theirs if folder else other
    errors: dict[str, float | None] = {}
    findings = []

    def same_input(stage, make, error_of, trials):
        """The oracle's, or ours where it makes none."""
        expected = make(maker)

        def error(side):
            return None if expected is None else error_of(make(side), expected)

        errors[stage] = error(side)
        if _diverges(errors[stage]):
            finding, _ = _explain(stage, side, trials(expected), lambda mended: not _diverges(error(mended)))
            findings.append(finding)
        return make(side) if expected is None else expected

    pixels = None
    if side.sees:
        picture = _draw(side.contract.image_size) if image is None else images.read(image)
        of_pixels = faults.of_pixels(side, other)
        pixels = same_input(PIXELS, lambda s: s.pixels(picture), relative_error, lambda theirs: of_pixels)
    of_tokens = functools.partial(faults.of_tokens, side, other)
    tokens = same_input(TOKENS, lambda s: s.tokens(prompt, answer), _ids_error, of_tokens)
    say(f'computing {name}')
    expected = theirs.states(pixels, tokens)

    def compare(side: Side) -> dict[str, float]:
        mine = side.states(pixels, tokens)
        if missing := [stage for stage in mine if stage not in expected]:
            raise UserError(f'{name} shows no {", ".join(missing[:4])}: this release names its modules otherwise')
        return {stage: relative_error(x, expected[stage]) for stage, x in mine.items()}

    say(f'computing {source}')
    states = compare(side)
    findings += _explain_states(side, other, states, compare, say)
    return Report(name, errors | states, faults.differing(side, other), tuple(findings))


def _transformers(path, other, written):
    with tempfile.TemporaryDirectory() as folder:
        if written:
            path, source = pathlib.Path(folder) / 'model', path
            bundle.convert(source, path, to='hugging_face')
        return transformers_oracle.load(path, other.model)


def first_divergence(errors: Mapping[str, float | None]) -> str | None:
    """The first stage beyond LIMIT; an error that is not a number is beyond it."""
    return next((stage for stage, error in errors.items() if _diverges(error)), None)


def _diverges(error):
    return error is not None and not error <= LIMIT


def _explain(
    stage: str,
    side: Side,
    trials: Iterable[tuple[faults.Fault, ...]],
    agrees: Callable[[Side], bool],
) -> tuple[Finding, Side | None]:
    """(the finding, the side without its causes): the first trial after which the side agrees."""
    for trial in trials:
        mended = side
        for fault in trial:
            mended = fault.mend(mended)
        if agrees(mended):
            return Finding(stage, tuple((fault.name, fault.detail) for fault in trial)), mended
    return Finding(stage, ()), None


def _explain_states(side, other, errors, compare, say) -> Iterator[Finding]:
    """One finding after the other, each on the side that those before it left, until all agrees or nothing helps."""
    stages = list(errors)
    while stage := first_divergence(errors):
        say(f'{stage} diverges; trying the known causes')
        until = stages[: stages.index(stage) + 1]

        def agrees(mended: Side, until=until) -> bool:
            found = compare(mended)
            return not any(_diverges(found[name]) for name in until)

        finding, mended = _explain(stage, side, faults.of_states(side, other, stage), agrees)
        yield finding
        if mended is None:
            return
        side, errors = mended, compare(mended)


def _ids_error(mine: Tokens, theirs: Tokens) -> float:
    """The share of slots that are not the oracle's."""
    if len(mine.ids) != len(theirs.ids):
        return math.inf
    return float(np.mean((mine.ids != theirs.ids) | (mine.answer != theirs.answer)))


def _draw(size: int) -> np.ndarray:
    """uint8 noise of another size than the model's: no two filters make the same of it."""
    return np.random.default_rng(0).integers(0, 256, (3 * size // 2 + 1, 2 * size + 3, 3), np.uint8)
