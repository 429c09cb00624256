"""What a training step takes of each device, as its compiler tells: no data is read, the devices may be absent."""

import dataclasses
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from big_vlm import config, tasks
from big_vlm.checks.collectives import Collective, collectives
from big_vlm.config import Stage, UserError
from big_vlm.data import naflex, packing, prompts, transforms
from big_vlm.data.contract import Contract
from big_vlm.data.coordinates import NUM_LOCATIONS, NUM_SEGMENTS
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.sharding import mesh as meshes
from big_vlm.training import accumulation, loop, memory, offloading, stages
from big_vlm.training import step as steps

REST = 'activations, the rest'
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Report:
    """What one training step takes.

    Attributes:
      batch_size: global, examples.
      per_device: examples of one device.
      memory: part → bytes of one device. Parameters, averages, optimizer, gradients and batch from shapes and
        shardings; the loss from its own compilation with its gradients; REST is the difference to `total`, less than
        nothing where the parts are not all there at the same time. Without `loss`, that is in REST.
      total: bytes of one device, the compiler's; None if it gave up and did not say.
      limit: bytes that one device has; None where that is not known.
      collectives: of one device; empty where the compiler gave up.
      flops_per_example: of the model's forward and backward pass; what is computed again is not counted.
      seconds: that compiling the step took.
    """

    batch_size: int
    per_device: int
    memory: dict[str, int]
    total: int | None
    limit: int | None
    collectives: list[Collective]
    flops_per_example: float
    seconds: float

    @property
    def constant(self) -> int:
        """Bytes that do not depend on the batch size."""
        return sum(self.memory.get(name, 0) for name in ('parameters', 'averages', 'optimizer', 'gradients'))

    @property
    def fits(self) -> bool:
        return self.limit is None or (self.total is not None and self.total <= self.limit)


def measure(
    stage: Stage, mesh: Mesh, limit: int | None = None, batch_size: int = 0, where: str = 'config', loss: bool = True
) -> Report:
    """Compiles the step that training takes, and says what it needs.

    Args:
      stage: validated. A tokenizer that is still to be trained, or is not on this machine, has
        `tokenizer.vocab_size` pieces.
      mesh: of real, simulated or described devices.
      limit: bytes that one device has; None: not known, everything fits.
      batch_size: instead of the stage's; 0: that.
      where: the stage's dotted key, for errors.
      loss: whether the loss is compiled by itself too, to tell its part of the memory.

    Raises:
      UserError: a batch that the mesh cannot divide; a variant, an optimizer or a rule that does not exist.
    """
    batch_size = batch_size or stage.batch_size
    with config.located(where):
        accumulation.check(mesh, batch_size, stage.accumulate, stage.pack.examples)
        if stage.optimizer.offload:
            offloading.check(mesh)
        contract = stages.draft_contract(stage, vocab_size(stage))
        task = tasks.make(stage, contract, mesh)
        shapes = steps.param_shapes(task)
    # How long an epoch is, and how many batches make it, changes constants of the schedule alone.
    tx, info = loop.make_optimizer(stage, shapes, loop.any_epoch(stage), where)
    with config.located(f'{where}.mesh.rules'):
        state = steps.abstract_state(task, tx, mesh, **loop.state_options(stage, info))
    batch = abstract_batch(stage, contract, mesh, batch_size)
    parts = memory.parts(state, batch, info.trainable)
    step = loop.make_step(stage, task, tx, info, mesh, state).lower(state, batch)
    began = time.perf_counter()
    total, program = _compile(step, sum(parts.values()) - parts['gradients'])
    seconds = time.perf_counter() - began
    if loss and stage.task != tasks.MaskAutoencoder.kind:  # whose loss is a part of no size
        parts['loss'] = _compile(*_loss(task, state, batch, mesh, stage.accumulate))[0] or 0
    if total is not None:
        parts[REST] = total - sum(parts.values())
    per_device = batch_size // meshes.data_parts(mesh)
    parts = {name: size for name, size in parts.items() if size}
    found = collectives(program)
    return Report(batch_size, per_device, parts, total, limit, found, task.flops_per_example, seconds)


