"""Time and memory of a SigLIP's training step on the CPU, against big_vision's own model and update function."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from tools import command

EXPLAIN = """Both in one process, taking turns: the same weights, batch, optimizer (Adam, clipping, decay, cosine) and
remat, float32, one CPU device. Losses and updated parameters are compared first. Ours is the step as training takes it:
it reads uint8 pixels, skips what is not finite, and tells the same norms. Peaks are the compiler's.
Beside it: our step in micro-batches, over that of the whole batch, and big_vision's over it. Pairs in micro-batches
compute every activation twice as it is, without remat; with it, three times.
big_vision is not on PyPI: --big_vision is a checkout of github.com/google-research/big_vision; without one its side is
left out. TensorFlow is not needed.

examples:
  python -m tools.bench.train_step --big_vision=../big_vision
  python -m tools.bench.train_step --big_vision=../big_vision --image=S/16 --text=S --batch=64
  python -m tools.bench.train_step --big_vision=../big_vision --batch=128 --accumulate=32 --accumulated_remat=none
  python -m tools.bench.train_step --big_vision=../big_vision --accumulate=1 --rounds=0
  python -m tools.bench.train_step --answers --image=S/16 --text=S --size=128
"""
SCHEDULE = dict(lr=1e-3, b2=0.95, decay=1e-4, clip=1.0, warmup=2, steps=100)
REMAT = {'full': 'nothing_saveable', 'dots_with_no_batch_dims_saveable': 'dots_with_no_batch_dims_saveable'}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('bench.train_step', __doc__, EXPLAIN)
    result.add_argument('--big_vision', metavar='CHECKOUT', help='(default: only our side)')
    result.add_argument('--image', default='B/16', metavar='VARIANT', help='(default: B/16)')
    result.add_argument('--text', default='B', metavar='VARIANT', help='(default: B)')
    result.add_argument('--answers', action='store_true', help='a decoder as large as --text, of our side alone')
    result.add_argument('--batch', type=int, default=32, metavar='B', help='examples (default: 32)')
    result.add_argument('--size', type=int, default=224, metavar='PX', help='of the images (default: 224)')
    result.add_argument('--length', type=int, default=64, metavar='T', help='of the texts (default: 64)')
    result.add_argument('--vocabulary', type=int, default=32_000, metavar='V', help='(default: 32,000)')
    result.add_argument('--remat', choices=REMAT, default='full', help='of both (default: full)')
    result.add_argument('--accumulate', type=int, default=4, metavar='N', help='micro-batches (default: 4)')
    result.add_argument('--accumulated_remat', choices=('none', *REMAT), help='in micro-batches (default: as --remat)')
    result.add_argument('--rounds', type=int, default=9, metavar='N', help='0: peaks alone, nothing runs (default: 9)')
    return result


class Side:
    """A compiled step. `peak`, `temporary`: bytes; `state`: none before `begin`."""

    def __init__(self, compiled: Any, begin: Callable[[], tuple[Any, ...]]):
        from big_vlm.training import memory

        self._compiled, self._begin, self.state = compiled, begin, None
        self.peak, self.temporary = memory.peak(compiled), compiled.memory_analysis().temp_size_in_bytes

    def begin(self, params: Any = None) -> None:
        """Makes the first state, of these parameters or of its own, and the batch."""
        self.state, *self._inputs = self._begin(params)

    def run(self) -> Any:
        """Takes one step: what it tells."""
        import jax

        self.state, told = jax.block_until_ready(self._compiled(self.state, *self._inputs))
        return told


def our_stage(args: argparse.Namespace, accumulate: int = 1, remat: str = 'full') -> Any:
    """The config of our side."""
    from big_vlm import config
    from big_vlm.models import vit

    model = {'image': {'variant': args.image}, 'text': {'variant': args.text}, 'remat': remat}
    if args.answers:
        decoder = {key: vit.decode_variant(args.text)[key] for key in ('width', 'depth', 'mlp_dim', 'num_heads')}
        decoder |= {'num_kv_heads': 1, 'head_dim': decoder['width'] // decoder['num_heads']}
        model |= {'text': {}, 'decoder': decoder}
    return config.parse_stage(
        {
            'task': 'generative' if args.answers else 'contrastive',
            'total': {'steps': SCHEDULE['steps']},
            'batch_size': args.batch,
            'accumulate': accumulate,
            'contract': {'image_size': args.size, 'text_length': args.length},
            'model': model,
            'data': {'sources': {'random': {}}},
            'optimizer': {
                'lr': SCHEDULE['lr'],
                'b2': SCHEDULE['b2'],
                'weight_decay': SCHEDULE['decay'],
                'decay_by': 'schedule',
                'clip': SCHEDULE['clip'],
                'warmup': {'steps': SCHEDULE['warmup']},
            },
        }
    )


def random_batch(args: argparse.Namespace) -> dict[str, Any]:
    """Pictures and texts of random numbers; of `--answers`, a quarter of a text is prompt."""
    import numpy as np

    from big_vlm.data import loader, prompts
    from big_vlm.training import stages

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (args.batch, args.size, args.size, 3), np.uint8)
    text = rng.integers(0, args.vocabulary, (args.batch, args.length), np.int32)
    if not args.answers:
        return {'image': image, 'text': text, 'text_mask': np.ones(text.shape, bool)}
    contract, asked = stages.draft_contract(our_stage(args), args.vocabulary), args.length // 4
    rows = [prompts.generative_row(row[:asked], row[asked:], contract) for row in text]
    return {'image': image[:, None], **loader.stack(rows)}


def our_side(args: argparse.Namespace, batch: dict[str, Any], remat: str, accumulate: int = 1) -> Side:
    """Our step."""
    import jax

    from big_vlm import tasks
    from big_vlm.sharding import mesh as meshes
    from big_vlm.training import loop, optimizer, stages
    from big_vlm.training import step as steps

    stage, mesh = our_stage(args, accumulate, remat), meshes.make_mesh(devices=jax.devices()[:1])
    task = tasks.make(stage, stages.draft_contract(stage, args.vocabulary), mesh)
    tx, info = optimizer.make(stage.optimizer, SCHEDULE['steps'], steps.param_shapes(task))
    abstract = steps.abstract_state(task, tx, mesh)

    def begin(params: Any) -> tuple[Any, ...]:
        state = steps.init_state(task, tx, mesh, stage.seed)
        if params is not None:
            placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, state.params)
            state = state.replace(params=placed)
        return state, meshes.put_batch(batch, mesh)

    rows = meshes.batch_sharding(mesh)
    shapes = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for key, x in batch.items()}
    return Side(loop.make_step(stage, task, tx, info, mesh, abstract).lower(abstract, shapes).compile(), begin)


def their_side(args: argparse.Namespace, batch: dict[str, Any]) -> Side:
    """big_vision's step."""
    import jax
    import numpy as np

    from tools.bench import big_vision

    settings = dict(
        optax_name='scale_by_adam',
        optax=dict(b2=SCHEDULE['b2']),
        lr=SCHEDULE['lr'],
        wd=SCHEDULE['decay'],
        grad_clip_norm=SCHEDULE['clip'],
        schedule=dict(decay_type='cosine', warmup_steps=SCHEDULE['warmup']),
        total_steps=SCHEDULE['steps'],
    )
    theirs = big_vision.siglip(args.big_vision, args.image, args.text, args.vocabulary, REMAT[args.remat], settings)
    init = jax.jit(lambda key: theirs.begin(theirs.init(key, args.size, args.length)))
    inputs = {'image': batch['image'].astype(np.float32) / 127.5 - 1, 'labels': batch['text']}
    key = jax.random.key(0)

    def begin(params: Any) -> tuple[Any, ...]:
        return init(jax.random.key(1)), key, jax.tree.map(jax.numpy.asarray, inputs)

    return Side(theirs.update.lower(jax.eval_shape(init, key), key, inputs).compile(), begin)


