"""Memory of the contrastive losses on TPU chips, from the TPU compiler; no TPU is needed."""

import argparse
import json
import sys

from tools import command

EXPLAIN = """Temporary memory per chip of one loss with its gradients, beside its inputs and outputs, in MiB.
Needs jax[tpu] at the version of jax (pip install -e '.[parity]'); without it, says so and ends.

examples:
  python -m tools.bench.contrastive_memory
  python -m tools.bench.contrastive_memory --batch=1048576 --case=sigmoid-ring --chunk=512
  python -m tools.bench.contrastive_memory --batch=1048576 --case=sigmoid-ring --topology=v5e:4x4
"""

CASES = ('sigmoid-dense', 'sigmoid-ring', 'softmax-dense', 'softmax-ring')


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from big_vlm.checks.topologies import TOPOLOGIES

    result = command.parser('bench.contrastive_memory', __doc__, EXPLAIN)
    result.add_argument('--batch', type=int, action='append', metavar='B', help='pairs (default: 32768 and 131072)')
    result.add_argument('--case', choices=CASES, action='append', help='loss and form (default: all)')
    result.add_argument('--width', type=int, default=768, metavar='E', help='of the embeddings (default: 768)')
    result.add_argument('--tile', type=int, default=0, metavar='R', help='images that are visited at once (0: default)')
    result.add_argument('--chunk', type=int, default=0, metavar='C', help='texts that travel at once (0: default)')
    result.add_argument('--ways', type=int, choices=(1, 2), default=1, help='around the ring (default: 1)')
    result.add_argument('--topology', choices=TOPOLOGIES, default='v5e:2x4', metavar='NAME', help='(default: v5e:2x4)')
    return result


def main(argv: list[str] | None = None) -> int:
    """Prints a table and one line of JSON. Exit code 0."""
    args = parser().parse_args(argv)
    from tools.bench import tpu_compiler

    devices = tpu_compiler.devices(args.topology)
    if not devices:
        print("skipped: no TPU compiler here (pip install -e '.[parity]' brings it)")
        return 0
    import jax

    from big_vlm.checks import preflight

    print(f'{len(devices)} × {devices[0].device_kind}, bfloat16, width {args.width}, jax {jax.__version__}')
    print(f'{"case":16}{"batch":>10}{"temporary MiB per chip":>26}')
    options, results = dict(tile=args.tile, chunk=args.chunk, ways=args.ways), []
    for case in args.case or CASES:
        for batch in args.batch or (32768, 131072):
            try:
                compiled = tpu_compiler.compile_loss(*case.split('-'), batch, args.width, devices, **options)
                used, fits = compiled.memory_analysis().temp_size_in_bytes, True
            except jax.errors.JaxRuntimeError as error:
                used, fits = preflight.asked(str(error), 0), False
                if used is None:
                    raise
            results.append({'case': case, 'batch': batch, 'temp_mib': round(used / 2**20, 2), 'fits': fits})
            print(f'{case:16}{batch:10,}{used / 2**20:26,.1f}{"" if fits else "  does not fit"}', flush=True)
    about = {'topology': args.topology, 'width': args.width, 'dtype': 'bfloat16', **options, 'jax': jax.__version__}
    print(json.dumps({'bench': 'contrastive_memory', **about, 'results': results}))
    return 0


if __name__ == '__main__':
    sys.exit(main())
