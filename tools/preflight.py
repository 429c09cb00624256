"""Tells what a config's training step takes of each device before anyone rents one, by compiling it."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tools import command

EXPLAIN = """what is told of each stage, per device:
  memory       parameters, averages, optimizer, gradients and batch: from shapes and shardings; loss: compiled by
               itself with its gradients; activations: the rest of the compiler's total. Parts that are not there at
               the same time can make the rest less than nothing.
  collectives  how many a step takes, their bytes (of what goes in or comes out, whichever is more), and how many of
               these have a matrix product scheduled between their start and their done: those cost no time.
               Compilers for CPUs hide none.
  FLOPs        of the model, per example, forward and backward; what remat computes again is not counted.

--fit compiles a few steps of different batches until one takes all memory but a thirty-second, or until the next larger
one does not fit; the loss is then told within the activations.

No data is read. A tokenizer that is not on this machine counts as tokenizer.vocab_size pieces.

examples:
  On eight TPU v5e chips, none of which is here (libtpu compiles: pip install -e '.[tpu]'):
    python -m tools.preflight --config=configs/quickstart.py --topology=v5e:2x4

  The largest batch that fits, of one stage, with other settings:
    python -m tools.preflight --config=configs/quickstart.py --topology=v5e:2x4 --stage=pretrain --fit \\
      --config.pretrain.model.loss_form=ring

  Without libtpu, on simulated devices; --hbm says what each could hold. CPU compilers keep more than a GPU's or TPU's:
    python -m tools.preflight --config=configs/quickstart.py --devices=8 --hbm=16

