"""One training step, and the first state: pure functions under thin jitted wrappers."""

import dataclasses
import functools
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from big_vlm.checkpoints import trees
from big_vlm.sharding import rules
from big_vlm.training import accumulation, offloading
from big_vlm.training.optimizer import Info, global_norm, updates_made
from big_vlm.training.state import TrainState


class Task(Protocol):
    """What training needs of a task; one whose parameters have bounds also has `constrain`, parameters → parameters."""

    flops_per_example: float  # forward and backward

    def init(self, rng: jax.Array) -> tuple[Any, Any]: ...

    def loss(self, params: Any, stats: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, tuple[dict, Any]]: ...


@functools.lru_cache(maxsize=8)
def init_shapes(task: Task) -> tuple[Any, Any]:
    """Shapes and dtypes of (params, stats), without making them. Traced once, as a start asks for them many times."""
    return jax.eval_shape(task.init, jax.random.key(0))


def param_shapes(task: Task) -> Any:
    """Those of the parameters alone."""
    return init_shapes(task)[0]


def abstract_state(
    task: Task,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    averaged: Any = None,
    offload: bool = False,
    own_rules: Sequence[rules.Rule] = (),
) -> TrainState:
    """Shapes, dtypes and shardings of the whole state: what a checkpoint is restored onto.

    Args:
      task, tx, mesh: whose state, and where.
      averaged: marks those of the parameters that have a moving average, `Info.trainable`; None: there are none.
      offload: the optimizer's arrays are in the host's memory, see `offloading`.
      own_rules: of `sharding.rules.param_shardings`, whose errors it raises.
    """
    params, stats = init_shapes(task)
    opt_state = jax.eval_shape(tx.init, params)
    ema = first_averages(averaged, params)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, stats, opt_state, ema)
    shardings = rules.state_shardings(shapes, rules.param_shardings(params, mesh, own_rules), mesh)
    if offload:
        shardings = shardings.replace(opt_state=offloading.on_host(shardings.opt_state, shapes.opt_state))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def first_averages(averaged: Any, params: Any) -> Any:
    """What the moving averages of parameters, or of their shapes, begin as: nested dicts of those that are marked.

    What is frozen is its own average and needs no copy. None where `averaged` is.
    """
    if averaged is None:
        return None
    marks = trees.flat(averaged)
    return trees.nested({path: x for path, x in trees.flat(params).items() if marks[path]})


def init_state(
    task: Task,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    *,
    averaged: Any = None,
    zeros: Collection[str] = (),
    **placed: Any,
) -> TrainState:
    """The state before the first step; each parameter is made where it lives, none is ever whole on one device.

    The values depend on `seed` alone, not on the mesh. Parameters whose path is in `zeros` are left at zero, for a
    caller who has others for them: what draws random numbers takes longest to compile. The rest as in `abstract_state`.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(task, tx, mesh, averaged=averaged, **placed))
    # Runs once: on CPU, optimising it takes twice as long as not to (measured, 13 s and 6 s for two small towers).
    options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else {}
    init = jax.jit(lambda key: _init(task, tx, key, averaged, zeros), out_shardings=shardings, compiler_options=options)
    with jax.set_mesh(mesh):
        return init(jax.random.key(seed))


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """(state, batch) → (state, metrics), compiled. The state that goes in is donated: use the one that comes out."""

    jitted: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    mesh: Mesh

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.set_mesh(self.mesh):
            return self.jitted(state, batch)

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """The step for abstract arguments, to be compiled and looked at."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(state, batch)


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    info: Info,
    mesh: Mesh,
    state: TrainState,
    seed: int,
    *,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    skip: bool = True,
    ema_warmup: bool = False,
) -> TrainStep:
    """The step of a task with an optimizer.

    Args:
      task: gives the loss.
      tx, info: from `optimizer.make`.
      mesh: of the state.
      state: a state or an abstract one; its shardings are those of the result.
      seed: of the step's random key, `fold_in(seed, step)`.
      accumulate: micro-batches that a batch is computed in, see `accumulation`.
      ema_decay: of `state.ema`, where the state has one; it is of what `info` marks as trained.
      skip: a batch whose loss or gradient is not finite leaves the state as it was in every bit, schedules included;
        `step` alone goes on, as it is the position in the data.
      ema_warmup: at most (1 + t) / (10 + t) at step t = 0, 1, … (`num_updates` of TensorFlow's average).

    Returns:
      The step. Its metrics are float32 scalars, replicated: the task's own, loss, lr (base rate), and the global norms
      of what is trained: grad_norm (before clipping), update_norm and param_norm.
    """

    value_and_grad = _value_and_grad(task, accumulate, info.trainable)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    constrain = getattr(task, 'constrain', lambda params: params)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        state = state.replace(opt_state=offloading.on_device(state.opt_state, shardings.opt_state))
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step)) if ema_warmup else ema_decay
        return _step(value_and_grad, tx, constrain, info, state, batch, rng, decay, skip)

    outputs = shardings, NamedSharding(mesh, PartitionSpec())
    return TrainStep(jax.jit(step, donate_argnums=0, out_shardings=outputs), mesh)


