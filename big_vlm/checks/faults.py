"""The known ways for two implementations of one model to differ, each as a change that would mend it.

Nothing here decides: `doctor` makes the change, computes again, and names the fault only if the divergence is gone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from big_vlm.checks.states import Side, Tokens, relative_error
from big_vlm.interop import hugging_face, pretrained
from big_vlm.models import gemma

_SIZES = ('variant', 'width', 'depth', 'mlp_dim', 'num_heads', 'num_kv_heads', 'head_dim')  # zeros are the variant's
_NOT_COMPUTED = ('dropout', 'embed_init', 'position_init')  # by training alone
_SOFTCAPS = ('attn_softcap', 'final_softcap')
SAME = 1e-6  # weights closer than this to one another, relative to the largest, are copies


class Fault(NamedTuple):
    """`name`: as people know it; `detail`: what is where; `mend`: the side without it."""

    name: str
    detail: str
    mend: Callable[[Side], Side]


def of_pixels(side: Side, other: Side) -> Iterator[tuple[Fault, ...]]:
    """What may be wrong with a side's pixels, the simplest first. `other`: what the oracle's files say."""
    now, resizes, ranges = side.contract, [], []
    for method, antialias in itertools.product(('bilinear', 'bicubic'), (True, False)):
        if (method, antialias) != (now.resample, now.antialias):
            detail = f'{_resize(now.resample, now.antialias)} here, {_resize(method, antialias)} in the oracle'
            resizes.append(_contract('resampling', detail, resample=method, antialias=antialias))
    for new in dict.fromkeys((other.contract.value_range, (-1.0, 1.0), (0.0, 1.0))):
        if new != now.value_range:
            ranges.append(_contract('value range', f'{now.value_range} here, {new} in the oracle', value_range=new))
    return _combined(resizes, ranges)


def of_tokens(side: Side, other: Side, theirs: Tokens) -> Iterator[tuple[Fault, ...]]:
    """What may be wrong with a side's ids, the simplest first. `theirs`: what the oracle makes of the same text."""
    now, newline = side.contract, tuple(side.tokenizer.encode('\n'))
    written, ends = ('as written', 'lower-cased'), ('without', 'with')
    detail = f'text is {written[now.lower]} here, {written[not now.lower]} in the oracle'
    groups = [[_contract('case', detail, lower=not now.lower)]]
    if side.model.family in pretrained.TOWERS:
        pads = sorted({other.contract.pad_id, int(theirs.ids[-1])} - {now.pad_id})
        details = [f'{now.pad_id} here, {pad} in the oracle' for pad in pads]
        groups.append([_contract('padding id', text, pad_id=pad) for text, pad in zip(details, pads, strict=True)])
        detail = f'text ends {ends[now.eos]} an end token here, {ends[not now.eos]} one in the oracle'
        groups.append([_contract('end token', detail, eos=not now.eos)])
        detail = 'kept as it is written here, left out in the oracle, and spaces folded'
        groups.append([Fault('punctuation', detail, lambda s: dataclasses.replace(s, bare=True))])
    elif side.sees:
        detail = 'tokenized on its own here, together with the prompt in the oracle'
        groups.append([Fault('newline', detail, lambda s: dataclasses.replace(s, joint=True))])
        if newline != now.separator_ids:
            detail = f'between prompt and answer {list(now.separator_ids)} here, {list(newline)} in the oracle'
            groups[-1].append(_contract('newline', detail, separator='\n', separator_ids=newline))
    else:
        for fields in (('causal_prompt',), ('separator', 'separator_ids')):
            here, there = ({name: getattr(x, name) for name in fields} for x in (now, other.contract))
            if here != there:
                detail = f'contract.{fields[0]} {here[fields[0]]!r} here and {there[fields[0]]!r} in the oracle'
                groups.append([_contract('setting', detail, **there)])
    return _combined(*groups)


def of_states(side: Side, other: Side, stage: str) -> Iterator[tuple[Fault, ...]]:
    """What may be wrong with a model whose first divergent state is `stage`, the likeliest first.

    First what differs between the two files, settings and weights. Then what would be wrong with both, as where one was
    made of the other by a reader that is wrong: the norms and the projections of the stage's tower.
    """
    settings = _settings(side, other, stage)
    yield from _combined(*settings, _softcap(side, other, stage), _features(side, stage), *_copies(side, other))
    part = {'image': 'img/', 'text': 'txt/'}.get(stage.split()[0], 'llm/')
    if norms := [name for name in side.weights if name.startswith(part) and name.endswith('/scale')]:
        for names, by in itertools.product((norms, *([name] for name in norms)), (1, -1)):
            yield (_offset({name: side.weights[name] - np.float32(by) for name in names}, by),)
    for row in _projections(side):
        if row.our_name.startswith(part):
            for turned in zip(*(_transposed(side, row, i) for i in _layers(side, row)), strict=True):
                yield (_turned(side, {(row, i): entry for i, entry in enumerate(turned)}),)


def differing(side: Side, other: Side) -> dict[str, float]:
    """Name of every array that is not the one in the oracle's file → its relative error."""
    errors = {name: relative_error(x, other.weights[name]) for name, x in side.weights.items()}
    return {name: error for name, error in errors.items() if not error <= SAME}


def _settings(side, other, stage):
    """A list for every setting of the stage's tower that the oracle's file has otherwise; sizes together."""
    section = {'image': 'image', 'text': 'text'}.get(stage.split()[0], 'decoder')
    mine, theirs = (dataclasses.asdict(getattr(x.model.model, section)) for x in (side, other))
    unlike = [name for name in mine if mine[name] != theirs[name] and name not in _NOT_COMPUTED + _SOFTCAPS]
    sizes = [name for name in unlike if name in _SIZES]
    for names in filter(None, [sizes, *([name] for name in unlike if name not in sizes)]):
        detail = ', '.join(f'model.{section}.{n} {mine[n]!r} here and {theirs[n]!r} in the oracle' for n in names)
        yield [_setting('setting', detail, section, **{name: theirs[name] for name in names})]