A step that does not fit ends with exit code 2 and a line that says what to change.
The same in Python: big_vlm.checks.preflight.measure(stage, mesh)
"""


def parser() -> argparse.ArgumentParser:
    """The command line, but for --config.KEY=VALUE, which `config.take_overrides` takes."""
    from big_vlm.checks.topologies import TOPOLOGIES

    result = command.parser('preflight', __doc__, f'{EXPLAIN}\ntopologies: {", ".join(TOPOLOGIES)}')
    result.add_argument('--config', required=True, metavar='FILE[:ARG]', help='as of big_vlm.main, with its overrides')
    where = result.add_mutually_exclusive_group()
    where.add_argument('--topology', metavar='NAME', help='a TPU that is not here, as v5e:2x4 (default: what is here)')
    where.add_argument('--devices', type=int, metavar='N', help='simulate N devices on the CPU')
    result.add_argument('--stage', metavar='NAME', help='this one only (default: all)')
    result.add_argument('--fit', action='store_true', help='find the largest batch that fits')
    result.add_argument('--hbm', type=float, metavar='GIB', help='memory of a device (default: what is known of it)')
    result.add_argument('--json', action='store_true', help='print JSON in place of tables')
    return result


def run(argv: list[str]) -> None:
    """The tool. Raises UserError."""
    from big_vlm import config
    from big_vlm.config import UserError

    rest, overrides = config.take_overrides(argv)
    args = parser().parse_args(rest)
    stages = config.validate(config.load_config(args.config, overrides))
    if args.stage is not None and args.stage not in stages:
        raise config.unknown('stage', args.stage, stages, '--stage')
    devices, memory = _devices(args.topology, args.devices)
    if args.hbm is not None:
        if not 0 < args.hbm < math.inf:
            raise UserError(f'--hbm={args.hbm}: must be a number of GiB, more than 0')
        memory = int(args.hbm * 2**30)
    if args.fit and memory is None:
        raise UserError('--fit: the memory of these devices is not known: say how much each has with --hbm=GIB')

    from big_vlm.checks import preflight
    from big_vlm.sharding import mesh as meshes
    from big_vlm.training import workdirs

    told, misfits = {}, []
    for name, stage in stages.items():
        if args.stage not in (None, name):
            continue
        where = workdirs.where(stages, name)
        with config.located(where):
            mesh = meshes.make_mesh(stage.mesh.data, stage.mesh.fsdp, stage.mesh.model, devices)
        if stage.tokenizer.path and not os.path.exists(stage.tokenizer.path):
            _say(f'{where}: no {stage.tokenizer.path} here: counting on {stage.tokenizer.vocab_size:,} pieces')

        def measured(batch_size, loss=True, name=name, stage=stage, mesh=mesh, where=where):
            with _progress(f'{name}: compiling a step of {batch_size:,} examples for {_kind(mesh)}'):
                return preflight.measure(stage, mesh, memory, batch_size, where, loss)

        def tried(batch_size, measured=measured):
            report = measured(batch_size, loss=False)
            needs = f'{report.total / 2**30:.2f} GiB' if report.total else 'more'
            limit = f'{report.limit / 2**30:.2f} GiB'
            _say(f'  {report.per_device:,} a device: {needs} of {limit}, {"fits" if report.fits else "too much"}')
            return report

        if args.fit:
            unit = stage.accumulate * meshes.data_parts(mesh) * stage.pack.examples
            report = preflight.largest(tried, min(stage.batch_size, 16 * unit), unit)
        else:
            report = measured(stage.batch_size)
        if not report.fits:
            misfits.append(f'{where}: {preflight.advice(report, stage, mesh)}')
        told[name] = _plain(report, mesh) if args.json else None
        if not args.json:
            _show(name, stage, report, mesh, fit=args.fit)
    if args.json:
        print(json.dumps(told))
    if misfits:
        raise UserError('; '.join(misfits))


def _devices(topology: str | None, simulated: int | None) -> tuple[list[Any], int | None]:
    """The devices, and the bytes of each that a program may use, where that is known."""
    if topology is not None:
        from big_vlm.checks import topologies

        return topologies.describe(topology)
    if simulated is not None:
        from tools.check_loss import simulate

        simulate(simulated)
        # Nothing runs: code that is compiled fast need not run fast, and takes the same memory.
        os.environ['XLA_FLAGS'] += ' --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
    import jax

    return jax.devices(), (jax.devices()[0].memory_stats() or {}).get('bytes_limit')


def _kind(mesh: Any) -> str:
    return f'{mesh.size} × {mesh.devices.flat[0].device_kind}'


@contextlib.contextmanager
def _progress(line: str) -> Iterator[None]:
    """Says what takes so long, and on a terminal for how long already."""
    began, ended = time.monotonic(), threading.Event()

    def tick():
        while not ended.wait(1):
            print(f'\r{line} … {time.monotonic() - began:.0f} s', end='', file=sys.stderr, flush=True)

    print(line, end='' if sys.stderr.isatty() else '\n', file=sys.stderr, flush=True)
    ticker = threading.Thread(target=tick, daemon=True)
    if sys.stderr.isatty():
        ticker.start()
    try:
        yield
    finally:
        ended.set()
        if sys.stderr.isatty():
            ticker.join()
            print('\r\033[K', end='', file=sys.stderr, flush=True)


def _show(name: str, stage: Any, report: Any, mesh: Any, fit: bool) -> None:
    """The table of one stage."""
    axes = ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
    largest = 'the largest batch that fits, ' if fit and report.fits else 'batch '
    micro = f' in {stage.accumulate} micro-batches' if stage.accumulate > 1 else ''
    print(f'{name}: {stage.task} on {_kind(mesh)} ({axes}), compiled in {report.seconds:.0f} s')
    print(f'  {largest}{report.batch_size:,}, {report.per_device:,} a device{micro}')
    print(f'  {"memory per device":32}{"MiB":>12}')
    for part, size in report.memory.items():
        print(f'    {part:30}{size / 2**20:12,.1f}')
    total = '    more' if report.total is None else f'{report.total / 2**20:12,.1f}'
    limit = '' if report.limit is None else f' of {report.limit / 2**20:,.1f}: {"fits" if report.fits else "TOO MUCH"}'
    print(f'    {"total":30}{total}{limit}')
    print(f'  {"collectives of a step":32}{"MiB":>12}{"number":>10}{"hidden":>10}{"MiB hidden":>12}')
    for kind in sorted({row.kind for row in report.collectives}):
        rows = [row for row in report.collectives if row.kind == kind]
        hidden = [row for row in rows if row.matmuls]
        sizes, numbers = zip(*((_mib(of), sum(row.times for row in of)) for of in (rows, hidden)), strict=True)
        print(f'    {kind:30}{sizes[0]:12,.1f}{numbers[0]:10,}{numbers[1]:10,}{sizes[1]:12,.1f}')
    if not report.collectives:
        print('    none' if report.fits else '    not known')
    print(f'  {"FLOPs per example":32}{report.flops_per_example:12.3g}\n', flush=True)


def _mib(collectives: list[Any]) -> float:
    return sum(row.times * row.bytes for row in collectives) / 2**20


def _plain(report: Any, mesh: Any) -> dict[str, Any]:
    """A report for JSON."""
    rows = {'collectives': [row._asdict() for row in report.collectives], 'fits': report.fits}
    return {'devices': _kind(mesh), 'mesh': dict(mesh.shape), **dataclasses.asdict(report), **rows}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if everything fits, 2 after one line on stderr that says what to do."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
