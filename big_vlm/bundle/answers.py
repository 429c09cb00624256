"""Images and prompts to answers: what `Bundle.generate` does.

Requests that fit at once are one batch and one program. Of more, each takes a slot as soon as another has ended.
Prompts are padded to a few widths, so a handful of programs serve all lengths; an image is encoded once for the prompts
about it that follow each other or share a batch.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from big_vlm.bundle.settings import Settings
from big_vlm.config import UserError
from big_vlm.data import prompts as prompt_rows
from big_vlm.data.contract import Contract
from big_vlm.data.videos import VideoLike as Images
from big_vlm.decoding import choices as tries
from big_vlm.decoding import constraints
from big_vlm.decoding.beam import make_beam_search
from big_vlm.decoding.choices import power_of_two
from big_vlm.decoding.generate import make_generate, make_stream
from big_vlm.decoding.scheduler import make_scheduler
from big_vlm.sharding import mesh as meshes

if TYPE_CHECKING:
    from big_vlm.bundle.model import Bundle

_LEAST_WIDTH = 32  # text slots of the narrowest program
_REMEMBERED = 8  # batches of encoded images, the last ones
_TEXT = ('text', 'segment', 'position', 'mask_ar')  # of a row, one entry a slot
_SLOTS = (*_TEXT, 'mask_loss')


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer. `ids` and `log_probs` (nats, under the model's own distribution) hold one entry per token, the end of
    text included unless the limit or a stop string cut the answer off; `text` is what they spell, up to a stop string.
    `error`: why there is no answer, '' if there is one."""

    text: str
    ids: list[int]
    log_probs: list[float]
    error: str = ''

    @property
    def log_prob(self) -> float:
        """Of the whole answer, in nats."""
        return sum(self.log_probs)

    @property
    def perplexity(self) -> float:
        """exp of the mean over its tokens of −log-probability; 1 is certain."""
        return math.exp(-self.log_prob / max(len(self.log_probs), 1))


@dataclasses.dataclass(frozen=True, eq=False)
class _Request:
    """`row`: its arrays, image included, all text slots. `image`: what is the same for the same image."""

    row: dict[str, np.ndarray]
    image: Any


