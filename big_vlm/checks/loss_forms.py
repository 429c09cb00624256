"""Proof that every way to compute a contrastive loss gives one result: dense, tiled, ring and accumulated.

Each is compared with float64 on the same float32 embeddings, at the temperature and bias of a new model and of a
learned one: the value, and the gradient by every embedding, by t and by b. What float32 has to round away is no error.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from big_vlm.config import UserError
from big_vlm.ops import contrastive
from big_vlm.sharding import mesh as meshes
from big_vlm.training import accumulation

LIMIT = 1e-5  # norm-wise relative error in float32, beside `_rounding`
FLOAT32 = np.finfo(np.float32)
# name → log of the logit scale, and bias: how SigLIP starts, and near where it ends.
TEMPERATURES = {'new': {'t': np.log(10.0), 'b': -10.0}, 'learned': {'t': np.log(100.0), 'b': -40.0}}


class Row(NamedTuple):
    """One way to compute one loss.

    `errors`: relative, of 'value' and of the gradients 'zimg', 'ztxt', 't', 'b'. Norm of the difference / (norm of the
    truth + what float32 has to round away / LIMIT), so that LIMIT is the most that both together allow.
    """

    loss: str
    temperature: str
    form: str
    errors: dict[str, float]


def compare(
    batch: int,
    width: int,
    tile: int = 0,
    accumulate: int = 4,
    seed: int = 0,
    embeddings: Mapping[str, np.ndarray] | None = None,
) -> Iterator[Row]:
    """Computes both losses in every form on all devices, and yields a row as soon as it is known.

    Args:
      batch: pairs.
      width: of the embeddings.
      tile: images whose logits the tiled form and the ring hold at once; 0: a third of what a device has, rounded up.
      accumulate: micro-batches of the accumulated form.
      seed: of the embeddings.
      embeddings: `zimg` and `ztxt`, float32 [batch, width], instead of random ones.

    Raises:
      UserError: sizes that are too small, or do not divide over the devices or into micro-batches.
    """
    for name, value, least in (
        ('batch', batch, 8),  # of fewer, gradients cancel by chance to what float32 does not hold
        ('width', width, 4),
        ('tile', tile, 0),
        ('accumulate', accumulate, 1),
        ('seed', seed, 0),
    ):
        if value < least:
            raise UserError(f'{name}={value}: must be at least {least}')
    devices = jax.device_count()
    for value, what in ((devices, f'over {devices} devices'), (accumulate, f'into {accumulate} micro-batches')):
        if batch % value:
            raise UserError(f'batch={batch} does not divide {what}: use a multiple of {np.lcm(devices, accumulate)}')

    tile = tile or -(-batch // devices // 3)
    forms = {
        'dense': {},
        'tiled': dict(form='ring', mesh=meshes.make_mesh(devices=jax.devices()[:1]), tile=tile),
        'ring': dict(form='ring', mesh=meshes.make_mesh(), tile=tile),
    }
    for loss, (function, oracle) in _LOSSES.items():
        for temperature, scalars in TEMPERATURES.items():
            args = dict(embeddings or _arguments(batch, width, seed)) | {
                name: np.float32(x) for name, x in scalars.items()
            }
            if loss == 'softmax':
                del args['b']
            exact = {name: np.asarray(x, np.float64) for name, x in args.items()}
            *expected, weight = oracle(**exact)
            apart = _rounding(weight, **exact)
            # Rings keep positives apart from negatives, and pairs of a sigmoid know nothing of each other.
            dense = _rounding(weight, **exact, together=loss == 'softmax')
            for form, options in forms.items():
                gradients = jax.value_and_grad(lambda args, f=function, options=options: f(**args, **options))
                rounding = apart if options else dense
                yield Row(loss, temperature, form, _errors(*jax.jit(gradients)(args), *expected, rounding))
            (value, _), grads = jax.jit(accumulation.value_and_grad(_Embeddings(function), accumulate))(
                args, {}, {'row': jnp.arange(batch)}, jax.random.key(0)
            )
            yield Row(loss, temperature, 'accumulated', _errors(value, grads, *expected, dense))


def read(path: str) -> dict[str, np.ndarray]:
    """`zimg` and `ztxt`, float32 [B, E], of an .npz file.

    Raises:
      UserError: no such file or arrays, shapes that do not match, a row that is not finite or not of length 1.
    """
    try:
        with np.load(path) as file:
            found = {name: np.asarray(file[name], np.float32) for name in ('zimg', 'ztxt')}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        why = getattr(error, 'strerror', None) or 'damaged, or without one of them'
        raise UserError(f'{path}: cannot be read as an .npz of zimg and ztxt, [batch, width] each: {why}') from error
    contrastive.check_pairs(*found.values())
    for name, z in found.items():
        lengths = np.linalg.norm(z, axis=1)
        if len(bad := np.flatnonzero(~np.isfinite(lengths))):
            raise UserError(
                f'{path}: {name}: row {bad[0]} has values that are not finite, as {len(bad)} of {len(z)} have'
            )
        if len(bad := np.flatnonzero(abs(lengths - 1) > 0.01)):  # bfloat16 rounds to some thousandths
            raise UserError(
                f'{path}: {name}: row {bad[0]} has length {lengths[bad[0]]:.3g}, and {len(bad)} of {len(z)} have not '
                'length 1: divide every row by its own'
            )
    return found


class _Embeddings:
    """A task whose parameters are the loss's arguments: a batch picks rows, and their gradients can be compared."""

    def __init__(self, function: Callable[..., jax.Array]):
        self.function = function

    def embed(self, params, stats, batch, rng):
        del rng
        return params['zimg'][batch['row']], params['ztxt'][batch['row']], stats

    def loss_from_embeddings(self, params, zimg, ztxt):
        return self.function(**{**params, 'zimg': zimg, 'ztxt': ztxt}), {}

    def loss(self, params, stats, batch, rng):
        zimg, ztxt, stats = self.embed(params, stats, batch, rng)
        loss, metrics = self.loss_from_embeddings(params, zimg, ztxt)
        return loss, (metrics, stats)