def _softcap(side, other, stage):
    """Of the output logits, or of the attention's."""
    if side.model.family in pretrained.TOWERS:
        return
    if stage == 'logits':
        field, what, usual = 'final_softcap', 'output logits', 30.0
        now, expected = (x.model.model.decoder.final_softcap for x in (side, other))
    elif stage.startswith('decoder layer'):
        field, what, usual = 'attn_softcap', 'attention logits', 50.0
        decoders = (gemma.Gemma(**dataclasses.asdict(x.model.model.decoder)) for x in (side, other))
        now, expected = (decoder.generation.softcap for decoder in decoders)
    else:
        return
    for cap in dict.fromkeys((expected, 0.0, usual)):
        if cap != now:
            here, there = (f'capped at {x:g}' if x else 'not capped' for x in (now, cap))
            yield _setting('softcap', f'{what} are {here} here, {there} in the oracle', 'decoder', **{field: cap})


def _features(side, stage):
    """Text embeddings take a sqrt D, image features do not: a code that divides them first multiplies them later."""
    if stage not in ('image projected', 'decoder image slots'):
        return
    root = np.sqrt(np.float32(side.weights['llm/final_norm/scale'].size))
    head = [name for name in side.weights if name.startswith('img/head/')]
    for factor, what in ((1 / root, 'times'), (root, 'divided by')):
        detail = f"here they are the oracle's {what} the root of the decoder's width"
        arrays = {name: side.weights[name] * factor for name in head}
        yield _weights('image features scaled twice', detail, arrays)


def _copies(side, other):
    """Alternatives of two kinds: arrays that are the oracle's file's but for one more or less, or transposed."""
    scales = [name for name in differing(side, other) if name.endswith('/scale')]
    norms = {}
    for by in (1, -1):
        for name in scales:
            x, expected = side.weights[name], other.weights[name]
            off = np.abs(x - by - expected).max(-1, keepdims=True) <= SAME * np.abs(x).max()  # layer by layer
            if off.any():
                norms.setdefault(by, {})[name] = x - by * off.astype(np.float32)
    changes = {}
    for row in _projections(side):
        for i in _layers(side, row):
            mine, theirs = _entry(side, row, i), _entry(other, row, i)
            if relative_error(mine, theirs) > SAME:
                found = [x for x in _transposed(side, row, i) if relative_error(x, theirs) <= SAME]
                changes |= {(row, i): found[0]} if found else {}
    return [_offset(arrays, by) for by, arrays in norms.items()], [_turned(side, changes)] if changes else []


def _offset(mended, by):
    detail = f"{_some(mended)}: here the oracle's {'plus' if by > 0 else 'minus'} one"
    return _weights('norm offset', detail, mended)


def _turned(side, changes):
    """`changes`: (row, layer) → what belongs there."""
    arrays = {row.our_name: side.weights[row.our_name].copy() for row, _ in changes}
    for (row, i), entry in changes.items():
        arrays[row.our_name][row.index(i)] = entry
    theirs = dict.fromkeys(f'{row.theirs}, in {row.our_name}' for row, _ in changes)
    return _weights('transposed projection', _some(theirs), arrays)


def _layers(side, row):
    return range(len(side.weights[row.our_name]) if row.stacked else 1)


def _projections(side):
    """The rows of Hugging Face's table that are matrices, and patches, which are as wide as high."""
    for row in hugging_face.table_of(side.model.family, side.model.model):
        shape = row.to_theirs(_entry(side, row, 0)).shape
        table = 'position' in row.theirs or row.our_name in pretrained.TOKENS.values()
        if not table and (len(shape) == 2 or len(shape) > 2 and shape[-1] == shape[-2]):
            yield row


def _entry(side, row, i):
    return side.weights[row.our_name][row.index(i)]


def _transposed(side, row, i):
    """What an entry would be, had its reader not taken columns for rows: of a square the transposed one; else, as the
    numbers were then read, or written, in the order of the other shape, either of two."""
    x = row.to_theirs(_entry(side, row, i))
    _, count = row.their_part()
    turned = [x.swapaxes(-1, -2).reshape(x.shape)]
    if x.shape[-1] != x.shape[-2]:
        turned.append(x.reshape(x.shape[::-1]).T)
    return [row.to_ours(np.concatenate([y] * count)) for y in turned]  # which takes its part of them


def _contract(name, detail, **fields):
    def mend(side):
        return dataclasses.replace(side, contract=dataclasses.replace(side.contract, **fields))

    return Fault(name, detail, mend)


def _setting(name, detail, section, **fields):
    def mend(side):
        model = side.model.model
        model = dataclasses.replace(model, **{section: dataclasses.replace(getattr(model, section), **fields)})
        return dataclasses.replace(side, model=dataclasses.replace(side.model, model=model))

    return Fault(name, detail, mend)


def _weights(name, detail, arrays):
    return Fault(name, detail, lambda side: dataclasses.replace(side, weights={**side.weights, **arrays}))


def _combined(*groups) -> Iterator[tuple[Fault, ...]]:
    """One fault of one group, then of two groups, and so on."""
    options = [[None, *group] for group in groups]
    chosen = (tuple(fault for fault in pick if fault) for pick in itertools.product(*options))
    yield from sorted(filter(None, chosen), key=len)


def _resize(method, antialias):
    return f'{method} {"with" if antialias else "without"} antialias'


def _some(names: Iterable[str]) -> str:
    first, *more = names
    return f'{first} and {len(more)} more' if more else first