def compare(ours: Side, theirs: Side) -> float:
    """Three steps of both; the distance of the parameters over how far they came. Asserts that it is small."""
    import jax
    import numpy as np

    def flat(tree):
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]

    began = flat(theirs.state['params'])
    for _ in range(3):  # the first has a rate of 0
        loss, other = float(ours.run()['loss']), float(theirs.run()['training_loss'])
        assert abs(loss - other) < 1e-4 * abs(other), f'the losses are {loss} and {other}'
    a, b = flat(ours.state.params), flat(theirs.state['params'])
    apart, came = (
        np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(*pair, strict=True))) for pair in ((a, b), (began, b))
    )
    assert apart < 0.05 * came, f'the parameters came {came:.3g} far and are {apart:.3g} apart'
    return float(apart / came)


def main(argv: list[str] | None = None) -> int:
    """Prints a table and one line of JSON. Exit code 0."""
    return command.end(run, argv)


def run(argv: list[str]) -> None:
    """The tool. Raises UserError."""
    args = parser().parse_args(argv)
    os.environ['JAX_PLATFORMS'] = 'cpu'
    import jax
    import numpy as np

    from big_vlm.config import UserError
    from tools.bench import big_vision, interleaved

    if args.answers and args.big_vision:
        raise UserError('--answers is of our side alone: leave --big_vision out')
    batch = random_batch(args)
    about = {name: getattr(args, name) for name in ('image', 'text', 'answers', 'batch', 'size', 'length', 'remat')}
    about |= {'jax': jax.__version__, 'cores': os.cpu_count()}
    if args.big_vision:
        big_vision.check(args.big_vision)
    sides, pairs = {'ours': our_side(args, batch, args.remat)}, [('ours again', 'ours')]
    if args.big_vision:
        sides['big_vision'] = their_side(args, batch)
        pairs += [('big_vision again', 'big_vision'), ('big_vision', 'ours')]
    else:
        print('skipped: big_vision (--big_vision=CHECKOUT names one)')
    if args.accumulate > 1:
        about |= {'accumulate': args.accumulate, 'accumulated remat': args.accumulated_remat or args.remat}
        sides['accumulated'] = our_side(args, batch, about['accumulated remat'], args.accumulate)
        pairs.append(('accumulated', 'ours'))
        if args.big_vision:
            pairs.append(('big_vision', 'accumulated'))
    print(f'{"MiB":16}{"at the peak":>14}{"temporary":>14}')
    for name, side in sides.items():
        print(f'{name:16}{side.peak / 2**20:14,.1f}{side.temporary / 2**20:14,.1f}', flush=True)
        about |= {f'{name} peak MiB': round(side.peak / 2**20, 1)}
        about |= {f'{name} temporary MiB': round(side.temporary / 2**20, 1)}
    if not args.rounds:
        print(json.dumps({'bench': 'train_step', **about}))
        return
    if args.big_vision:
        sides['big_vision'].begin()
        sides['ours'].begin(jax.tree.map(np.asarray, sides['big_vision'].state['params']))
        about['apart'] = round(compare(sides['ours'], sides['big_vision']), 5)
    for side in sides.values():
        if side.state is None:
            side.begin()
    runs = {name: side.run for name, side in sides.items()}
    runs |= {above: sides[below].run for above, below in pairs if above == f'{below} again'}
    interleaved.report('train_step', about, interleaved.both_clocks(runs, args.rounds), pairs, ())


if __name__ == '__main__':
    sys.exit(main())
