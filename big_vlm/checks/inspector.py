"""A stage's batches before it is trained: what the model will get of them, and what makes them not worth training on.

Batches come from the loader of the run itself, and masks from the code of the models. Refused are an answer that can be
read off its prompt (`leaks`), a row without any loss, and answers of which more than 1 % are cut. Texts of a dual
encoder may be cut, as SigLIP's and CLIP's were: that is counted and shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from big_vlm import tasks
from big_vlm.checks import leaks
from big_vlm.config import Stage, UserError, located
from big_vlm.data import loader, naflex
from big_vlm.data.contract import Contract
from big_vlm.data.loader import Made
from big_vlm.data.prompts import TooLong
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.models import text_towers
from big_vlm.ops import masks
from big_vlm.reports.inspection import Counts, Cut, Inspection, Row, Token
from big_vlm.tasks import images
from big_vlm.training import stages

MOST_CUT = 0.01  # of the answers
_SHOWN, _WORST = 12, 5  # rows, and texts that were cut
_PIXELS = ('image', 'patches', 'patch_mask', 'patch_grid')
_VIEWS = ('global_view', 'local_views')

_attention_mask = jax.jit(masks.attention_mask)


def inspect(stage: Stage, tokenizer: Tokenizer, where: str = 'config', batches: int = 8) -> Inspection:
    """What the first `batches` of a stage's training are; its first one is shown.

    Args:
      stage: validated.
      tokenizer: of the stage, as `training.tokenizers.make` gives it.
      where: the stage's dotted key, for errors and problems.

    Raises:
      UserError: as the loader does, for pipelines that do not make what the task takes, and for a mask autoencoder.
    """
    if stage.task == 'mask_autoencoder':
        raise UserError(f'{where}: a mask autoencoder has neither pictures nor tokens to inspect: name another --stage')
    with located(where):
        contract = stages.make_contract(stage, tokenizer)
        made = loader.train_rows(stage.data, contract, tokenizer, stage.batch_size, stage.seed)
        reader = _Reader(stage, contract, tokenizer)
        first = made(0)
        rows = _shown(first, reader)
        for step in range(batches):
            for row in first if step == 0 else made(step):
                reader.read(row)
    total = sum(counts.examples for counts in reader.counts.values())
    facts = {
        'task': stage.task,
        'read': f'{batches} batches of {stage.batch_size}, {total:,} examples',
        'shown': f'{len(rows)} rows of the first',
        'images': _sizes(rows, contract),
        'tokens': f'{contract.image_tokens} image slots, {contract.text_length} for text; '
        f'{reader.used / max(total, 1):.1f} used, at most {reader.longest}',
        'vocabulary': f'{tokenizer.vocab_size:,}',
    }
    if stage.pack.examples > 1:
        facts['packed'] = f'in training {stage.pack.examples} examples share a row; here each has its own'
    worst = sorted(reader.cuts, key=lambda cut: -cut.lost)
    problems = [f'{where}.data.sources.{problem}' for problem in [*reader.problems(worst)]]
    return Inspection(where.partition('.')[2] or 'train', facts, rows, reader.counts, worst[:_WORST], problems)


@dataclasses.dataclass(frozen=True)
class Slots:
    """One row's slots: kind str [T], ids int [T], loss float [T], sees bool [T, T] (query, key) or None."""

    kind: np.ndarray
    ids: np.ndarray
    loss: np.ndarray
    sees: np.ndarray | None

    def answers(self) -> Iterator[slice]:
        """Where the suffixes are."""
        inside = np.concatenate([[False], self.kind == 'suffix', [False]])
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        yield from (slice(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True))

    def tokens(self, spelt: Callable[[int], str]) -> tuple[list[Token], np.ndarray | None]:
        """The slots with neighbours that only repeat each other as one, and who of these sees whom."""
        starts = [slot for slot in range(len(self.kind)) if not slot or not self._repeats(slot)]
        ends = [*starts[1:], len(self.kind)]
        tokens = [
            Token(spelt(int(self.ids[a])) if self.ids[a] >= 0 else '', str(self.kind[a]), float(self.loss[a]), b - a)
            for a, b in zip(starts, ends, strict=True)
        ]
        return tokens, None if self.sees is None else self.sees[np.ix_(starts, starts)]

    def _repeats(self, slot: int) -> bool:
        one, other = slot - 1, slot
        if self.kind[one] != self.kind[other] or self.kind[one] not in ('image', 'padding'):
            return False
        if self.loss[one] != self.loss[other]:
            return False
        mask = self.sees
        return mask is None or bool((mask[one] == mask[other]).all() and (mask[:, one] == mask[:, other]).all())


