"""The generative task: image and prompt in, answer out, trained on the answer alone (PaliGemma, 2407.07726)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from big_vlm import config
from big_vlm.data.contract import Contract
from big_vlm.models import gemma, lora, paligemma
from big_vlm.ops import chunks, kv_cache, token_loss
from big_vlm.ops.gathered_loss import gathered_loss
from big_vlm.tasks import images

# Bytes of a device from which `token_loss='auto'`, or a score, does not make all logits: 256 tokens of Gemma's words.
_DENSE_BYTES = 2**28


def image_slots(stage: config.Stage) -> int:
    """Of a row: tokens that the stage's image tower makes of its images. Raises UserError for an unknown variant."""
    where = dict(image_size=stage.contract.image_size, max_patches=stage.contract.max_patches)
    return stage.contract.images * paligemma.from_config(stage.model, vocab_size=1, **where).image_tokens


class Generative:
    """Batches of images and whole token sequences (DESIGN of the batch: `docs/design.md`) → loss, metrics, answers.

    Args:
      stage: the validated stage; its `model` section says which image tower and decoder.
      contract: image size, text slots and vocabulary.
      mesh: unused by this task's mathematics; every task is built alike.

    Raises:
      UserError: an unknown variant, sizes that do not divide, or a contract whose image slots the model does not fill.
    """

    kind = 'generative'

    def __init__(self, stage: config.Stage, contract: Contract, mesh: Mesh | None = None):
        del mesh
        self.contract, self.lora, self.pack = contract, stage.lora, stage.pack
        self.average, self.smoothing = stage.model.average, stage.model.label_smoothing
        self.form, self.chunk = stage.model.token_loss, stage.model.token_chunk
        self.dtype = jnp.dtype(stage.model.dtype)
        self.model = paligemma.from_config(
            stage.model,
            image_size=contract.image_size,
            vocab_size=contract.vocab_size,
            max_patches=contract.max_patches,
        )
        if self.smoothing >= 1:
            raise config.UserError(
                f'model.label_smoothing {self.smoothing} leaves nothing to the answer: choose less than 1'
            )
        if contract.bos_id < 0:
            raise config.UserError('the tokenizer has no start token, and a prompt begins with one: choose another')
        if contract.image_tokens != contract.images * self.model.image_tokens:
            raise config.UserError(
                f'the contract has {contract.image_tokens} image slots, but {stage.model.image.variant} '
                f'makes {contract.images * self.model.image_tokens} tokens of {contract.image_size} px'
            )

    @property
    def flops_per_example(self) -> float:
        """Model FLOPs of one example's forward and backward pass."""
        count = self.pack.examples
        text = self.contract.text_length if count == 1 else self.pack.text_length
        return 3 * self.model.forward_flops(text, count * self.contract.images) / count

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        """Fresh (params, stats)."""
        params, stats = self.model.init_with_stats(rng)
        return lora.add(params, self.lora, rng), stats

    def loss(
        self, params: dict, stats: dict, batch: dict[str, jax.Array], rng: jax.Array | None
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict]]:
        """Batch → (loss, (metrics, stats)). Metrics: the share of supervised tokens whose argmax is right."""
        states, targets, mask, out = self.supervised(params, stats, batch, rng)
        stats = {'img': out['img/stats']} if 'img/stats' in out else stats
        loss, metrics = self.loss_from_states(params, states, targets, mask)
        return loss, (metrics, stats)

    def weight(self, batch: dict[str, jax.Array]) -> jax.Array:
        """float32 []: over how many tokens, or examples, the loss of a batch is a mean."""
        tokens = jnp.sum(batch['mask_loss'][:, max(self.contract.image_tokens, 1) :] > 0, axis=-1)
        return jnp.sum(tokens if self.average == 'token' else tokens > 0).astype(jnp.float32)

    def loss_from_states(
        self, params: dict, states: jax.Array, targets: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, metrics) of what `supervised` gives; apart from it so that its memory can be told."""
        llm = self.model.llm
        form = self.form
        if form == 'auto':
            devices = max(jax.sharding.get_abstract_mesh().size, 1)
            form = 'gathered' if 4 * targets.size * self.contract.vocab_size > devices * _DENSE_BYTES else 'dense'
        if form == 'gathered':
            weights = token_loss.weights(mask, self.average)
            settings = dict(softcap=llm.final_softcap, smoothing=self.smoothing, chunk=self.chunk)
            states = gemma.normed(llm, params['llm'], states)
            table = params['llm']['embedder']['input_embedding']
            loss, right = gathered_loss(states, table, targets, weights, **settings)
        else:
            logits = gemma.logits(llm, params['llm'], states)
            loss, _ = token_loss.token_loss(logits, targets, mask, self.average, self.smoothing)
            right = jnp.sum((jnp.argmax(logits, axis=-1) == targets) & (mask > 0))
        accuracy = right / jnp.maximum(jnp.sum(mask > 0), 1)
        return loss, {'token_accuracy': accuracy.astype(jnp.float32)}

    @property
    def predict(self) -> dict[str, Callable[..., Any]]:
        """Pure functions. Weights are parameters and, under their modules' names, running statistics.

        decode_params(weights): the weights that `prefill` and `decode_step` take, layer by layer, with adapters of LoRA
          added in the dtype of activations; make them once. It is compiled: `jax.jit` would copy what stays the same.
        stored_params(decode_params): the weights that they were made of, adapters added
        encode(decode_params, batch) → a pytree with leading axis [B], what the images alone decide
        prefill(decode_params, batch, cache_size, ahead=0) → (logits float32 [B,V] after each prompt, KVCache). A batch
          may have `encoded`, as `encode` made it of the same images, in the place of its images.
        decode_step(decode_params, cache, token int32 [B]) → (logits float32 [B,V], KVCache)
        extend(decode_params, cache, tokens int32 [B,T]) → (logits float32 [B,T,V] after each, KVCache), T ≤ ahead + 1
        rewind(cache, count int32 [B]) → KVCache without the last so many tokens of each row, of those of one `extend`
        score(weights or decode_params, batch) → float32 [B], log-probability of each row's supervised tokens
        token_scores(weights or decode_params, batch, count) → float32 [B,count], of each of them in order, 0 behind
          them; the logits are of `count` tokens, which is as many as any row has
        attention(weights, batch) → float32 [L,B,N,T,T], what every token attends to
        """

        def decode_params(weights):
            return paligemma.unstack_layers(weights, self.dtype)

        def encode(params, batch):
            return self.model.encode(params, *self._inputs(batch), alone=self.contract.image_alone)

        def prefill(params, batch, cache_size, ahead=0):
            more = dict(cache_size=cache_size, ahead=ahead, encoded=batch.get('encoded'))
            return self.model.prefill(params, *self._inputs(batch), **more)

        def decode_step(params, cache, token):
            return self.model.decode_step(params, token, cache)

        def extend(params, cache, tokens):
            return self.model.extend(params, tokens, cache)

        def token_scores(weights, batch, count):
            states, targets, mask, _ = self.supervised(weights, None, batch, None)
            first = jnp.argsort(mask <= 0, axis=1, stable=True)[:, :count]
            states = jnp.take_along_axis(states, first[..., None], axis=1)
            targets, mask = (jnp.take_along_axis(x, first, axis=1) for x in (targets, mask))

            def log_prob(states, targets):
                return token_loss.log_prob(gemma.logits(self.model.llm, weights['llm'], states), targets)

            at_once = max(_DENSE_BYTES // (4 * len(states) * self.contract.vocab_size), 1)
            return chunks.over_positions(log_prob, at_once, states, targets) * (mask > 0)

        def score(weights, batch):
            return jnp.sum(token_scores(weights, batch, batch['text'].shape[1]), axis=-1)

        def attention(weights, batch):
            return self.model.apply(weights, *self._inputs(batch), attention=True)[1]['attention']

        return {
            'decode_params': decode_params,
            'stored_params': paligemma.stack_layers,
            'encode': encode,
            'prefill': prefill,
            'decode_step': decode_step,
            'extend': extend,
            'rewind': kv_cache.rewind,
            'score': score,
            'token_scores': token_scores,
            'attention': attention,
        }

    def supervised(
        self, params: dict, stats: dict | None, batch: dict[str, jax.Array], rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, dict]:
        """(states [B,t,D], targets int32 [B,t], mask [B,t], the model's `out`) over the text slots.

        The last image slot predicts the first of them. `gemma.logits` of the states are the logits.
        """
        examples = batch['image_mask'].shape[1] // self.contract.images if 'image_mask' in batch else 1
        first = max(self.contract.image_tokens * examples - 1, 0)
        targets, mask = batch['text'][:, first + 1 :], batch['mask_loss'][:, first + 1 :]
        settings = dict(logits_from=None, stats=stats, train=rng is not None, rng=rng)
        _, out = self.model.apply(params, *self._inputs(batch), **settings)
        return out['decoded'][:, first:-1], targets, mask, out

    def _inputs(self, batch):
        unseen = 'encoded' in batch or not self.contract.image_tokens
        image = None if unseen else images.of(batch, self.contract, self.dtype)
        names = ('image_mask', 'text', 'segment', 'position', 'mask_ar')
        return image, *(batch.get(name) for name in names)
