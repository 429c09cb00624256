"""What a training step takes, before it runs: against shapes by hand, real batches, and machines that are made up."""

import ast
import dataclasses
import math
import pathlib
from types import SimpleNamespace

import jax
import mask_weights
import micro_config
import pytest

from big_vlm import config
from big_vlm.checks import preflight
from big_vlm.config import UserError
from big_vlm.data import loader, packing
from big_vlm.sharding import mesh as meshes
from big_vlm.sharding import rules
from big_vlm.tasks import make
from big_vlm.training import accumulation, stages, tokenizers
from big_vlm.training import step as steps

GIB = 2**30


def stage(kind='pretrain', data_dir='', **changes):
    return config.validate(micro_config.get_config(data_dir)[kind] | dict(init_from={}) | changes)['train']


RING = micro_config.get_config()['pretrain']['model'] | dict(loss_form='ring')


@pytest.mark.parametrize(
    ('kind', 'changes'),
    [
        ('pretrain', dict(model=RING, optimizer=dict(ema_decay=0.9))),
        ('multimodal', dict(accumulate=2)),
    ],
)
@pytest.mark.slow
def test_memory_by_part(kind, changes, monkeypatch):
    """Each parameter's bytes by hand: all of them, divided by the sizes of the mesh axes in its spec."""
    monkeypatch.setattr(rules, 'FSDP_MIN_SIZE', 2**8)
    made, mesh = stage(kind, **changes), meshes.make_mesh(2, 2, 2)
    report = preflight.measure(made, mesh, limit=GIB)

    contract = stages.draft_contract(made, preflight.vocab_size(made))
    task = make(made, contract, mesh)
    shapes = steps.param_shapes(task)
    shardings = rules.param_shardings(shapes, mesh)
    parameters = sum(
        4 * leaf.size // math.prod(mesh.shape[axis] for axis in sharding.spec if axis)
        for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    )
    assert parameters < 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 2, 'most of it should be split'
    memory = report.memory
    assert memory['parameters'] == memory['gradients'] == parameters
    assert memory.get('averages', 0) == (parameters if kind == 'pretrain' else 0)
    # Adam keeps two moments, and a few counters.
    assert 0 < memory['optimizer'] - 2 * parameters <= 64
    batch = preflight.abstract_batch(made, contract, mesh, 8)
    assert memory['batch'] == sum(x.size * x.dtype.itemsize for x in batch.values()) // 4
    assert memory['loss'] > 0 and sum(memory.values()) == report.total
    assert report.fits and not dataclasses.replace(report, limit=report.total - 1).fits
    assert (report.batch_size, report.per_device) == (8, 2)
    assert report.flops_per_example == task.flops_per_example
    assert {row.kind for row in report.collectives} >= (
        {'collective-permute'} if kind == 'pretrain' else {'all-reduce'}
    )


# Kinds that add to what the micro config's stages take.
NAFLEX = dict(contract=dict(max_patches=6), evals={})
PIPELINES = {
    'naflex': 'decode | naflex(6) | text("caption")',
    'views': 'decode | views(3, size=16) | resize(32) | text("caption")',
    'grounded': 'decode | resize(32) | text("caption") | ground',
}
PACKED = dict(pack=dict(examples=2, text_length=48))


@pytest.mark.parametrize('kind', ['pretrain', 'multimodal', 'packed', *PIPELINES])
def test_the_batch_is_that_of_training(kind, tiny_digit_scenes, tmp_path):
    changes = {}
    if kind in PIPELINES:
        changes = dict(data=micro_config.data(tiny_digit_scenes, captions=PIPELINES[kind]))
        kind, changes = 'pretrain', changes | (NAFLEX if kind == 'naflex' else {})
    if kind == 'packed':
        kind, changes = 'multimodal', dict(PACKED, batch_size=16)
    made, mesh = stage(kind, tiny_digit_scenes, **changes), meshes.make_mesh()
    tokenizer = tokenizers.make(tmp_path, {'train': made})['train']
    contract = stages.make_contract(made, tokenizer)
    pack = packing.packer(made, contract)
    ds = loader.train_batches(made.data, contract, tokenizer, made.batch_size, seed=0, pack=pack)
    real = {name: array for name, array in ds[0].items() if name not in ('replaced', 'cut')}  # the iterator keeps them
    draft = stages.draft_contract(made, preflight.vocab_size(made))
    abstract = preflight.abstract_batch(made, draft, mesh, made.batch_size)
    assert {k: (x.shape, x.dtype) for k, x in abstract.items()} == {k: (x.shape, x.dtype) for k, x in real.items()}
    assert {x.sharding for x in abstract.values()} == {meshes.batch_sharding(mesh)}


CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
# What those ask for that begin with others' weights.
FROM_OTHERS = {'lit_coco': 'image=none'} | dict.fromkeys(('paligemma_3b', 'paligemma2_3b'), 'siglip=none,gemma=none')


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', sorted(file.stem for file in CONFIGS.glob('*.py') if '\ndef get_config(' in file.read_text())
)
def test_every_config_is_measured(name, tmp_path, monkeypatch):
    """At its full size, traced and lowered for eight devices, but not compiled; of stages that only grow, the first."""
    programs = []

    def compiled(program, *rest):
        programs.append(program)
        return None, ''

    monkeypatch.setattr(preflight, '_compile', compiled)
    arg = f'codes={mask_weights.save(tmp_path / "codes.npz")}' if name == 'segmentation' else FROM_OTHERS.get(name, '')
    checked = config.validate(config.load_config(f'{CONFIGS}/{name}.py:{arg}'))
    kinds = {repr((made.model, made.contract.max_patches > 0)): made for made in reversed(checked.values())}
    for made in kinds.values():
        programs.clear()
        found = preflight.measure(made, meshes.make_mesh(made.mesh.data, made.mesh.fsdp, made.mesh.model))
        assert len(programs) == 1 + (made.task != 'mask_autoencoder'), 'the step, and its loss'
        assert found.memory['parameters'] and found.memory['gradients'] and found.memory['batch']
        assert found.flops_per_example > 0 and found.batch_size == made.batch_size


def test_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match='config.pretrain: batch_size=12 does not divide over the 8 devices.*use 8 or'):
        preflight.measure(stage(batch_size=12), meshes.make_mesh(), where='config.pretrain')
    with pytest.raises(UserError, match='batch_size=8 with pack.examples=2 is one of 4 rows: batch_size=4 does not'):
        preflight.measure(stage('multimodal', **PACKED), meshes.make_mesh())