def _arguments(batch, width, seed):
    """Pairs that are partly alike, as those of a trained model."""
    rng = np.random.default_rng(seed)
    zimg, noise = (_unit(rng.normal(size=(batch, width))) for _ in range(2))
    return {'zimg': zimg.astype(np.float32), 'ztxt': _unit(0.4 * zimg + noise).astype(np.float32)}


def _unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _errors(value: Any, grads: Mapping, expected: Any, expected_grads: Mapping, rounding: Mapping) -> dict[str, float]:
    pairs = {'value': (value, expected)} | {name: (grads[name], g) for name, g in expected_grads.items()}
    return {
        name: float(np.linalg.norm(np.asarray(x, np.float64) - y) / (np.linalg.norm(y) + rounding[name] / LIMIT))
        for name, (x, y) in pairs.items()
    }


def _rounding(weight, zimg, ztxt, t, b=0.0, together=False):
    """What float32 has to round away of the value and of each gradient; rows have length 1.

    A logit is rounded to eps of its largest size, scale + |bias|. So much, times the logit's weight (the gradient by
    it), is the loss off; and so much of itself is the weight, an exponential of logits. Where gradients cancel, as of
    pairs that are all alike, the truth may be less.

    `together`: a softmax over positive and negatives at once rounds away so much of a positive's probability, too. That
    is nearly 1 of a learned pair, and what is left of its loss, 1 minus it, may be less.
    """
    scale, batch = np.exp(t), len(weight)
    off = FLOAT32.eps * (scale + abs(b)) * (abs(weight) + together * np.eye(batch) / batch) + FLOAT32.tiny
    return {
        'value': off.sum(),
        'zimg': scale * np.linalg.norm(off.sum(axis=1)),
        'ztxt': scale * np.linalg.norm(off.sum(axis=0)),
        't': scale * (off * abs(zimg @ ztxt.T)).sum(),
        'b': off.sum(),
    }


def _sigmoid(zimg, ztxt, t, b):
    """Zhai et al. 2023, algorithm 1, its gradients by hand, and that by the logits."""
    batch, scale, cosine = len(zimg), np.exp(t), zimg @ ztxt.T
    label = 2 * np.eye(batch) - 1
    logits = label * (cosine * scale + b)
    weight = -label * np.exp(-np.logaddexp(0, logits)) / batch
    grads = {'zimg': scale * weight @ ztxt, 'ztxt': scale * weight.T @ zimg}
    grads |= {'t': (weight * cosine).sum() * scale, 'b': weight.sum()}
    return np.logaddexp(0, -logits).sum() / batch, grads, weight


def _softmax(zimg, ztxt, t):
    """Radford et al. 2021, figure 3, its gradients by hand, and that by the logits.

    The loss of a choice is log(1 + rest), the rest being how likely the others are beside the right one: of a learned
    pair it is less than what float64 would leave of 1.
    """
    batch, scale = len(zimg), np.exp(t)
    logits, right, loss, weight = zimg @ ztxt.T * scale, np.eye(batch), 0.0, 0.0
    for axis in (0, 1):
        others = np.exp(logits - np.expand_dims(np.diag(logits), axis)) * (1 - right)
        rest = others.sum(axis=axis, keepdims=True)
        loss += np.log1p(rest).mean() / 2
        weight += (others - rest * right) / (1 + rest) / 2 / batch
    grads = {'zimg': scale * weight @ ztxt, 'ztxt': scale * weight.T @ zimg, 't': (weight * logits).sum()}
    return loss, grads, weight


_LOSSES = {'sigmoid': (contrastive.sigmoid_loss, _sigmoid), 'softmax': (contrastive.softmax_loss, _softmax)}