class Answering:
    """One call of `Bundle.generate`: everything but the images is checked when it is made.

    Args:
      bundle: the model.
      images, prompts: as many of each.
      settings: see there.
    """

    def __init__(self, bundle: Bundle, images: list[Images | None], prompts: list[str], settings: Settings):
        self.bundle, self.images, self.settings = bundle, images, settings
        self.contract = bundle.contract
        self.failed: dict[int, str] = {}
        self.ids: list[tuple[list[int], None] | None] = []
        for i, prompt in enumerate(prompts):
            try:
                self.ids.append(bundle._ids(prompt, None, f'prompts[{settings.first + i}]'))
            except UserError as error:
                if settings.errors == 'raise':
                    raise
                self.ids.append(None)
                self.failed[i] = str(error)
        self.constraint, self.tables = constraints.of(
            bundle.tokenizer,
            settings.choices,
            settings.grammar,
            rows=len(prompts),
            limit=settings.max_new_tokens,
            lower=self.contract.lower,
        )
        self.weights = bundle.decode_params()
        self.taken: collections.deque[int] = collections.deque()  # requests under way, in order
        self.encoded: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self.done = 0

    def __iter__(self) -> Iterator[Answer]:
        settings, turn = self.settings, 0
        rows = self._scheduled() if self._many() and settings.beams == 1 else self._batched()
        while some := list(itertools.islice(rows, settings.best_of)):
            number = self.taken.popleft()
            yield from self._failures(turn, number)
            yield max((self._answer(*row) for row in some), key=self._score)
            turn = number + 1
        yield from self._failures(turn, len(self.ids))

    def tokens(self) -> Iterator[int]:
        """Of the first request alone, each as soon as it is there."""
        settings = self.settings
        width = power_of_two(settings.max_new_tokens)
        ends = dict(max_new_tokens=width, eos_id=self.contract.ends, pad_id=self.contract.pad_id)
        run = self.bundle._once(('stream', width), lambda: make_stream(self.bundle.task.predict, **ends))
        request = next(self._requests(), None)
        if request is None:
            raise UserError(self.failed[0])
        how = dict(limit=settings.max_new_tokens, seed=settings.seed) | self._how()
        for step in run(self.weights, self._batch([request]), **how):
            yield int(step.token[0])

    def _many(self) -> bool:
        return bool(self.settings.stop) or len(self.ids) * self.settings.best_of > self.settings.batch_size

    def _failures(self, start: int, end: int) -> Iterator[Answer]:
        for number in range(start, end):
            if self.settings.errors == 'raise':
                raise UserError(self.failed[number])
            yield Answer('', [], [], self.failed[number])

    def _requests(self) -> Iterator[_Request]:
        """Each with its image, read when its turn comes; those that fail are noted, and to `raise` ends them."""
        with_image = self.bundle._with_image()
        for i, (ids, image) in enumerate(zip(self.ids, self.images, strict=True)):
            if ids is None:
                continue
            try:
                row = with_image(self.bundle._row(ids), image, self.settings.first + i)
            except UserError as error:
                self.failed[i] = str(error)
                if self.settings.errors == 'raise':
                    return
                continue
            if self.tables is not None:
                row[tries.KEY] = self.tables[i]
            self.taken.append(i)
            key = os.fspath(image) if isinstance(image, str | os.PathLike) else id(image)
            for sample in range(self.settings.best_of):
                yield _Request(row | {'id': np.array([sample, self.settings.first + i], np.int32)}, key)

    def _how(self) -> dict[str, Any]:
        how = self.settings.how(self.contract.vocab_size)
        return how | {'processors': how['processors'] + self.constraint}

    def _batched(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One batch after the other."""
        settings, requests = self.settings, self._requests()
        width = power_of_two(settings.max_new_tokens)  # few widths, few compilations
        ends = dict(max_new_tokens=width, eos_id=self.contract.ends, pad_id=self.contract.pad_id)
        predict, how = self.bundle.task.predict, self._how()
        if settings.beams > 1:
            key = ('beams', settings.beams, width)
            run = self.bundle._once(key, lambda: make_beam_search(predict, beams=settings.beams, **ends))
            how = {'processors': how['processors'], 'length_penalty': settings.length_penalty}
        else:
            ends |= dict(prompt_lookup=settings.prompt_lookup)
            key = ('generate', width, settings.prompt_lookup)
            run = self.bundle._once(key, lambda: make_generate(predict, **ends))
            how['seed'] = settings.seed
        while some := list(itertools.islice(requests, max(1, settings.batch_size // settings.beams))):
            batch = self._batch(some)
            out = jax.device_get(run(self.weights, batch, limit=settings.max_new_tokens, **how))
            self._progress(len(some))
            for row in range(len(some)):
                length = int(out.length[row])
                yield out.ids[row, :length], out.log_probs[row, :length]

    def _scheduled(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As many at once as there are slots."""
        settings, mesh = self.settings, self.bundle.mesh
        shards = meshes.data_parts(mesh)
        slots = padded(min(settings.batch_size, len(self.ids) * settings.best_of), shards)
        width = power_of_two(settings.max_new_tokens)
        longest = max((len(prompt_rows.prompt(ids[0], self.contract)) for ids in self.ids if ids), default=0)
        size = _width(self.contract.image_tokens + longest, self.contract) + width
        serve = self.bundle._once(
            ('serve', slots, width, size, settings.prompt_lookup),
            lambda: make_scheduler(
                self.bundle.task.predict,
                slots=slots,
                cache_size=size,
                max_new_tokens=width,
                eos_id=self.contract.ends,
                pad_id=self.contract.pad_id,
                together=shards,
                prompt_lookup=settings.prompt_lookup,
                sharding=meshes.batch_sharding(mesh),
            ),
        )

        def prepare(some: list[_Request]) -> dict[str, Any]:
            return self._batch(some, limit=np.array(settings.max_new_tokens, np.int32))

        how = self._how() | dict(seed=settings.seed, cut=self._cut if settings.stop else None, progress=self._progress)
        yield from serve(self.weights, self._requests(), prepare, **how)

    def _batch(self, requests: list[_Request], **more: np.ndarray) -> dict[str, Any]:
        """On the device, as wide as the longest prompt needs, with the encoded images in the place of the images."""
        names = (*_TEXT, 'id', 'image_mask', tries.KEY)
        rows = [{name: request.row[name] for name in names if name in request.row} | more for request in requests]
        batch = self.bundle._stacked(narrow(rows, self.contract))
        if not self.contract.image_tokens:
            return batch
        return batch | {'encoded': self._encode(requests, batch['id'].shape[0])}

    def _encode(self, requests: list[_Request], size: int) -> Any:
        """What the images of `requests`, and of the padding up to `size` rows, decide: each image is encoded once."""
        distinct = {request.image: request.row for request in reversed(requests)}
        names = list(dict.fromkeys(request.image for request in requests))
        key = tuple(names)
        if key not in self.encoded:
            run = self.bundle._once('encode', lambda: jax.jit(self.bundle.task.predict['encode']))
            first = self.contract.image_tokens
            rows = [distinct[name] | {k: distinct[name][k][:first] for k in _TEXT} for name in names]
            self.encoded[key] = run(self.weights, self.bundle._stacked(rows))
            while len(self.encoded) > _REMEMBERED:
                self.encoded.popitem(last=False)
        self.encoded.move_to_end(key)
        if len(requests) == len(names) and jax.tree.leaves(self.encoded[key])[0].shape[0] == size:
            return self.encoded[key]
        which = [names.index(request.image) for request in requests]
        which = np.array(which + [which[-1]] * (size - len(which)), np.int32)
        sharding = meshes.batch_sharding(self.bundle.mesh)
        gather = self.bundle._once(
            'gather', lambda: jax.jit(lambda tree, i: jax.tree.map(lambda x: x[i], tree), out_shardings=sharding)
        )
        return gather(self.encoded[key], which)

    def _answer(self, ids: np.ndarray, log_probs: np.ndarray) -> Answer:
        text = self.text(ids.tolist())
        ends = [text.index(stop) for stop in self.settings.stop if stop in text]
        return Answer(text[: min(ends, default=len(text))], ids.tolist(), log_probs.tolist())

    def _score(self, answer: Answer) -> float:
        return answer.log_prob / max(len(answer.ids), 1) ** self.settings.length_penalty

    def text(self, ids: list[int]) -> str:
        """What tokens of an answer spell."""
        return self.bundle.tokenizer.decode([i for i in ids if i not in self.contract.ends])

    def _cut(self, ids: list[int]) -> int | None:
        """How many tokens it takes until a stop string is there."""

        def stopped(count: int) -> bool:
            text = self.text(ids[:count])
            return any(stop in text for stop in self.settings.stop)

        return next(filter(stopped, range(1, len(ids) + 1))) if stopped(len(ids)) else None

    def _progress(self, count: int) -> None:
        self.done += count
        if self.settings.progress:
            self.settings.progress(self.done, len(self.ids) * self.settings.best_of)


def padded(count: int, shards: int) -> int:
    """Rows of a batch of `count` real ones: a power of two times the shards of the batch, so that few are compiled."""
    return shards * power_of_two(-(-count // shards))


def narrow(rows: list[dict[str, np.ndarray]], contract: Contract) -> list[dict[str, np.ndarray]]:
    """The rows of a batch, as wide as its longest text needs."""
    width = _width(max(map(_length, rows)), contract)
    return [{name: array[:width] if name in _SLOTS else array for name, array in row.items()} for row in rows]


def _width(length: int, contract: Contract) -> int:
    """Slots of a row, image and text, that holds `length` of them: one of few."""
    images, text = contract.image_tokens, contract.text_length
    return images + min(max(power_of_two(max(length - images, 1)), _LEAST_WIDTH), text)


def _length(row: Mapping[str, np.ndarray]) -> int:
    return int(np.flatnonzero(row['segment'])[-1]) + 1