def report(batch_size, total, limit=100, **memory):
    return preflight.Report(batch_size, batch_size // 8, memory, total, limit, [], 1.0, 1.0)


@pytest.mark.parametrize(('first', 'tries'), [(8, 4), (160, 2), (800, 1), (80_000, 2)])
def test_the_largest_batch(first, tries):
    """A machine of 100 bytes, a model of 20, and an example of 1/10: 800 examples fit, and few tries find them."""
    tried = []

    def measured(batch_size):
        tried.append(batch_size)
        return report(batch_size, 20 + batch_size // 10, parameters=20)

    found = preflight.largest(measured, first, unit=8)
    assert found.fits and 800 - 800 // 32 <= found.batch_size <= 800 and len(tried) == tries
    assert all(size % 8 == 0 for size in tried)


@pytest.mark.parametrize(
    'total',
    [
        lambda n: 33 + n * 0.037,  # a constant that is no part of the weights
        lambda n: 30 + max(n - 500, 0) * 0.2,  # nothing at first
        lambda n: min(20 + n / 10, 90 + (n - 700) / 50),  # a compiler that begins to save
        lambda n: 25 + n / 10 + 7 * (n // 8 % 2),  # one that likes even numbers
    ],
)
def test_the_largest_batch_where_memory_is_no_straight_line(total):
    tried = []

    def measured(batch_size):
        tried.append(batch_size)
        return report(batch_size, total(batch_size), parameters=20)

    found = preflight.largest(measured, 128, unit=8)
    assert found.fits and len(tried) <= 8
    assert (
        found.total >= 100 * 31 / 32
        or not report(found.batch_size * 33 // 32 + 8, total(found.batch_size * 33 // 32 + 8)).fits
    )


def test_the_largest_batch_where_the_compiler_says_nothing_of_those_that_do_not_fit():
    def measured(batch_size):
        return report(batch_size, 20 + batch_size if batch_size <= 56 else None, parameters=20)

    assert preflight.largest(measured, 800, unit=8).batch_size == 56
    none = preflight.largest(lambda size: report(size, None), 64, unit=8)
    assert none.batch_size == 8 and not none.fits


MESH = SimpleNamespace(size=8, shape=dict(data=8, fsdp=1, model=1))


def advice(made, batch_size=64, gib=20, **memory):
    return preflight.advice(report(batch_size, gib * GIB, 16 * GIB, **memory), made, MESH)


def test_what_to_change_where_weights_do_not_fit():
    weights = dict(parameters=6 * GIB, gradients=6 * GIB, optimizer=12 * GIB)
    assert advice(stage(), **weights) == (
        'batch_size=64 needs 20.00 GiB of the 16.00 GiB that a device has, weights, gradients and optimizer alone '
        '24.00 GiB: mesh.fsdp=8 or more devices'
    )
    assert advice(stage(mesh=dict(data=8)), **weights).endswith(' mesh.fsdp=8 with mesh.data=-1 or more devices')


PAIRS, ANSWERS = (micro_config.get_config()[kind]['model'] for kind in ('pretrain', 'multimodal'))
SMALLER = 'a smaller batch_size (--fit finds the largest)'
SLOWER = ["model.dtype='bfloat16'", "model.remat='full'"]
DENSE = dict(model=PAIRS | dict(loss_form='dense'))
RING_TOO = [*SLOWER, "model.loss_form='ring'"]
FULL_ROWS = dict(pack=dict(examples=8, text_length=160), batch_size=64)
MASKS = dict(task='mask_autoencoder', total=dict(steps=1), data=dict(sources=dict(a=dict(pipeline='masks | mask'))))


@pytest.mark.parametrize(
    ('made', 'batch_size', 'gib', 'offered'),
    [
        (stage(**DENSE), 64, 20, [*RING_TOO, 'accumulate=2', SMALLER]),
        (stage(**DENSE), 64, 100, [*RING_TOO, 'accumulate=8', SMALLER]),  # 99 GiB of a batch in 15
        (stage(**DENSE), 96, 76, [*RING_TOO, 'accumulate=6', SMALLER]),  # 75 in 15, of 12 examples
        (stage(**DENSE), 8, 20, RING_TOO),  # one example
        (stage(model=PAIRS | dict(captioner=dict(weight=1.0))), 64, 20, [*SLOWER, SMALLER]),
        (stage(model=PAIRS | dict(distill=dict(local=1.0))), 64, 20, [*SLOWER, SMALLER]),
        (
            stage('multimodal', model=ANSWERS | dict(token_loss='dense')),
            64,
            20,
            [*SLOWER, "model.token_loss='gathered'", 'accumulate=2', SMALLER],
        ),
        (stage('multimodal', **FULL_ROWS), 64, 20, SLOWER),  # one row
        (stage('multimodal', **FULL_ROWS), 128, 20, [*SLOWER, 'accumulate=2', SMALLER]),
        (config.parse_stage(MASKS), 64, 20, [SMALLER]),
    ],
)
def test_what_to_change(made, batch_size, gib, offered):
    """Nothing is offered that the run would refuse."""
    line = advice(made, batch_size, gib, parameters=GIB)
    assert line.partition(': try ')[2].split(', ') == [*offered, 'more devices']
    settings = config.to_dict(made)
    for key, value in (change.split('=') for change in offered if change != SMALLER):
        section, _, name = key.rpartition('.')
        (settings[section] if section else settings)[name] = ast.literal_eval(value)
    accumulation.check(MESH, batch_size, config.parse_stage(settings).accumulate, made.pack.examples)


def test_what_the_tpu_compiler_says_it_needed():
    used = 'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded'
    assert preflight.asked(used, 7) == 20.5 * GIB
    temporaries = 'the total memory required for HLO temporaries (53.98G) exceeds available HBM (15.75G).'
    assert preflight.asked(temporaries, 7) == int(53.98 * GIB) + 7
    assert preflight.asked('RESOURCE_EXHAUSTED: no more', 7) is None
