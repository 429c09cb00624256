"""Proves that a config's run, killed and started again, is the run that was never killed: every loss, every bit."""

import argparse
import pathlib
import sys
import tempfile
import time

from tools import command

EXPLAIN = """what it does:
  Every stage of the config is made short (--steps), and run twice: once left alone, once killed (SIGKILL) in the middle
  of each stage, when its checkpoint is on disk, and started again. The runs are the real program, in processes of their
  own. Then every loss, as written to metrics.csv, and every final parameter are compared.

  With --devices=N the killed run goes on with N simulated CPU devices, the other one has one. Sums are then taken in
  another order, so losses may differ by 1e-3 of themselves, and the parameters by 1e-2 of their norm.

what is told: a line a step, `=` where the bits are the same; the last line of a stage is of its parameters.

examples:
  The quickstart's three stages, a few minutes on a laptop:
    python -m tools.check_resume --config=configs/quickstart.py:smoke

  One stage of your own, going on with four devices:
    python -m tools.check_resume --config=my.py --config.stages="('pretrain',)" --devices=4

Exit code 0 if both are the same run, 1 if not. The same in Python: big_vlm.checks.resume.prove(stages, folder)
"""


def parser() -> argparse.ArgumentParser:
    """The command line, but for --config.KEY=VALUE, which `config.take_overrides` takes."""
    result = command.parser('check_resume', __doc__, EXPLAIN)
    result.add_argument('--config', required=True, metavar='FILE[:ARG]', help='as of big_vlm.main, with its overrides')
    result.add_argument('--steps', type=int, default=20, metavar='K', help='of every stage (default: 20)')
    result.add_argument('--devices', type=int, metavar='N', help='go on with N simulated devices (default: those here)')
    result.add_argument(
        '--workdir',
        metavar='DIR',
        help='keep both runs there (default: a folder that is removed)',
    )
    return result


def run(argv: list[str]) -> int:
    """The tool. Returns the exit code, raises UserError."""
    from big_vlm import config
    from big_vlm.config import UserError

    rest, overrides = config.take_overrides(argv)
    args = parser().parse_args(rest)
    if args.devices is not None and args.devices < 1:
        raise UserError(f'--devices={args.devices}: must be at least 1')
    stages = config.validate(config.load_config(args.config, overrides))

    from big_vlm.checks import resume

    exact, wrong = args.devices is None, []
    with tempfile.TemporaryDirectory(prefix='check_resume_') as scratch:
        folder = pathlib.Path(args.workdir) if args.workdir else pathlib.Path(scratch) / 'runs'
        began = time.monotonic()

        def say(line: str) -> None:
            print(f'{time.monotonic() - began:6.0f} s  {line}', file=sys.stderr, flush=True)

        say(f'{len(stages)} stages of {args.steps} steps, {len(stages) + 2} processes one after another')
        for proof in resume.prove(stages, folder, args.steps, args.devices, say):
            print(f'{proof.stage}: killed, went on from step {proof.resumed_at}')
            for step, a, b in proof.losses:
                print(f'{step:6}  {a:24}{b:24}{"=" if a == b else "differs"}')
            same = '=' if proof.same_weights else f'differ by {proof.distance:.1e} of their norm'
            print(f'parameters {same}', flush=True)
            wrong += [] if proof.holds(exact) else [proof.stage]
    if wrong:
        print(f'NOT THE SAME RUN: {", ".join(wrong)}')
        return 1
    print('the same run' + (', bit for bit' if exact else ', to the order of sums'))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if both are the same run, 1 if not, 2 after one line on stderr that says what to do."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
