"""A bundle as StableHLO: functions, weights and tokenizer for programs that have JAX and none of big_vlm."""

import argparse
import sys

from tools import command

EXAMPLES = """examples:
  python -m tools.export runs/quickstart/pretrain/bundle --stablehlo=exported/siglip
  python -m tools.export runs/quickstart/multimodal/bundle --stablehlo=exported/paligemma --max_new_tokens=32

What is written, and how another program calls it:

  function = jax.export.deserialize(bytearray(open('exported/siglip/embed_image.stablehlo', 'rb').read()))
  weights = {}
  for file in pathlib.Path('exported/siglip/weights').glob('*.safetensors'):  # large models come in several
      weights |= safetensors.numpy.load_file(file)
  function.call(weights, {'image': image})['embedding']     # image: uint8 [batch, side, side, 3], any batch

manifest.json lists the inputs and outputs of each function: embed_image and embed_text of a dual encoder; prefill and
decode_step of a decoder, whose cache goes out of one call into the next.

Formats of other projects (safetensors for transformers, big_vision's .npz): python -m tools.convert --help
The same in Python: big_vlm.bundle.export(big_vlm.load(BUNDLE), DST)
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('export', __doc__, EXAMPLES)
    result.add_argument('bundle', metavar='BUNDLE', help='the folder of a trained model')
    result.add_argument('--stablehlo', metavar='DST', required=True, help='the folder to write; a name that is free')
    result.add_argument('--platforms', default='cpu,cuda,tpu', metavar='LIST', help='default: cpu,cuda,tpu')
    tokens = 'of a decoder: how many tokens fit after the longest prompt (default: 64)'
    result.add_argument('--max_new_tokens', type=int, metavar='N', help=tokens)
    slots = 'of a decoder: text slots of a prompt, which are all read (default: those it was trained with)'
    result.add_argument('--text_length', type=int, metavar='N', help=slots)
    return result


def run(argv: list[str]) -> None:
    """The tool. Raises UserError."""
    args = parser().parse_args(argv)
    from big_vlm import bundle
    from big_vlm.config import UserError

    model = bundle.load(args.bundle)
    for name in ('max_new_tokens', 'text_length'):
        if (value := getattr(args, name)) is not None and model.stage.task == 'contrastive':
            raise UserError(f'--{name}={value} has no effect: {args.bundle} is a dual encoder')
    bundle.export(
        model,
        args.stablehlo,
        max_new_tokens=64 if args.max_new_tokens is None else args.max_new_tokens,
        text_length=args.text_length,
        platforms=[name.strip() for name in args.platforms.split(',') if name.strip()],
        say=lambda name: print(f'{args.stablehlo}/{name}.stablehlo', flush=True),
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr that says what to do."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