def _init(
    task: Task, tx: optax.GradientTransformation, key: jax.Array, averaged: Any, zeros: Collection[str]
) -> TrainState:
    params, stats = task.init(key)
    kept = {path: jnp.zeros_like(x) if path in zeros else x for path, x in trees.flat(params).items()}
    params = trees.like(params, kept)
    # A copy: two leaves of a donated state must not share a buffer.
    ema = jax.tree.map(jnp.copy, first_averages(averaged, params))
    return TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params), ema)


def _step(
    value_and_grad: accumulation.ValueAndGrad,
    tx: optax.GradientTransformation,
    constrain: Callable[[Any], Any],
    info: Info,
    state: TrainState,
    batch: Any,
    rng: jax.Array,
    ema_decay: float | jax.Array,
    skip: bool,
) -> tuple[TrainState, dict[str, jax.Array]]:
    (loss, (metrics, stats)), grads = value_and_grad(state.params, state.stats, batch, rng)
    trainable = info.trainable
    grads = _trained(trainable, grads)
    grad_norm = global_norm(grads)

    def update(params, opt_state, ema, grads):
        whole = _with(trainable, params, state.params)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        updates, opt_state = tx.update(_with(trainable, grads, zeros), opt_state, whole)
        updates = _trained(trainable, updates)
        params = _trained(trainable, constrain(_with(trainable, optax.apply_updates(params, updates), state.params)))
        pairs = zip(ema, params, strict=True) if ema else ()
        ema = [ema_decay * average + (1 - ema_decay) * p for average, p in pairs]
        return params, opt_state, ema, updates

    # What is frozen stays the same bits, and has no average.
    old = _trained(trainable, state.params), state.opt_state, jax.tree.leaves(state.ema)
    if skip:
        # A branch writes the new state over the old, and the updates over the gradients, which the other one passes on.
        # To choose between two states afterwards, both have to be there.
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state, ema, updates = jax.lax.cond(good, update, lambda *same: same, *old, grads)
        update_norm = jnp.where(good, global_norm(updates), 0)
        stats = jax.tree.map(lambda new, old: jnp.where(good, new, old), stats, state.stats)
    else:
        params, opt_state, ema, updates = update(*old, grads)
        update_norm = global_norm(updates)
    params, ema = _with(trainable, params, state.params), jax.tree.unflatten(jax.tree.structure(state.ema), ema)
    new = TrainState(state.step + 1, params, stats, opt_state, ema)
    metrics = {
        **metrics,
        'loss': loss,
        'lr': info.learning_rate(updates_made(state.opt_state)),
        'grad_norm': grad_norm,
        'update_norm': update_norm,
        'param_norm': global_norm(_trained(trainable, new.params)),
    }
    metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
    return new, metrics


def _value_and_grad(task: Task, accumulate: int, trainable: Any) -> accumulation.ValueAndGrad:
    """That of `accumulation`, by what is trained alone. What is frozen has zeros, and no gradient in the program."""
    if all(jax.tree.leaves(trainable)):
        return accumulation.value_and_grad(task, accumulate)
    marks = trees.flat(trainable)

    def value_and_grad(params, stats, batch, rng):
        leaves = trees.flat(params)
        trained = {path: x for path, x in leaves.items() if marks[path]}

        def of_trained(function):
            return lambda some, *args: function(trees.like(params, leaves | some), *args)

        names = [name for name in ('loss', 'embed', 'loss_from_embeddings') if hasattr(task, name)]
        of_task = types.SimpleNamespace(**{name: of_trained(getattr(task, name)) for name in names})
        if hasattr(task, 'weight'):
            of_task.weight = task.weight
        value, grads = accumulation.value_and_grad(of_task, accumulate)(trained, stats, batch, rng)
        return value, trees.like(params, jax.tree.map(jnp.zeros_like, leaves) | grads)

    return value_and_grad


def _trained(trainable: Any, tree: Any) -> list[jax.Array]:
    """The leaves that are trained."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(trainable), strict=True)
    return [leaf for leaf, trained in pairs if trained]


def _with(trainable: Any, leaves: list[jax.Array], tree: Any) -> Any:
    """`tree` with these leaves for those that are trained."""
    rest = iter(leaves)
    return jax.tree.map(lambda x, trained: next(rest) if trained else x, tree, trainable)