def largest(measured: Callable[[int], Report], begin: int, unit: int) -> Report:
    """The report of a batch that takes all memory but a thirty-second, or else of the largest that fits.

    If not even `unit` does, its own. Memory is nearly a straight line in the batch. The first report gives its slope if
    only weights, gradients and optimizer are taken for constant; where what follows misses, two give the line.

    Args:
      measured: batch size → report, with a limit.
      begin: a batch size to begin with, a small one: compilers take long over what does not fit.
      unit: what batch sizes are multiples of.
    """
    known: dict[int, Report] = {}
    n, low, high = max(begin // unit, 1), 0, None
    while True:
        report = known[n] = measured(unit * n)
        if report.fits:
            low = n
        else:
            high = n
        least = max(low // 32, 1)
        if low and known[low].total >= known[low].limit * 31 / 32 or high is not None and high - low <= least:
            return known[low or high]
        most = high - least if high else 16 * low
        n = _guess(known)
        n = (low + most) // 2 if n is None or (high and n >= high) else n
        n = min(max(n, low + least), most)


def _guess(known: dict[int, Report]) -> int | None:
    """How many units take all of the limit but a sixty-fourth; None where that does not follow."""
    # What a compiler says of a program that does not fit, after all that it tried, is less to be relied on.
    told = sorted((n for n in known if known[n].total), key=lambda n: (known[n].fits, n))[-2:]
    if not told:
        return None
    last = known[told[-1]]
    before, constant = (told[0], known[told[0]].total) if len(told) > 1 else (0, last.constant)
    slope = (last.total - constant) / (told[-1] - before)
    return int(told[-1] + (last.limit * 63 / 64 - last.total) / slope) if slope > 0 else None


def advice(report: Report, stage: Stage, mesh: Mesh) -> str:
    """One line about a step that does not fit: what it needs, and what to change in the config, where that is valid."""
    needs = f'{report.total / 2**30:.2f} GiB' if report.total else 'more memory'
    line = f'batch_size={report.batch_size} needs {needs} of the {report.limit / 2**30:.2f} GiB that a device has'
    changes = []
    fsdp = mesh.size // mesh.shape['model']
    if report.constant > report.limit / 4 and mesh.shape['fsdp'] < fsdp:
        changes.append(f'mesh.fsdp={fsdp}' + (' with mesh.data=-1' if stage.mesh.data > 1 else ''))
    if report.constant >= report.limit:
        weights = f'{report.constant / 2**30:.2f} GiB'
        return f'{line}, weights, gradients and optimizer alone {weights}: {" or ".join([*changes, "more devices"])}'
    model = {}
    if stage.model.dtype == 'float32':
        model['dtype'] = 'bfloat16'
    if stage.model.remat == 'none':
        model['remat'] = 'full'
    if stage.task == tasks.Contrastive.kind and stage.model.loss_form in ('dense', 'checkpoint'):
        model['loss_form'] = 'ring'
    if stage.task == tasks.Generative.kind and stage.model.token_loss == 'dense':
        model['token_loss'] = 'gathered'
    for name, value in model.items():
        if _valid(stage, model=dataclasses.replace(stage.model, **{name: value})):
            changes.append(f'model.{name}={value!r}')
    # What grows with the batch, over what is left for it.
    over = (report.total - report.constant) / (report.limit - report.constant) if report.total else 2
    more = [n for n in accumulation.counts(mesh, report.batch_size, stage.pack.examples) if n > stage.accumulate]
    if more and _valid(stage, accumulate=more[0]):
        changes.append(f'accumulate={next((n for n in more if n >= over * stage.accumulate), more[-1])}')
    if more:
        changes.append('a smaller batch_size (--fit finds the largest)')
    return f'{line}: try {", ".join([*changes, "more devices"])}'


def _valid(stage: Stage, **changes: Any) -> bool:
    """Whether the config would be accepted with these settings."""
    try:
        config.parse_stage(config.to_dict(dataclasses.replace(stage, **changes)))
    except UserError:
        return False
    return True


def vocab_size(stage: Stage) -> int:
    """Of the stage's tokenizer if it is on this machine, else as many pieces as the config says."""
    if stage.tokenizer.path and os.path.exists(stage.tokenizer.path):
        return Tokenizer.load(stage.tokenizer.path).vocab_size
    return stage.tokenizer.vocab_size + NUM_LOCATIONS + NUM_SEGMENTS


def abstract_batch(stage: Stage, contract: Contract, mesh: Mesh, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch, without data."""
    picture = np.zeros((contract.image_size, contract.image_size, 3), np.uint8)
    example = naflex.rows(picture, contract) if contract.max_patches else {'image': picture}
    if stage.task == tasks.Contrastive.kind:
        text, text_mask = prompts.contrastive_text([], contract)
        example |= {'text': text, 'text_mask': text_mask}
    elif stage.task == tasks.MaskAutoencoder.kind:
        example = {}
    else:
        row = prompts.generative_row([], None, contract)
        if contract.max_patches:
            example |= row
        elif contract.image_tokens:
            example = prompts.with_images(row, np.repeat(picture[None], contract.images, 0), contract)
        else:
            example = row
    for name, source in stage.data.sources.items():
        if source.weight:
            example |= transforms.parse(source.pipeline, where=f'data.sources.{name}.pipeline').added(contract)
    example['id'] = np.zeros(2, np.int32)
    if pack := packing.packer(stage, contract):
        (example,) = pack([example] * stage.pack.examples)
    rows, sharding = batch_size // stage.pack.examples, meshes.batch_sharding(mesh)
    return {k: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=sharding) for k, x in example.items()}


def _loss(task: tasks.Task, state: Any, batch: Any, mesh: Mesh, accumulate: int) -> tuple[jax.stages.Lowered, int, int]:
    """The loss by itself, with its gradients by embeddings or states: what of a step is pairs or tokens.

    Then what `_compile` takes: 0, and the bytes of the parameters that it uses.
    """
    rng = jax.random.key(0)
    if hasattr(task, 'loss_from_embeddings'):  # of the whole batch, see `accumulation`
        inputs = jax.eval_shape(task.embed, state.params, state.stats, batch, rng)[:2]
        differentiated, function = (1, 2), task.loss_from_embeddings
    else:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) // accumulate, *x.shape[1:]), x.dtype), batch)
        inputs = jax.eval_shape(task.supervised, state.params, state.stats, batch, rng)[:3]
        differentiated, function = (1,), task.loss_from_states

    def loss(params, *inputs):
        return function(params, *inputs)[0]

    rows = meshes.batch_sharding(mesh)
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for x in inputs]
    outputs = NamedSharding(mesh, PartitionSpec()), (rows,) * len(differentiated)
    gradients = jax.jit(jax.value_and_grad(loss, argnums=differentiated), out_shardings=outputs)
    with jax.set_mesh(mesh):
        return gradients.lower(state.params, *inputs), 0, memory.per_device(inputs)


def _compile(lowered: jax.stages.Lowered, inputs: int, own: int | None = None) -> tuple[int | None, str]:
    """(bytes of one device, the program's text); of a program that is too large what the compiler says, and no text.

    Args:
      lowered: the program.
      inputs: bytes of one device that go in, which some of its errors leave out.
      own: of what goes in, the bytes that are counted; None: all.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return asked(str(error), inputs), ''
    total = memory.peak(compiled)
    if own is not None and total is not None:
        total -= compiled.memory_analysis().argument_size_in_bytes - own
    return total, compiled.as_text()


def asked(error: str, inputs: int) -> int | None:
    """Bytes that the TPU compiler's error says were needed; None if it does not say."""
    if used := re.search(r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm', error):
        return int(float(used[1]) * _UNITS[used[2]])
    if temporaries := re.search(r'HLO temporaries \(([\d.]+)([KMGT]?)\)', error):
        return int(float(temporaries[1]) * _UNITS[temporaries[2]]) + inputs
    return None
