"""Shows a batch before it is trained on: images, tokens, loss, attention mask, cut texts; refuses what cannot teach.

In a folder, as a file of this name would take the place of Python's own `inspect` in programs beside it.
"""

import argparse
import contextlib
import io
import pathlib
import sys
import tempfile

from tools import command

EXPLAIN = """examples:
  python -m tools.inspect --config=configs/quickstart.py
  python -m tools.inspect --config=configs/quickstart.py --stage=multimodal --batches=50 --out=looked_at

Writes OUT/STAGE.html and OUT/STAGE.png of each stage. Examples come as the run would read them, and the tokenizer as it
would train it; with --workdir it is that run's, which is kept.

Exit code 2, and a line that names the example, when a prompt gives its answer away, when a row has no loss, and when
more than 1 % of the answers are cut; the pages are written all the same. What counts as giving it away:
big_vlm/checks/leaks.py. The same in Python: big_vlm.checks.inspector.inspect(stage, tokenizer)
"""


def parser() -> argparse.ArgumentParser:
    """The command line, but for --config.KEY=VALUE, which `config.take_overrides` takes."""
    result = command.parser('inspect', __doc__.partition('\n')[0], EXPLAIN)
    result.add_argument('--config', required=True, metavar='FILE[:ARG]', help='as of big_vlm.main, with its overrides')
    result.add_argument('--stage', metavar='NAME', help='this one only (default: all)')
    result.add_argument('--batches', type=int, default=8, metavar='N', help='that are counted and checked (default: 8)')
    result.add_argument('--out', default='inspected', metavar='FOLDER', help='for the pages (default: inspected)')
    result.add_argument('--workdir', metavar='DIR', help="the run's, whose tokenizer is taken or made (default: none)")
    return result


def run(argv: list[str]) -> None:
    """The tool. Raises UserError."""
    from big_vlm import config
    from big_vlm.config import UserError, unknown

    rest, overrides = config.take_overrides(argv)
    args = parser().parse_args(rest)
    if args.batches < 1:
        raise UserError(f'--batches={args.batches}: must be at least 1')
    run_stages = config.validate(config.load_config(args.config, overrides))
    if args.stage and args.stage not in run_stages:
        raise unknown('stage', args.stage, run_stages, '--stage')

    from big_vlm.checks import inspector
    from big_vlm.reports import contact_sheet, inspection
    from big_vlm.training import tokenizers, workdirs

    out, problems = pathlib.Path(args.out), []
    with tempfile.TemporaryDirectory(prefix='inspect_') as scratch, contextlib.ExitStack() as quiet:
        if not args.workdir:  # nobody needs to know of a tokenizer that does not stay
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        made = tokenizers.make(pathlib.Path(args.workdir or scratch), run_stages)
    for name in [args.stage] if args.stage else run_stages:
        found = inspector.inspect(run_stages[name], made[name], workdirs.where(run_stages, name), args.batches)
        inspection.write(out / f'{name}.html', found)
        contact_sheet.write(out / f'{name}.png', found)
        print(f'{name}: {found.facts["read"]}; {out / name}.html, {out / name}.png', flush=True)
        problems += found.problems
    if problems:
        more = f' (and {len(problems) - 1} more: see {out})' if len(problems) > 1 else ''
        raise UserError(problems[0] + more)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr that says what to do."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
