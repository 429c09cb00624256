"""Puts two runs side by side, as one HTML file: their curves, what their configs say differently, their scores."""

import argparse
import sys

from tools import command

EXPLAIN = """examples:
  python -m tools.compare runs/mine runs/warmer
  python -m tools.compare runs/mine runs/warmer --out=warmer.html

Both are working directories of big_vlm.main, finished or not. The page needs no network and runs no scripts.
The same in Python: big_vlm.reports.comparison.write(path, first, second)
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('compare', __doc__, EXPLAIN)
    result.add_argument('first', metavar='RUN_A', help='a working directory')
    result.add_argument('second', metavar='RUN_B', help='another one')
    result.add_argument('--out', default='compare.html', metavar='FILE', help='the page (default: compare.html)')
    return result


def run(argv: list[str]) -> None:
    """The tool. Raises UserError."""
    args = parser().parse_args(argv)
    from big_vlm.reports import comparison

    comparison.write(args.out, args.first, args.second)
    print(args.out)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr that says what to do."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
