"""Image and prompt in, first token out: time on the CPU against transformers, with the same weights."""

import argparse
import os
import sys

from tools import command

EXPLAIN = """A PaliGemma of some 50 M random float32 parameters, one 224 px image, a prompt of 16 tokens, both in one
process, taking turns; the tokens are compared first. Each side is timed against itself too: that ratio is the noise.
Needs torch and transformers (pip install -e '.[parity]'); without them, says so and ends. For another device or
shape, tools.bench.decode --case=paligemma tells the time of our first token.

example:
  python -m tools.bench.first_token --rounds=9
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('bench.first_token', __doc__, EXPLAIN)
    result.add_argument('--rounds', type=int, default=9, metavar='N', help='(default: 9)')
    result.add_argument('--prompt', type=int, default=16, metavar='N', help='tokens of the prompt (default: 16)')
    return result


def main(argv: list[str] | None = None) -> int:
    """Prints a table and one line of JSON. Exit code 0."""
    args = parser().parse_args(argv)
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # torch's idle threads would spin while XLA computes
    os.environ['JAX_PLATFORMS'] = 'cpu'
    from tools.bench import interleaved

    if not interleaved.there('torch', 'transformers'):
        return 0
    import jax
    import numpy as np

    from big_vlm.decoding.generate import make_generate
    from tools.bench import paligemma_pair

    pair = paligemma_pair.make()
    batch = paligemma_pair.batch_of(pair, [args.prompt], args.prompt)
    generate = make_generate(pair.predict, max_new_tokens=1, eos_id=-1)

    def ours():
        return jax.device_get(generate(pair.params, batch).ids)

    theirs = paligemma_pair.their_answer(pair, batch, 1)
    np.testing.assert_array_equal(ours(), theirs())
    sides = {'ours': ours, 'ours again': ours, 'transformers': theirs, 'transformers again': theirs}
    times = interleaved.both_clocks(sides, args.rounds)
    about = {'parameters': pair.parameters, 'prompt': args.prompt, 'rounds': args.rounds}
    pairs = (('ours again', 'ours'), ('transformers again', 'transformers'), ('transformers', 'ours'))
    interleaved.report('first_token', about, times, pairs, ('jax', 'torch', 'transformers'))
    return 0


if __name__ == '__main__':
    sys.exit(main())
