"""Gradients of a batch computed in micro-batches, one after another: the memory of one, the update of all.

A loss that is a mean over examples is the mean of its micro-batches' losses, and so are its gradients. A contrastive
loss is not: every image is compared with every text of the batch. There, the embeddings of all micro-batches are
computed first, the loss and its gradients by the embeddings once, over the whole batch, and then every micro-batch
again, to carry those gradients on to the parameters: one forward pass more, the same update to rounding (GradCache: Gao
et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup").
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from big_vlm.config import UserError, located
from big_vlm.sharding import mesh as meshes

# (params, stats, batch, rng) → ((loss, (metrics, stats)), gradients), as `jax.value_and_grad(task.loss, has_aux=True)`.
ValueAndGrad = Callable[[Any, Any, Any, jax.Array], tuple[tuple[jax.Array, tuple[dict, Any]], Any]]


def check(mesh: Mesh, batch_size: int, count: int, packed: int = 1) -> None:
    """Raises UserError unless the batch divides into `count` micro-batches that divide over the mesh's devices.

    `packed`: examples of a row; what is divided are rows.
    """
    if packed > 1:
        with located(f'batch_size={batch_size} with pack.examples={packed} is one of {batch_size // packed} rows'):
            return check(mesh, batch_size // packed, count)
    meshes.check_batch(mesh, batch_size)
    works, parts = counts(mesh, batch_size), meshes.data_parts(mesh)
    if count not in works:
        near = min(works, key=lambda n: (abs(n - count), n))
        raise UserError(
            f'accumulate={count}: micro-batches of batch_size={batch_size} / {count} do not divide over {parts} '
            f'device{"s" if parts > 1 else ""}: use accumulate={near}, or a batch_size that is a multiple of '
            f'{count * parts}'
        )


def counts(mesh: Mesh, batch_size: int, packed: int = 1) -> list[int]:
    """The numbers of micro-batches that `check` accepts of a batch that divides over the devices; rising."""
    rows = batch_size // packed // meshes.data_parts(mesh)  # of a device
    return [n for n in range(1, rows + 1) if rows % n == 0]


def value_and_grad(task: Any, count: int) -> ValueAndGrad:
    """The function that gives a task's loss and gradients in `count` micro-batches.

    Tasks that split their loss into `embed` and `loss_from_embeddings` get the gradients of the whole batch. Others get
    the mean over micro-batches, each with its share of what the loss is a mean over, if they have a `weight` (of a
    batch: supervised tokens, or examples that have any), else alike. Metrics are such means too. Each micro-batch draws
    dropout with its own key, and `stats` pass from one to the next: BatchNorm normalises over one.
    """
    if count == 1:
        return jax.value_and_grad(task.loss, has_aux=True)
    if hasattr(task, 'loss_from_embeddings'):
        return lambda params, stats, batch, rng: _through_embeddings(task, count, params, stats, batch, rng)
    return lambda params, stats, batch, rng: _mean(task, count, params, stats, batch, rng)


def _mean(task, count, params, stats, batch, rng):
    gradients, parts = jax.value_and_grad(task.loss, has_aux=True), _split(batch, count)
    shares = jnp.full(count, 1 / count)
    if hasattr(task, 'weight'):
        weights = jax.vmap(task.weight)(parts)
        shares = weights / jnp.maximum(jnp.sum(weights), 1.0)

    def micro(carry, inputs):
        stats, grads = carry
        index, part, share = inputs
        (loss, (metrics, stats)), new = gradients(params, stats, part, jax.random.fold_in(rng, index))
        return (stats, jax.tree.map(lambda sum_, g: sum_ + share.astype(g.dtype) * g, grads, new)), (loss, metrics)

    start = stats, jax.tree.map(jnp.zeros_like, params)
    (stats, grads), (loss, metrics) = jax.lax.scan(micro, start, (jnp.arange(count), parts, shares))
    loss, metrics = jax.tree.map(lambda x: jnp.sum(shares * x, axis=0), (loss, metrics))
    return (loss, (metrics, stats)), grads


def _through_embeddings(task, count, params, stats, batch, rng):
    parts = jnp.arange(count), _split(batch, count)

    def embed(params, stats, inputs):
        index, part = inputs
        zimg, ztxt, stats = task.embed(params, stats, part, jax.random.fold_in(rng, index))
        return (zimg, ztxt), stats

    def forward(stats, inputs):
        embeddings, stats = embed(params, stats, inputs)
        return stats, embeddings

    _, embeddings = jax.lax.scan(forward, stats, parts)
    by_all = jax.value_and_grad(task.loss_from_embeddings, argnums=(0, 1, 2), has_aux=True)
    (loss, metrics), (grads, *by_embeddings) = by_all(params, *_join(embeddings))

    def replay(carry, inputs):
        stats, grads = carry
        inputs, cotangents = inputs
        # The same keys and stats as before: the embeddings whose gradients these are.
        _, pull, stats = jax.vjp(lambda params: embed(params, stats, inputs), params, has_aux=True)
        return (stats, jax.tree.map(jnp.add, grads, pull(cotangents)[0])), None

    (stats, grads), _ = jax.lax.scan(replay, (stats, grads), (parts, _split(tuple(by_embeddings), count)))
    return (loss, (metrics, stats)), grads


def _split(tree, count):
    """[B, ...] → [count, B / count, ...]. Every count-th row: so each device splits the rows that it has."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), tree)


def _join(tree):
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)