def generative_slots(arrays: loader.Batch, causal_prompt: bool) -> Slots:
    """Slots of a decoder's row. A suffix is text that is a block of its own: nothing before it sees it.

    Where prompts are causal, so is every token of theirs; a suffix is then what carries loss.
    """
    text, segment, starts = (arrays[key] for key in ('text', 'segment', 'mask_ar'))
    block = np.stack([segment, np.cumsum(starts)])
    _, which, sizes = np.unique(block, axis=1, return_inverse=True, return_counts=True)
    alone = sizes[which.reshape(-1)] == 1
    kind = np.where(alone & (arrays['mask_loss'] > 0) if causal_prompt else alone, 'suffix', 'prefix')
    kind = np.where(segment == 0, 'padding', np.where(text < 0, 'image', kind))
    return Slots(kind, text, arrays['mask_loss'], np.asarray(_attention_mask(segment[None], starts[None]))[0])


def contrastive_slots(arrays: loader.Batch, stage: Stage) -> Slots:
    """Slots of a text tower's row; an LSTM and a bag of words have no attention."""
    text, real, tower = arrays['text'], arrays['text_mask'], stage.model.text
    sees, keys = None, real if tower.mask else np.ones_like(real)
    if tower.kind == 'gemma':
        sees = np.asarray(_attention_mask(keys[None].astype(np.int32), np.full((1, len(text)), tower.causal)))[0]
    elif tower.kind == 'transformer':
        attended = text_towers.attended(keys[None, None], len(text), tower.causal)
        sees = np.broadcast_to(np.asarray(attended)[0], (len(text), len(text)))
    return Slots(np.where(real, 'text', 'padding'), text, np.zeros(len(text)), sees)


class _Reader:
    """Counts what it reads of rows, and keeps what is wrong with them."""

    def __init__(self, stage: Stage, contract: Contract, tokenizer: Tokenizer):
        self.stage, self.contract, self.tokenizer = stage, contract, tokenizer
        self.counts: dict[str, Counts] = {}
        self.cuts: list[Cut] = []
        self.asked: list[leaks.Asked] = []
        self.masked: list[tuple[str, int]] = []
        self.used, self.longest = 0, 0

    @property
    def generative(self) -> bool:
        return self.stage.task == tasks.Generative.kind

    def slots(self, arrays: loader.Batch) -> Slots:
        """Raises UserError for a pipeline that does not make them."""
        needed = 'mask_loss' if self.generative else 'text'
        if needed not in arrays:
            operation = 'tokenize' if self.generative else 'text(…)'
            raise UserError(f'a pipeline makes no {needed}, which a {self.stage.task} model takes: add {operation}')
        if self.generative:
            return generative_slots(arrays, self.contract.causal_prompt)
        return contrastive_slots(arrays, self.stage)

    def read(self, row: Made) -> None:
        """Counts a row."""
        slots = self.slots(row.arrays)
        counts = self.counts.setdefault(row.source, Counts())
        counts.examples += 1
        counts.replaced += bool(row.failures)
        counts.prompts_refused += sum(isinstance(error.__cause__, TooLong) for _, error in row.failures)
        length = int(np.isin(slots.kind, ('prefix', 'suffix', 'text')).sum())
        self.used, self.longest = self.used + length, max(self.longest, length)
        if self.generative:
            self._answers(row, slots, counts)
        else:
            self._text(row, slots, counts)

    def _answers(self, row: Made, slots: Slots, counts: Counts) -> None:
        decode, encode = self.tokenizer.decode, self.tokenizer.encode
        turns, answers = row.example.get('turns', []), list(slots.answers())
        counts.texts += len(answers)
        counts.turns_left_out += max(len(turns) - len(answers), 0)
        for number, at in enumerate(answers):
            ids = slots.ids[at].tolist()
            if ids[-1] != self.contract.eos_id:
                counts.cut += 1
                whole = encode(turns[number][1]) if number < len(turns) else ids
                lost = len(whole) + 1 - len(ids)  # with its eos
                self.cuts.append(
                    Cut(row.source, row.record, decode(ids), decode(whole[len(ids) :]), lost, len(whole) + 1)
                )
            before = slots.sees[at.start] & (slots.loss == 0) & (slots.ids >= 0)
            before &= np.arange(len(before)) < at.start
            prompt = decode(slots.ids[before].tolist()).strip()
            self.asked.append(leaks.Asked(row.source, row.record, prompt, decode(ids), leaks.columns(row.example)))
        if not slots.loss.any():
            self.masked.append((row.source, row.record))

    def _text(self, row: Made, slots: Slots, counts: Counts) -> None:
        ids, text = self.tokenizer.encode(row.example['full_text']), row.arrays['text']
        counts.texts += 1
        if len(ids) + self.contract.eos > len(text):
            counts.cut += 1
            kept = len(text) - self.contract.eos
            parts = map(self.tokenizer.decode, (ids[:kept], ids[kept:]))
            self.cuts.append(Cut(row.source, row.record, *parts, len(ids) - kept, len(ids)))
        if not (slots.kind == 'text').any():
            self.masked.append((row.source, row.record))

    def problems(self, worst: Sequence[Cut]) -> Iterator[str]:
        """What is wrong, from the key of the source on."""
        what = 'no token of its row carries loss' if self.generative else 'no token of its text is real'
        for source, record in self.masked:
            yield f'{source}: record {record}: {what}, so that it teaches nothing: look at its text'
        for one in leaks.find(self.asked):
            yield (
                f'{one.source}: record {one.record}: the answer {_short(one.answer)} stands in its prompt '
                f'{_short(one.prompt)}, where it is seen without loss: take it out of the prefix'
            )
        cut, texts = (sum(getattr(counts, key) for counts in self.counts.values()) for key in ('cut', 'texts'))
        if self.generative and cut > MOST_CUT * texts:
            first, length = worst[0], self.contract.text_length
            yield (
                f'{first.source}: record {first.record}: its answer loses {first.lost} of {first.length} tokens, and '
                f'{cut} of {texts} answers ({cut / texts:.1%}) are cut: raise contract.text_length from {length}, to '
                f'{length + first.lost} for all of them'
            )


