"""How a gradient becomes a direction: one function per optimizer, without learning rate, decay or clipping.

| name | rule | source |
|---|---|---|
| adamw | first moment over the root of the second, bias-corrected | arXiv 1711.05101, algorithm 2 |
| adafactor | second moment in rows and columns, no first one; clipped to RMS 1 | arXiv 1804.04235 |
| big_vision_adafactor | the same unclipped, with a first moment, in bfloat16 | arXiv 2106.04560, section 3.4 |
| lion | the sign of an interpolated first moment | arXiv 2302.06675, program 1 |
| muon | the layers' matrices orthogonalised, all else by adamw | Jordan 2024; arXiv 2502.16982 |
| sgd | momentum, Nesterov's if asked for | Sutskever et al. 2013, equations 1 to 4 |

Adafactor's rows and columns are the two longest axes of a parameter, if both have 128 (big_vision's: 32) or more; it
clips a stack of layers as one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vlm.config import Optimizer, UserError, unknown
from big_vlm.models import matrices


def make(config: Optimizer, where: str) -> optax.GradientTransformation:
    """The rule that `config.name` names. Raises UserError for an unknown one, or an option that it does not have."""
    if config.name not in _RULES:
        raise unknown('optimizer', config.name, _RULES, f'{where}.name')
    for key, takers in _TAKEN_BY.items():
        if getattr(config, key) != getattr(Optimizer, key) and config.name not in takers:
            raise UserError(
                f'{where}.{key}: {config.name} has no such choice, {" and ".join(takers)} have; leave it out'
            )
    if config.name == 'sgd' and not config.b1:
        for key in ('nesterov', 'momentum_dtype'):
            if getattr(config, key):
                raise UserError(f'{where}.{key}: sgd with b1=0 keeps no first moment; set b1, or leave it out')
    return _RULES[config.name](config)


def _adamw(config: Optimizer) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=_b2(config, 0.99), eps=config.eps, mu_dtype=_dtype(config))


def _factored(config: Optimizer, min_size: int, cap: float) -> optax.GradientTransformation:
    # The paper's 1 - step^-0.8 forgets ever more slowly; long runs cap it ("Scaling Vision Transformers", section 3.4).
    def decay(step: jax.Array, exponent: float) -> jax.Array:
        return jnp.minimum(_b2(config, cap), 1 - (step.astype(jnp.float32) + 1) ** -exponent)

    return optax.scale_by_factored_rms(min_dim_size_to_factor=min_size, decay_rate_fn=decay)


def _adafactor(config: Optimizer) -> optax.GradientTransformation:
    return optax.chain(_factored(config, 128, 1.0), optax.clip_by_block_rms(1.0))


def _big_vision_adafactor(config: Optimizer) -> optax.GradientTransformation:
    return optax.chain(_factored(config, 32, 0.999), _first_moment(config.b1, _dtype(config) or jnp.bfloat16))


def _first_moment(b1: float, dtype: Any) -> optax.GradientTransformation:
    """m ← b1 · m + (1 - b1) · update, not bias-corrected, kept in `dtype`.

    As `optax.ema`, which multiplies in `dtype`: there 0.9 is the bfloat16 0.8984.
    """

    def init(params: Any) -> optax.TraceState:
        return optax.TraceState(jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params))

    def update(updates: Any, state: optax.TraceState, params: Any = None) -> tuple[Any, optax.TraceState]:
        del params
        moment = jax.tree.map(lambda u, m: b1 * m.astype(u.dtype) + (1 - b1) * u, updates, state.trace)
        return moment, optax.TraceState(jax.tree.map(lambda m: m.astype(dtype), moment))

    return optax.GradientTransformation(init, update)


def _lion(config: Optimizer) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=config.b1, b2=_b2(config, 0.99), mu_dtype=_dtype(config))


def _muon(config: Optimizer) -> optax.GradientTransformation:
    def dimensions(params: Any) -> Any:
        def leaf(path: Any, _: Any) -> optax.contrib.MuonDimensionNumbers | None:
            axes = matrices.axes(jax.tree_util.keystr(path, simple=True, separator='/'), matrices.LAYERS)
            return axes and optax.contrib.MuonDimensionNumbers(*axes)

        return jax.tree_util.tree_map_with_path(leaf, params)

    def rule(params: Any) -> Any:
        def is_leaf(x: Any) -> bool:
            return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)

        return jax.tree.map(lambda x: 'adam' if x is None else 'muon', dimensions(params), is_leaf=is_leaf)

    # Of matrices alone: what optax does to all else is Nesterov's Adam. A rate of -1 is none: the schedule comes after.
    # The factor 0.2 gives a matrix' update the size that Adam's usually has, so that one rate and one decay serve both
    # ("Muon is Scalable", arXiv 2502.16982, section 2.2).
    muon = optax.contrib.muon(
        -1.0,
        beta=config.b1,
        eps=config.eps,
        mu_dtype=_dtype(config),
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
    )
    return optax.partition({'muon': muon, 'adam': _adamw(config)}, rule)


def _sgd(config: Optimizer) -> optax.GradientTransformation:
    if not config.b1:
        return optax.identity()
    return optax.trace(decay=config.b1, nesterov=config.nesterov, accumulator_dtype=_dtype(config))


def _b2(config: Optimizer, default: float) -> float:
    return default if config.b2 is None else config.b2


def _dtype(config: Optimizer) -> Any:
    return jnp.dtype(config.momentum_dtype) if config.momentum_dtype else None


# Settings that not every rule has.
_TAKEN_BY = {
    'nesterov': ('sgd',),
    'eps': ('adamw', 'muon'),
    'b1': ('adamw', 'big_vision_adafactor', 'lion', 'muon', 'sgd'),
    'b2': ('adamw', 'adafactor', 'big_vision_adafactor', 'lion', 'muon'),
    'momentum_dtype': ('adamw', 'big_vision_adafactor', 'lion', 'muon', 'sgd'),
}
_RULES: dict[str, Callable[[Optimizer], optax.GradientTransformation]] = {
    'adamw': _adamw,
    'adafactor': _adafactor,
    'big_vision_adafactor': _big_vision_adafactor,
    'lion': _lion,
    'muon': _muon,
    'sgd': _sgd,
}
