"""Runs a config with several values of some keys, one run after another, and puts their scores in one table."""

import argparse
import contextlib
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tools import command

EXPLAIN = """what is swept:
  The config file says it, in a function beside get_config:

    def sweep(arg=''):
        return {
            'pretrain.optimizer.lr': (3e-4, 1e-3),
            ('pretrain.batch_size', 'pretrain.total.steps'): ((64, 1000), (128, 500)),
        }

  or the command line: --sweep.KEY=VALUE,VALUE, as often as you like. A key is what stands behind --config. elsewhere;
  ':seed' is an argument of get_config, as in --config=FILE:seed=1. All combinations are run; keys in a tuple change
  together, and a tuple of such dicts is one sweep after the other.

what it makes:
  WORKDIR/lr=0.001,batch_size=64,steps=1000/  the working directory of one run, as big_vlm.main leaves it, and log.txt
  WORKDIR/sweep.html, sweep.csv  one row a run: what is swept, the last loss, every score; the best are marked

All configs are checked before the first run begins; --slurm writes its file all the same, and warns. The same command
again goes on: finished runs are skipped, one that was stopped or killed goes on from its checkpoint, one that failed is
tried again. The same command in another shell, with another CUDA_VISIBLE_DEVICES, takes a share of the runs. Ctrl-C
saves first; again, it ends at once.

examples:
  python -m tools.sweep --config=configs/quickstart.py:smoke --workdir=runs/lr --sweep.pretrain.optimizer.lr=3e-4,1e-3
  python -m tools.sweep --config=configs/quickstart.py --workdir=runs/seeds --sweep.:seed=0,1,2
  python -m tools.sweep --config=my.py --workdir=/shared/runs/mine --slurm=mine.sh && sbatch mine.sh
  python -m tools.sweep --config=my.py --workdir=/shared/runs/mine --table

Exit code 0 if all is finished, 1 if a run failed, 75 if it was stopped.
The same in Python: big_vlm.config.sweep_runs, big_vlm.training.sweep.start, big_vlm.reports.sweep.table
"""
LAUNCH = pathlib.Path(__file__).parent / 'launch' / 'slurm.sh'


def parser() -> argparse.ArgumentParser:
    """The command line, but for --config.KEY=VALUE and --sweep.KEY=VALUE,VALUE."""
    result = command.parser('sweep', __doc__, EXPLAIN)
    result.add_argument('--config', required=True, metavar='FILE[:ARG]', help='as of big_vlm.main, with its overrides')
    result.add_argument(
        '--workdir',
        required=True,
        metavar='DIR',
        help='of the sweep: each run has a folder in it',
    )
    instead = result.add_mutually_exclusive_group()
    instead.add_argument('--check', action='store_true', help='validate all configs, say what would run, and end')
    instead.add_argument('--slurm', metavar='FILE', help='write a SLURM array of the runs, and end')
    instead.add_argument('--table', action='store_true', help='show the scores that are there, and end')
    return result


def run(argv: list[str]) -> int:
    """The tool. Returns the exit code, raises UserError."""
    from big_vlm import config
    from big_vlm.config import UserError
    from big_vlm.training import sweep

    rest, overrides = config.take_overrides(argv)
    rest, swept = config.take_overrides(rest, 'sweep')
    args = parser().parse_args(rest)
    workdir = pathlib.Path(args.workdir)
    runs = config.sweep_runs(args.config, overrides, swept)
    if args.check:
        sweep.check(runs, workdir)
        print(f'{len(runs)} runs, valid:', *(f'  {one.name}' for one in runs), sep='\n')
    elif args.slurm:
        try:
            pathlib.Path(args.slurm).write_text(sweep.slurm_array(runs, workdir, LAUNCH.read_text()), encoding='utf-8')
        except OSError as error:
            raise UserError(f'--slurm={args.slurm}: cannot be written ({error.strerror})') from error
        print(f'{len(runs)} runs: sbatch {args.slurm}')
        try:
            sweep.check(runs, workdir)
        except UserError as error:  # where it will run there may be more devices, and the data
            print(f'warning: on this machine it would be refused: {error}', file=sys.stderr)
    elif args.table:
        _show(runs, workdir)
    else:
        # In a process of its own, as it asks for the devices.
        wrong = subprocess.run([sys.executable, '-m', 'tools.sweep', *argv, '--check'], stdout=subprocess.DEVNULL)
        return wrong.returncode or _run_all(runs, workdir)
    return 0


def _run_all(runs: Sequence[Any], workdir: pathlib.Path) -> int:
    from big_vlm.main import CTRL_C, INTERRUPTED
    from big_vlm.training import sweep

    took, failed, elsewhere = [], [], 0
    with _signals() as signals:
        for number, one in enumerate(runs, 1):
            place = f'{number} of {len(runs)}: {one.name}'
            if sweep.is_finished(one, workdir):
                print(f'{place}: finished already', flush=True)
                continue
            print(place, flush=True)
            began, said = time.monotonic(), ['it said nothing']

            def say(line: str, said: list[str] = said) -> None:
                said[:] = [line] if line.strip() else said
                print(f'  {line}', flush=True)

            code = sweep.start(one, workdir, say, signals.pass_to)
            if code is None:
                print(f'{place}: under way elsewhere', flush=True)
                elsewhere += 1
                continue
            if signals.come or code in (INTERRUPTED, CTRL_C):
                print('stopped; the same command goes on from here', flush=True)
                return INTERRUPTED
            took.append(time.monotonic() - began)
            if code:
                failed.append(f'{one.name} (exit code {code}): {said[0]}; {workdir / one.name / sweep.LOG}')
            left = sum(took) / len(took) * (len(runs) - number)
            ended = 'FAILED' if code else 'done'
            print(f'{place}: {ended} in {took[-1] / 60:.1f} min, {left / 60:.0f} min left', flush=True)
    _show(runs, workdir)
    print(*(f'failed: {line}' for line in failed), sep='\n', end='\n' if failed else '')
    if elsewhere:
        print(f'{elsewhere} under way elsewhere: --table shows them when they are done')
    return 1 if failed else 0


def _show(runs: Sequence[Any], workdir: pathlib.Path) -> None:
    from big_vlm.config import UserError
    from big_vlm.reports import sweep

    if not workdir.is_dir():
        raise UserError(f'--workdir={workdir}: there is no such folder, so no run has begun')
    columns = sweep.table(workdir, {one.name: one.values for one in runs})
    print(sweep.text(columns))
    print(f'table: {sweep.write(workdir, [one.name for one in runs], columns)}')


class _Signals:
    """SIGTERM and Ctrl-C, handed on to the run."""

    def __init__(self) -> None:
        self.come, self._process = False, None

    def pass_to(self, process: subprocess.Popen) -> None:
        self._process = process
        if self.come:
            process.send_signal(signal.SIGTERM)

    def __call__(self, number: int, frame: object) -> None:
        self.come = True
        if self._process is not None:
            self._process.send_signal(number)


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    before = {number: signal.signal(number, signals) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if all is finished, 1 if a run failed, 2 after one line on stderr, 75 if it was stopped."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