def _shown(made: Sequence[Made], reader: _Reader) -> list[Row]:
    """Some rows of a batch, of each source in turn."""
    left = {source: [row for row in made if row.source == source] for source in dict.fromkeys(r.source for r in made)}
    chosen: list[Made] = []
    while len(chosen) < min(_SHOWN, len(made)):
        for rows in left.values():
            chosen += [rows.pop(0)] if rows and len(chosen) < _SHOWN else []
    shown = []
    for row, pictures in zip(chosen, _pictures(chosen, reader), strict=True):
        tokens, sees = reader.slots(row.arrays).tokens(reader.tokenizer.piece)
        shown.append(Row(row.source, row.record, pictures, tokens, sees, _note(row)))
    return shown


def _note(row: Made) -> str:
    notes = []
    if 'patch_grid' in row.arrays:
        height, width = row.arrays['patch_grid']
        notes.append(f'{height} × {width} patches of at most {len(row.arrays["patch_mask"])}')
    if row.failures:
        record, error = row.failures[0]
        notes.append(f'in the place of record {record}: {error}')
    return '; '.join(notes)


def _pictures(rows: Sequence[Made], reader: _Reader) -> list[list[np.ndarray]]:
    """Each row's images uint8 [H,W,3]: what the model's floats, the range of values undone, show."""
    contract, dtype = reader.contract, jnp.dtype(reader.stage.model.dtype)
    if reader.stage.task == 'generative' and not contract.image_tokens:  # a decoder alone
        return [[] for _ in rows]
    low, high = contract.value_range

    def seen(values: jax.Array) -> np.ndarray:
        pixels = (np.asarray(values, np.float32) - low) * (255 / (high - low))
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)

    batch = loader.stack([{key: row.arrays[key] for key in _PIXELS if key in row.arrays} for row in rows])
    if 'image' not in batch and 'patches' not in batch:
        raise UserError('the pipelines make no image: add decode and resize(…)')
    values = images.of(batch, contract, dtype)
    if contract.max_patches:
        return [[naflex.picture(*pair)] for pair in zip(seen(values[0]), batch['patch_grid'], strict=True)]
    found = [list(picture.reshape(-1, *picture.shape[-3:])) for picture in seen(values)]
    for row, pictures in zip(rows, found, strict=True):
        for view in (row.arrays[key] for key in _VIEWS if key in row.arrays):
            pictures.extend(view.reshape(-1, *view.shape[-3:]))
    return found


def _sizes(rows: Sequence[Row], contract: Contract) -> str:
    sizes = dict.fromkeys(f'{image.shape[1]} × {image.shape[0]}' for row in rows for image in row.images)
    shown = ', '.join([*sizes][:3]) + (' …' if len(sizes) > 3 else '')
    low, high = contract.value_range
    return f'{shown} px, {contract.resample}, values {low:g} to {high:g}' if sizes else 'none'


def _short(text: str, most: int = 80) -> str:
    return repr(text if len(text) <= most else text[: most - 1] + '…')
