"""The optimizer: an update rule, clipped, with rules by parameter for rates, weight decay and freezing.

A rule is (regex over the whole '/'-joined path, ParamRule). The first one that matches decides; every parameter must be
matched and every rule must decide for something, so that a misspelt rule cannot pass unseen.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from big_vlm.config import Duration, Optimizer, ParamRule, UserError
from big_vlm.models import lora
from big_vlm.training import layer_decay, schedules, update_rules

# Decayed: what multiplies activations. Not: what is added, scales a norm, or is looked up.
DECAY_RULES: tuple[tuple[str, float], ...] = (
    (r'(.*/)?(kernel|w|linear|gating_einsum|input_embedding)(_lora_[ab])?', 1.0),
    (r'(.*/)?(bias|scale|pos_embedding|embedding|probe|cls|start|mask|prototypes|t|b)', 0.0),
)

Value = TypeVar('Value')


class Info(NamedTuple):
    """What the step and the log need to know of an optimizer."""

    learning_rate: schedules.Schedule  # the base rate, before any rule's multiplier
    trainable: Any  # like the parameters, of bool: False is frozen
    decay: dict[str, float]  # path → weight decay; frozen ones are left out


def make(
    config: Optimizer,
    total_steps: int,
    param_shapes: Any,
    *,
    batch_size: int = 1,
    examples_per_epoch: int | None = None,
    train: Sequence[str] = (),
    where: str = 'config.optimizer',
) -> tuple[optax.GradientTransformation, Info]:
    """The optax transformation of a run. Its updates are to be added to the parameters.

    Frozen parameters get zero updates, no moments, and no say in the clipped norm; those of a rule with a `start` are
    frozen until that step, from which on everything is as if the run began there: moments, warmup, schedule.

    Args:
      config: the section.
      total_steps: of the stage.
      param_shapes: pytree of arrays or ShapeDtypeStructs.
      batch_size: global; for warmups in examples or epochs.
      examples_per_epoch: for warmups in epochs.
      train: where there are LoRA adapters, they are trained, and besides them what one of these regexes matches.
      where: the dotted key, for errors.

    Raises:
      UserError: an unknown optimizer, a bad schedule, a rule without parameters, a parameter without a rule.
    """
    core = update_rules.make(config, where)
    paths = {_path(p) for p, _ in jax.tree_util.tree_leaves_with_path(param_shapes)}
    base = _base(paths, train)
    rules = match(config.rules or (('.*', ParamRule()),), sorted(paths - base), f'{where}.rules')
    rules |= dict.fromkeys(base, ParamRule(frozen=True))
    if all(rule.frozen for rule in rules.values()):
        raise UserError(f'{where}.rules: every parameter is frozen, nothing is left to train')
    trained = {path: rule for path, rule in rules.items() if not rule.frozen}
    default = [path for path, rule in trained.items() if rule.decay is None]
    decay = match(DECAY_RULES, default, 'the default weight-decay rules', all_used=False) if config.weight_decay else {}
    decay |= {path: rule.decay for path, rule in trained.items() if rule.decay is not None}
    decay = {path: config.weight_decay * factor for path, factor in decay.items()}
    factors = layer_decay.factors({path: rule.layer_decay for path, rule in trained.items()}, param_shapes, where)

    def in_steps(duration: Duration, key: str, steps: int = total_steps) -> int:
        of_run = dict(batch_size=batch_size, examples_per_epoch=examples_per_epoch, total_steps=steps)
        return schedules.steps(duration, **of_run, where=f'{where}.{key}')

    def start(rule: ParamRule) -> int:
        begin = in_steps(rule.start, 'rules: start')
        if begin >= total_steps:
            raise UserError(f'{where}.rules: start {begin} is not before the end of the stage, {total_steps} steps')
        return begin

    def schedule(rule: ParamRule, peak: float) -> schedules.Schedule:
        steps, name = total_steps - start(rule), rule.schedule or config.schedule
        own = name != config.schedule  # then the optimizer's options go with it only where they can
        return schedules.learning_rate(
            name,
            peak,
            steps,
            in_steps(rule.warmup if rule.warmup.given() else config.warmup, 'warmup', steps),
            f'{where}.schedule',
            curve=config.curve,
            cooldown_steps=0 if own and name in schedules.ENDING else in_steps(config.cooldown, 'cooldown', steps),
            timescale_steps=0 if own and name != 'rsqrt' else in_steps(config.timescale, 'timescale', steps),
        )

    rates = {rule: schedule(rule, config.lr * rule.lr) for rule in {*trained.values(), ParamRule()}}
    of_decay = {rule: schedule(rule, 1.0) for rule in rates} if config.decay_by == 'schedule' else {}
    last = _decay_and_scale(
        decay,
        {path: rates[rule] for path, rule in trained.items()},
        {path: of_decay[rule] for path, rule in trained.items() if of_decay},
        factors,
    )
    starts = {path: start(rule) for path, rule in trained.items()}
    groups = {_label(n): n for n in sorted(set(starts.values()))}
    clip = _clip(config.clip) if config.clip else optax.identity()
    if set(groups) == {'trained'}:
        transformation = optax.chain(clip, core, last)
    else:
        transformation = optax.chain(core, last)
    labels = _by_path(lambda path, _: _label(starts.get(path)), param_shapes)
    if len(trained) < len(rules) or set(groups) != {'trained'}:
        by_label = {label: _from_step(n, transformation) if n else transformation for label, n in groups.items()}
        if len(trained) < len(rules):
            by_label['frozen'] = optax.set_to_zero()
        transformation = optax.multi_transform(by_label, labels)
    if set(groups) != {'trained'}:
        transformation = optax.chain(_withhold(starts), clip, transformation)
    return transformation, Info(rates[ParamRule()], _by_path(lambda path, _: path in trained, param_shapes), decay)


def _base(paths: Collection[str], train: Sequence[str]) -> set[str]:
    """What LoRA leaves alone; nothing without adapters."""
    if not any(lora.is_trained(path) for path in paths):
        return set()
    also = {path for path in paths if not lora.is_adapter(path) and any(re.fullmatch(p, path) for p in train)}
    return {path for path in paths if not lora.is_trained(path)} - also


def _label(start: int | None) -> str:
    return 'frozen' if start is None else f'trained from step {start}' if start else 'trained'


def updates_made(opt_state: Any) -> jax.Array:
    """int32 [], what the schedules go by: steps that updated something."""
    counts = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, _Count))
    return next(x.count for x in counts if isinstance(x, _Count))


def restarted(opt_state: Any) -> Any:
    """With schedules and waiting rules at their beginning, and all moments as they are."""

    def leaf(part: Any) -> Any:
        if not isinstance(part, (_Count, _Waiting)):
            return part
        begun = part._replace(count=jax.device_put(np.zeros((), np.int32), part.count.sharding))
        return begun if isinstance(part, _Count) else begun._replace(inner=restarted(part.inner))

    return jax.tree.map(leaf, opt_state, is_leaf=lambda part: isinstance(part, (_Count, _Waiting)))


def match(
    rules: Sequence[tuple[str, Value]], paths: Sequence[str], where: str, *, all_used: bool = True
) -> dict[str, Value]:
    """Path → value of the first rule whose regex matches the whole path.

    Raises:
      UserError: paths that no rule matches, or (if `all_used`) a rule that decides for no path.
    """
    found, used = {}, set()
    for path in sorted(paths):
        for i, (pattern, value) in enumerate(rules):
            if re.fullmatch(pattern, path):
                found[path] = value
                used.add(i)
                break
    if missing := sorted(set(paths) - set(found)):
        more = f' and {len(missing) - 3} more' if len(missing) > 3 else ''
        raise UserError(f"{where}: no rule matches {', '.join(missing[:3])}{more}: end with a rule for '.*'")
    if idle := [pattern for i, (pattern, _) in enumerate(rules) if i not in used] if all_used else []:
        raise UserError(
            f'{where}: {", ".join(map(repr, idle))} decides for no parameter: it must match a whole path that no '
            f'earlier rule took, such as {min(paths)!r}'
        )
    return found


def global_norm(tree: Any) -> jax.Array:
    """float32 [], the norm of all leaves together.

    As products of each leaf with itself: of sums of squares, `optax.tree.norm`, XLA makes several loops a leaf, which a
    CPU takes seconds to compile.
    """
    squares = (
        jnp.tensordot(x, x, x.ndim, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        for x in jax.tree.leaves(tree)
    )
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def _clip(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by our norm, which the log shows too and XLA then computes once."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        norm = global_norm(updates)
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        # In float32, as the factor is: int4 of a frozen base has no product with it.
        return jax.tree.map(lambda u: (u.astype(jnp.float32) * factor).astype(u.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


class _Count(NamedTuple):
    count: jax.Array  # int32 []


def _withhold(starts: dict[str, int]) -> optax.GradientTransformation:
    """Zeros instead of gradients before the step of `starts`, and for paths that are not in it."""

    def init(params: Any) -> _Count:
        del params
        return _Count(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: _Count, params: Any = None) -> tuple[Any, _Count]:
        del params

        def leaf(path: str, u: jax.Array) -> jax.Array:
            if path not in starts:
                return jnp.zeros_like(u)
            return jnp.where(state.count >= starts[path], u, jnp.zeros_like(u)) if starts[path] else u

        return _by_path(leaf, updates), _Count(state.count + 1)

    return optax.GradientTransformation(init, update)


class _Waiting(NamedTuple):
    count: jax.Array  # int32 []
    inner: Any


def _from_step(start: int, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` as if the run began at step `start`: until then no update, no moments, and its own count at 0."""

    def init(params: Any) -> _Waiting:
        return _Waiting(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: _Waiting, params: Any, **_: Any) -> tuple[Any, _Waiting]:
        begun = state.count >= start
        new, after = inner.update(updates, state.inner, params)
        new = jax.tree.map(lambda u: jnp.where(begun, u, jnp.zeros_like(u)), new)
        after = jax.tree.map(lambda a, b: jnp.where(begun, a, b), after, state.inner)
        return new, _Waiting(state.count + 1, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _decay_and_scale(
    decay: dict[str, float],
    rates: dict[str, schedules.Schedule],
    decay_rates: dict[str, schedules.Schedule],
    factors: dict[str, np.ndarray],
) -> optax.GradientTransformationExtraArgs:
    """update ← -factor · rate(step) · (update + decay · parameter), each by path (frozen leaves have none).

    Where there are `decay_rates`, the decay has these instead of factor and rate.
    """

    def init(params: Any) -> _Count:
        del params
        return _Count(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: _Count, params: Any, **_: Any) -> tuple[Any, _Count]:
        now = {schedule: schedule(state.count) for schedule in {*rates.values(), *decay_rates.values()}}

        def leaf(path: str, u: jax.Array, p: jax.Array) -> jax.Array:
            coupled = path not in decay_rates
            decayed = u + decay[path] * p if coupled and decay.get(path) else u
            new = -now[rates[path]] * decayed
            if path in factors:
                new = new * factors[path]
            if not coupled and decay.get(path):
                new = new - now[decay_rates[path]] * decay[path] * p
            return new.astype(u.dtype)

        return _by_path(leaf, updates, params), _Count(state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _by_path(fn: Callable[..., Any], *trees: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(_path(path), *leaves), *trees)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')
