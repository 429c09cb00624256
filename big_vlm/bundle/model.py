"""A model in use: images and prompts in, answers, scores or embeddings out."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from big_vlm import config, tasks
from big_vlm.bundle import inputs, streaming
from big_vlm.bundle.answers import Answer, Answering, narrow, padded
from big_vlm.bundle.settings import Settings
from big_vlm.config import UserError
from big_vlm.data import images as pictures
from big_vlm.data import naflex, videos
from big_vlm.data import prompts as prompt_rows
from big_vlm.data.contract import Contract
from big_vlm.data.images import ImageLike
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.data.videos import VideoLike as Images
from big_vlm.decoding import choices as tries
from big_vlm.decoding import constraints
from big_vlm.decoding.choices import power_of_two
from big_vlm.decoding.scoring import make_score
from big_vlm.models import quantised
from big_vlm.sharding import mesh as meshes


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Candidates by score. `order`: their numbers, the best first; `scores`: log-probability of each in nats (per
    token, if that was asked for), in the order in which they were given; `best`: the first of the order."""

    best: str
    order: list[int]
    scores: list[float]


class Bundle:
    """A model with all that it takes to use it. From `load`, or built from the parts during training.

    Images are paths, PIL images or uint8 arrays [H, W, 3] of any size; they are resized as in training. Where an
    example may have several (`contract.images`), a list of them is one example's, and so is a video, as frames. To a
    decoder alone, images are None.
    """

    def __init__(
        self,
        stage: config.Stage,
        contract: Contract,
        tokenizer: Tokenizer,
        params: Any,
        mesh: Mesh,
        scores: Mapping[str, Any] | None = None,
    ):
        self.stage, self.contract, self.tokenizer, self.mesh = stage, contract, tokenizer, mesh
        self.scores = scores or {}
        self.task = tasks.make(stage, contract, mesh)
        self._compiled: dict[Any, Any] = {}
        self._weights, self._unstacked = params, False

    @property
    def params(self) -> Any:
        """Weights as the task's `predict` takes them: parameters, and a BatchNorm's running statistics. A copy of a
        decoder's once it has answered, for it keeps them as `decode_params` then."""
        if not self._unstacked:
            return self._weights
        return self.task.predict['stored_params'](self._weights)

    def decode_params(self) -> Any:
        """A decoder's weights as answers read them, layer by layer; from the first call on it holds no others."""
        if not self._unstacked:
            self._weights = jax.device_put(self.task.predict['decode_params'](self._weights))
            self._unstacked = True
        return self._weights

    def quantised(self, kind: str) -> 'Bundle':
        """The same model with its decoder's matrices in 8 or 4 bits, 'int8' or 'int4' (`models.quantised`): answers
        take less memory, on CPUs more time (docs/benchmarks.md), and may differ. The one it is made of is unchanged.
        Raises UserError for another kind and for a dual encoder."""
        self._require('generative', 'be quantised')
        params = quantised.quantise_decoder(self.params, kind)
        return Bundle(self.stage, self.contract, self.tokenizer, params, self.mesh, self.scores)

    def generate(
        self, images: Images | Sequence[Images] | None, prompts: str | Sequence[str], **settings: Any
    ) -> list[Answer]:
        """Answers, one per image and prompt: as many of one as of the other, or one of either for all of the other.

        Args:
          images: what to look at.
          prompts: in the form the model was trained on, such as 'caption en'.
          **settings: the fields of `settings.Settings`, which explains each: max_new_tokens=64, temperature=0.0, top_k,
            top_p, min_p, repetition_penalty, choices, grammar, stop, beams, best_of, prompt_lookup, length_penalty,
            seed=0, batch_size=16, errors='raise', progress.

        Raises:
          UserError: a dual encoder, counts that do not pair up, settings that cannot be, an empty or too long prompt.
            An image that cannot be read, when its turn comes (or never, see `errors`).
        """
        return list(self.generate_each(images, prompts, **settings))

    def generate_each(
        self, images: Images | Sequence[Images] | None, prompts: str | Sequence[str], **settings: Any
    ) -> Iterator[Answer]:
        """`generate`, each answer as soon as it and those before it are there. Everything but the images is checked at
        once."""
        self._require('generative', 'generate answers')
        made = Settings.of(settings)
        images, prompts = inputs.pair('images', self._looked_at(images), 'prompts', inputs.as_texts(prompts, 'prompts'))
        return iter(Answering(self, images, prompts, made))

    def stream(self, image: Images | None, prompt: str, **settings: Any) -> Iterator[str]:
        """The text of one answer in pieces, each as soon as it is there: never a part of a character, or of a stop
        string. Together they are the text that `generate` gives.

        Arguments and errors as of `generate`; beams, best_of and prompt_lookup, which do not say one token after the
        other, are refused.
        """
        self._require('generative', 'generate answers')
        made = Settings.of(settings)
        made.check_stream()
        if not isinstance(prompt, str):
            raise UserError(f'prompt is a {type(prompt).__name__}: must be one text')
        answering = Answering(self, self._looked_at(None if image is None else [image]), [prompt], made)
        return streaming.pieces(answering.tokens(), answering.text, made.stop)

    def score(
        self,
        images: Images | Sequence[Images] | None,
        prompts: str | Sequence[str],
        answers: str | Sequence[str],
        *,
        batch_size: int = 16,
    ) -> np.ndarray:
        """The log-probability of each answer, its end of text included: float32 [N], nats.

        Images, prompts and answers: as many of each, or one of any for all. Raises UserError as `generate` does.
        """
        scored = self.score_each(images, prompts, answers, batch_size=batch_size)
        return np.array([answer.log_prob for answer in scored], np.float32)

    def score_each(
        self,
        images: Images | Sequence[Images] | None,
        prompts: str | Sequence[str],
        answers: str | Sequence[str],
        *,
        batch_size: int = 16,
    ) -> list[Answer]:
        """`score` token by token: each answer as if the model had given it, with ids, log-probabilities, perplexity."""
        self._require('generative', 'score answers')
        prompts, answers = inputs.pair(
            'prompts', inputs.as_texts(prompts, 'prompts'), 'answers', inputs.as_texts(answers, 'answers')
        )
        images, both = inputs.pair(
            'images', self._looked_at(images), 'prompts', list(zip(prompts, answers, strict=True))
        )
        ids = [self._ids(prompt, answer, f'prompts[{i}]') for i, (prompt, answer) in enumerate(both)]
        longest = power_of_two(max(len(suffix) + 1 for _, suffix in ids))
        run = self._once('token_scores', lambda: jax.jit(self.task.predict['token_scores'], static_argnums=2))
        values: list[np.ndarray] = []
        for batch, count in self._batches(map(self._row, ids), images, batch_size):
            values += list(jax.device_get(run(self.decode_params(), batch, longest))[:count])
        said = [[*suffix, self.contract.eos_id] for _, suffix in ids]
        parts = zip(both, said, values, strict=True)
        return [Answer(text, tokens, row[: len(tokens)].tolist()) for (_, text), tokens, row in parts]

    def rank(
        self,
        images: Images | Sequence[Images] | None,
        prompts: str | Sequence[str],
        candidates: constraints.Choices,
        *,
        per_token: bool = False,
        batch_size: int = 16,
    ) -> list[Ranking]:
        """Which of the candidates fits best, one `Ranking` per image and prompt (which pair up as in `generate`).

        Args:
          candidates: answers for all, or a list of them for each.
          per_token: divide each log-probability by the answer's tokens, so that long ones are not at a disadvantage.
          batch_size: answers scored at once. An image and its prompt are read once for so many.

        Raises:
          UserError: as `generate` does; candidates that are empty, or not one list for each.
        """
        self._require('generative', 'rank answers')
        images, prompts = inputs.pair('images', self._looked_at(images), 'prompts', inputs.as_texts(prompts, 'prompts'))
        candidates = list(candidates)
        table = constraints.table(self.tokenizer, candidates, rows=len(prompts), lower=self.contract.lower)
        ids = [self._ids(prompt, None, f'prompts[{i}]') for i, prompt in enumerate(prompts)]
        run, weights = self._once('rank', lambda: make_score(self.task.predict)), self.decode_params()
        together = min(table.shape[1], power_of_two(max(batch_size, 1)))
        parts = []
        for start in range(0, table.shape[1], together):
            parted = zip(ids, table[:, start : start + together], strict=True)
            rows = (self._row(prompt) | {tries.KEY: answers} for prompt, answers in parted)
            batches = self._batches(rows, images, max(batch_size // together, 1))
            parts.append(np.concatenate([jax.device_get(run(weights, batch))[:count] for batch, count in batches]))
        scores = np.concatenate(parts, axis=1).sum(axis=2)
        if per_token:
            scores = scores / np.maximum((table >= 0).sum(axis=2), 1)
        rankings = []
        for i, row in enumerate(scores):
            names = candidates if isinstance(candidates[0], str) else list(candidates[i])
            order = np.argsort(-row[: len(names)], kind='stable').tolist()
            rankings.append(Ranking(names[order[0]], order, row[: len(names)].tolist()))
        return rankings

    def embed(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        texts: str | Sequence[str] | None = None,
        *,
        batch_size: int = 64,
    ) -> dict[str, np.ndarray]:
        """Unit vectors whose dot products say how well image and text agree.

        Returns:
          {'image': float32 [N, E], 'text': float32 [M, E]}, those that were asked for.

        Raises:
          UserError: a decoder, neither images nor texts, an empty text, an image that cannot be read.
        """
        self._require('contrastive', 'embed images and texts')
        if images is None and texts is None:
            raise UserError('nothing to embed: give images, texts or both')
        result = {}
        if images is not None:
            images = inputs.as_images(images)
            run = self._once('embed_image', lambda: jax.jit(self.task.predict['embed_image']))
            result['image'] = self._embed(run, [{} for _ in images], images, batch_size)
        if texts is not None:
            rows = []
            for i, text in enumerate(inputs.as_texts(texts, 'texts')):
                ids = self.tokenizer.encode(self._cased(text, f'texts[{i}]'))
                row, mask = prompt_rows.contrastive_text(ids, self.contract)
                rows.append({'text': row, 'text_mask': mask})
            run = self._once('embed_text', lambda: jax.jit(self.task.predict['embed_text']))
            result['text'] = self._embed(run, rows, None, batch_size)
        return result

    def _embed(self, run, rows, images, batch_size):
        parts = [
            np.asarray(jax.device_get(run(self.params, batch)), np.float32)[:count]
            for batch, count in self._batches(rows, images, batch_size)
        ]
        return np.concatenate(parts)

    def _batches(
        self, rows: Iterable[dict[str, Any]], images: Sequence[Any] | None, batch_size: int
    ) -> Iterator[tuple[dict[str, Any], int]]:
        """Batches on the device with the number of their real rows, which are made when it is their turn."""
        if batch_size < 1:
            raise UserError(f'batch_size {batch_size}: must be at least 1')
        with_image = self._with_image()

        def whole(i, row):
            row = row if images is None else with_image(row, images[i], i)
            return row | {'id': np.array([0, i], np.int32)}

        made = itertools.starmap(whole, enumerate(rows))
        while some := list(itertools.islice(made, batch_size)):
            if self.stage.task == 'generative':
                some = narrow(some, self.contract)
            yield self._stacked(some), len(some)

    def _with_image(self) -> Callable[[dict[str, Any], ImageLike, int], dict[str, Any]]:
        """A function of a row, its image and its number: the row with the image in it. One image for many rows that
        follow each other is read once."""
        last: tuple[Any, Any] = (None, None)

        def with_image(row, image, i):
            nonlocal last
            if image is None:
                return row
            if last[0] is not image:
                last = image, self._prepared(image, inputs.name(image, i))
            if self.contract.max_patches:
                if self.stage.task == 'generative':
                    row = prompt_rows.shorter_image(row, int(last[1]['patch_mask'].sum()), self.contract)
                return row | last[1]
            if self.stage.task == 'generative':
                return prompt_rows.with_images(row, last[1], self.contract)
            return row | {'image': last[1]}

        return with_image

    def _stacked(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch on the device, filled up by repeating the last row; `_mask` tells the real ones."""
        size = padded(len(rows), meshes.data_parts(self.mesh))
        batch = {key: np.stack([row[key] for row in rows] + [rows[-1][key]] * (size - len(rows))) for key in rows[0]}
        return meshes.put_batch(batch | {'_mask': np.arange(size) < len(rows)}, self.mesh)

    def _prepared(self, image: Images, where: str) -> Any:
        """An array, [I,S,S,3] for a decoder's I images, or NaFlex's."""
        contract, several = self.contract, isinstance(image, list | tuple)
        if several and len(image) > contract.images:
            raise UserError(f'{where}: {len(image)} images, and this model takes {contract.images} at a time')
        if several and len(image) == 1:
            image, several = image[0], False
        if contract.max_patches:
            return naflex.rows(pictures.read(image, where), contract)
        if self.stage.task != 'generative':
            return pictures.prepare(image, contract, where)
        if not several and contract.images > 1:
            with pictures.told(image, where):
                image, several = videos.frames(image, contract.images), True
        return np.stack([pictures.prepare(one, contract, where) for one in (image if several else [image])])

    def _looked_at(self, images: Any) -> list[Any]:
        """One for every request: an image, a list of several, or None to a decoder alone."""
        if self.contract.image_tokens:
            if images is None:
                raise UserError('no images: this model answers about images, give at least one')
            return inputs.as_images(images)
        if images is not None:
            raise UserError('this model is a decoder alone and sees no images: leave them out')
        return [None]

    def _ids(self, prompt: str, answer: str | None, where: str) -> tuple[list[int], list[int] | None]:
        """Of a prompt and its answer, for `_row`: rows have all slots, so they are made when they are needed."""
        prefix = self.tokenizer.encode(self._cased(prompt, where))
        suffix = None if answer is None else self.tokenizer.encode(self._cased(answer, where))
        slots = self.contract.text_length
        try:
            taken = len(prompt_rows.prompt(prefix, self.contract, room=int(suffix is not None)))
        except UserError as error:
            raise UserError(f'{where} {inputs.short(prompt)}: {error}') from None
        if suffix is not None and taken + len(suffix) + 1 > slots:  # cut, its log-probability would be another's
            raise UserError(
                f'{where} {inputs.short(prompt)}: its answer does not fit into the {slots} text slots: shorten it'
            )
        return prefix, suffix

    def _row(self, ids: tuple[list[int], list[int] | None]) -> dict[str, np.ndarray]:
        return prompt_rows.generative_row(*ids, self.contract)

    def _cased(self, text: str, where: str) -> str:
        if not text.strip():
            raise UserError(f'{where} is empty: write what the model was trained to read')
        return text.lower() if self.contract.lower else text

    def _require(self, task: str, what: str) -> None:
        if self.stage.task != task:
            other = {
                'generative': 'a PaliGemma-style decoder (a bundle whose task is generative)',
                'contrastive': 'a dual encoder such as SigLIP (a bundle whose task is contrastive)',
            }
            raise UserError(f'this bundle is {self.stage.task} and cannot {what}: that takes {other[task]}')

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._compiled:
            self._compiled[key] = make()
        return self._compiled[key]
