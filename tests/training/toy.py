"""A task small enough to train thousands of steps, with everything that could break a resume: dropout, stats, noise.

Also a program: `python toy.py WORKDIR TOTAL DELAY [ADDRESS PROCESS]` trains it on four devices, or as one of two
processes with one device each, DELAY seconds a batch, and writes the final state. With BIG_VLM_TOY_BAD=FIRST two
batches have no finite loss, from which it rolls back.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

BATCH = 16


def batches(first, delay=0.0):
    """y = x · w* + noise, from (seed, step) alone."""
    truth = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    step = first
    while True:
        rng = np.random.default_rng((1, step))
        x = rng.normal(size=(BATCH, 8)).astype(np.float32)
        y = x @ truth + 0.1 * rng.normal(size=(BATCH, 4)).astype(np.float32)
        time.sleep(delay)
        if bad() <= step < bad() + 2:
            y = y * np.nan
        yield {'x': x, 'y': y, 'id': np.full((BATCH, 2), step, np.int32)}
        step += 1


class Rows:
    """A process's rows of the batches. The last row of batch 5 is a replaced example."""

    def __init__(self, first, delay, rows):
        self._batches, self._rows, self._number = batches(first, delay), rows, first
        self.replaced, self.by_source = 0, {'examples_of_toy': 0}

    def __iter__(self):
        return self

    def __next__(self):
        self.replaced += self._number == 5 and self._rows.stop == BATCH
        self.by_source['examples_of_toy'] += self._rows.stop - self._rows.start
        self._number += 1
        return {key: value[self._rows] for key, value in next(self._batches).items()}


def bad():
    return int(os.environ.get('BIG_VLM_TOY_BAD', 2**30))


class Toy:
    flops_per_example = 3 * 2 * 8 * 4

    def init(self, rng):
        import jax
        import jax.numpy as jnp

        return {'w': jax.random.normal(rng, (8, 4)), 'bias': jnp.zeros(4)}, {'mean': jnp.zeros(4)}

    def loss(self, params, stats, batch, rng):
        import jax
        import jax.numpy as jnp

        keep = jax.random.bernoulli(rng, 0.95, batch['x'].shape)
        out = jnp.where(keep, batch['x'], 0) @ params['w'] + params['bias']
        stats = {'mean': 0.9 * stats['mean'] + 0.1 * out.mean(axis=0)}
        loss = jnp.mean((out - batch['y'] + 0.01 * stats['mean']) ** 2)
        return loss, ({'first_id': batch['id'][0, 0]}, stats)


def stage(steps=0, **changes):
    from big_vlm import config

    if bad() < 2**30:
        changes['guards'] = {'bad_steps': 2, 'rollbacks': 1}
    section = {
        'task': 'contrastive',
        'total': {'steps': steps},
        'batch_size': BATCH,
        'seed': 3,
        'data': {'sources': {'toy': {}}},
        'mesh': {'fsdp': 2},
        'optimizer': {'lr': 0.2, 'weight_decay': 0.01, 'warmup': {'percent': 10.0}, 'ema_decay': 0.9},
        'checkpoint': {'every': 7, 'keep': 2},
        'log_every': 1,
    }
    return config.parse_stage({**section, **changes})


def main():
    workdir, total, delay = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    several = len(sys.argv) > 4
    os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={1 if several else 4}'
    import jax

    from big_vlm import main as main_program
    from big_vlm.config import UserError
    from big_vlm.reports.writers import CsvWriter, MultiWriter
    from big_vlm.sharding import mesh as meshes
    from big_vlm.training import loop

    if several:
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
        jax.distributed.initialize(sys.argv[4], num_processes=2, process_id=int(sys.argv[5]))
    mesh = meshes.make_mesh(fsdp=2)
    index, count = meshes.data_shard(mesh)
    rows = slice(index * BATCH // count, (index + 1) * BATCH // count)
    writer = CsvWriter(workdir / 'metrics.csv') if jax.process_index() == 0 else MultiWriter()
    try:
        state = loop.train(stage(total), Toy(), lambda first: Rows(first, delay, rows), workdir, writer, mesh=mesh)
    except loop.Interrupted as stopped:
        print(stopped)
        sys.exit(0)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        main_program.end_if_alone(error)
        raise
    leaves = jax.tree_util.tree_leaves_with_path(state)
    np.savez(workdir / 'final.npz', **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})


if __name__ == '__main__':
    main()
