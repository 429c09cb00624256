"""Two implementations of one model on the same input, stage by stage: where they part, and why."""

import argparse
import sys

from tools import command

EXPLAIN = """examples:
  Did a published checkpoint become the bundle that transformers would run?
    python -m tools.doctor siglip_b16 --against=siglip-base-patch16-224

  Is it still what big_vision published? Without torch, our own code on both:
    python -m tools.doctor siglip_b16 --against=siglip_b16_224.npz

  Does transformers make of my export what I trained? On a picture and a prompt of yours:
    python -m tools.doctor runs/mine/multimodal/bundle --against=my_paligemma --image=photo.png --prompt='caption en'

who is the oracle:
  transformers  Hugging Face's code, in float32, for a folder of theirs; pip install -e '.[parity]' brings it. It is
                other mathematics, other preprocessing, other readers: every difference shows. An .npz or a bundle is
                written as such a folder first if you ask for it; its preprocessing is then that of the file.
  big_vlm       our own code on the weights of PATH, for an .npz or a bundle. Weights, settings and preprocessing are
                compared, mathematics is not. What an .npz does not say is big_vision's: bilinear resize, no antialias,
                pixels in -1..1, output logits without a cap.

how to read the table: pixels and token ids as each side makes them from one picture and one text, then every state of
the models, both computed from the oracle's pixels and ids. A number is the largest difference over the oracle's largest
value (of ids: the share that differs); float32 rounds to some 1e-6, and beyond 2e-5 something is wrong. '-': the oracle
has no files to make it. Weights are compared array by array. They are in memory in float32, once for each side and once
more for transformers.

causes that are known: resampling, value range, case, padding id, end token, punctuation left out (by transformers for a
SigLIP 1; a --prompt with some shows it), newline tokenized with the prompt, image features scaled twice, softcap
applied or not, norm offset (scale or 1 + scale), transposed projection, other settings. One is named only if the
divergence vanishes when it is mended on our side.

The same in Python: big_vlm.checks.doctor.examine(BUNDLE, PATH)
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('doctor', __doc__, EXPLAIN)
    result.add_argument('bundle', metavar='BUNDLE', help='a bundle, or any checkpoint that tools.convert reads')
    result.add_argument('--against', metavar='PATH', required=True, help='a Hugging Face folder, an .npz, or another')
    result.add_argument('--oracle', default='', metavar='NAME', help='transformers or big_vlm; see below')
    result.add_argument('--image', metavar='FILE', help='default: noise')
    result.add_argument('--prompt', default='A red Apple', metavar='TEXT', help="default: 'A red Apple'")
    result.add_argument('--answer', default='on a table', metavar='TEXT', help="of a PaliGemma; default: 'on a table'")
    return result


def run(argv: list[str]) -> int:
    """The tool. Returns the exit code, raises UserError."""
    args = parser().parse_args(argv)
    from big_vlm.checks import doctor

    report = doctor.examine(
        args.bundle,
        args.against,
        oracle=args.oracle,
        image=args.image,
        prompt=args.prompt,
        answer=args.answer,
        say=lambda line: print(f'{line} …', file=sys.stderr, flush=True),
    )
    print(f'{args.bundle} against {args.against}; the oracle is {report.oracle}')
    print(f'{"stage":22} relative error')
    for stage, error in report.errors.items():
        shown = '-' if error is None else f'{error:.1e}'
        print(f'{stage:22} {shown:>14}' + ('   <- the first that diverges' if stage == report.first else ''))
    if report.weights:
        worst = max(report.weights, key=report.weights.get)
        count = f'{len(report.weights)} array{"s" if len(report.weights) > 1 else ""}'
        print(f'weights: {count} differ, the most {worst}: {report.weights[worst]:.1e}')
    for i, finding in enumerate(report.findings):
        print(f'{"then: " if i else ""}{finding.stage} diverges')
        for name, detail in finding.causes:
            print(f'  cause: {name}: {detail}')
        if not finding.causes:
            print('  cause: none of those known')
    print('all agree within' if report.agrees else 'DIFFERENT, beyond', f'{doctor.LIMIT:.0e}')
    return 0 if report.agrees else 1


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if all agree, 1 if not, 2 after one line on stderr that says what to do."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
