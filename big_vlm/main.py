"""Trains what a config describes: flags → config → mesh → the stages the config names.

    python -m big_vlm.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m big_vlm.main --config=configs/digits.py:seed=1 --workdir=runs/digits --config.pretrain.optimizer.lr=3e-4

The same command again skips finished stages and goes on where a stage stopped. Wrong input ends with one line and exit
code 2; SIGTERM or Ctrl-C saves a checkpoint first and ends with exit code 75, as does SIGTERM where nothing has to be
saved.
"""

import argparse
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from big_vlm.config import UserError, say, unknown

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # malloc.h, M_…
CTRL_C = 130  # 128 + SIGINT, as shells have it
_GONE = re.compile('Gloo|UNAVAILABLE|heartbeat|Connection (reset|closed)').search  # in the text of an error
_SILENCE = 30  # seconds without a sign of life after which a process counts as gone
_PATIENCE = 10  # seconds after which a process says that it waits for the others
INTERRUPTED = 75  # sysexits.h EX_TEMPFAIL: schedulers start the same command again
_STOPPED = 'big_vlm: stopped; the same command goes on from the newest checkpoint'


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message}; {self.prog} --help tells more')


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog='python -m big_vlm.main',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        '--config', required=True, metavar='FILE[:ARG]', help='a config file, and what its get_config(arg) is given'
    )
    parser.add_argument(
        '--config.KEY',
        dest='unused',
        metavar='VALUE',
        help='override one key, as in --config.pretrain.optimizer.lr=1e-3',
    )
    parser.add_argument(
        '--workdir',
        required=True,
        type=os.path.expanduser,
        metavar='DIR',
        help='where everything is written; made if absent',
    )
    parser.add_argument('--check', action='store_true', help='validate the config, say what would run, and end')
    parser.add_argument(
        '--distributed', action='store_true', help='several processes: join them first (jax.distributed.initialize)'
    )
    flags, others = parser.parse_known_args(argv)
    if others:
        valid = [f'--{name}' for name in ('config', 'workdir', 'check', 'distributed', 'help')]
        raise unknown('flag', others[0].partition('=')[0], [*valid, '--config.KEY'])
    return flags


def run(argv: Sequence[str]) -> None:
    """`main` without its error lines: raises UserError and Interrupted."""
    from big_vlm import config

    rest, overrides = config.take_overrides(argv)
    flags = _flags(rest)
    if not flags.workdir:
        raise UserError('--workdir is empty: name the folder where everything is written')
    if '://' in flags.workdir:
        raise UserError(f'--workdir={flags.workdir}: only folders of this machine (or mounted ones) can be written to')
    raw = config.load_config(flags.config, overrides)
    stages = config.validate(raw)

    keep_memory()
    import jax

    _compilation_cache()
    if flags.distributed:
        _join()
        if jax.process_count() == 1:  # With several, jax now hears SIGTERM, and the next step or evaluation heeds it.
            _hear_sigterm()
    _check_devices()
    from big_vlm.sharding import mesh as meshes
    from big_vlm.training import run_report, workdirs
    from big_vlm.training import stages as stages_lib

    stages_lib.check(stages)
    if flags.check:
        for name, stage in stages.items():
            workdirs.say(f'{name}: {stage.task}, batches of {stage.batch_size}: valid')
        return
    with workdirs.held(flags.workdir):
        bundles = stages_lib.run(stages, flags.workdir)
        if jax.process_index() == 0:
            report, commands = run_report.make(stages, flags.workdir, bundles, flags.config)
            for what, command in commands.items():
                say(f'{what}: {command}')
            say(f'report: {report}')
        meshes.wait('report')


def _join() -> None:
    """Waits for the other processes. In a thread of its own, for Python hears no signal while jax does.

    Raises UserError where there is no such job.
    """
    import jax

    raised: list[BaseException] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=_SILENCE)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if thread.is_alive():
        say('big_vlm: waiting for the other processes of this run', sys.stderr)
        thread.join()
    for error in raised:
        if not isinstance(error, ValueError):
            raise error
        raise UserError(
            f'--distributed: jax finds no job of several processes here ({error}): start one as the files in '
            'tools/launch/ do, or leave the flag out'
        ) from error


def _check_devices() -> None:
    """Raises UserError where jax cannot start, or starts another platform than the one that was asked for first."""
    import jax

    asked = os.environ.get('JAX_PLATFORMS', '')
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise UserError(f'jax cannot start ({" ".join(str(error).split())}): JAX_PLATFORMS=cpu does without') from error
    if asked and asked.partition(',')[0] != found and not (found == 'gpu' and asked.startswith(('cuda', 'rocm'))):
        raise UserError(
            f'JAX_PLATFORMS={asked}, but jax finds only {found} here: look at its driver, or ask for {found}'
        )


def _compilation_cache() -> None:
    """A restart compiles nothing again, unless the environment says otherwise."""
    import jax

    if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser('~/.cache/big_vlm/compiled'))


def keep_memory() -> None:
    """Lets glibc keep what XLA's CPU programs take and return at every step, on machines without an accelerator.

    By default it hands the pages back and faults them in anew. Gradients of the quickstart's decoder took 30,000 faults
    and 348 ms, so they take 2,400 and 168 ms. Must come before the threads that allocate.
    """
    accelerated = any(os.path.exists(device) for device in ('/dev/nvidiactl', '/dev/accel0', '/dev/vfio/0'))
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' and not accelerated else None
    if mallopt:
        for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(parameter, value)


def end_if_alone(error: Exception) -> None:
    """Ends the process where the others of its run are gone; at once, as all else would wait for them first."""
    import jax

    # A collective of CPUs raises ValueError.
    if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError | ValueError) and _GONE(str(error)):
        why = ' '.join(str(error).split())[:160]
        line = f'another process of this run is gone ({why}): start all again, they go on from the newest checkpoint'
        say(f'big_vlm: {line}', sys.stderr)
        os._exit(INTERRUPTED)


def _hear_sigterm() -> Any:
    """Has SIGTERM end the process at once; the training loop, which saves, hears it itself. Returns what was before."""

    def end(number: int, frame: object) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f'{_STOPPED}\n'.encode())
        os._exit(INTERRUPTED)

    return signal.signal(signal.SIGTERM, end)


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _hear_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for wrong input, 75 if stopped with everything saved, 130 on Ctrl-C elsewhere."""
    try:
        with _sigterm():
            run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        say(f'big_vlm: {error}', sys.stderr)
        return 2
    except KeyboardInterrupt:  # Outside the training loop, which saves first and ends with 75.
        say(_STOPPED, sys.stderr)
        return CTRL_C
    except OSError as error:  # a full disk, a folder of somebody else
        where = f'{error.filename}: ' if error.filename else ''
        say(f'big_vlm: {where}{error.strerror or error}; the same command goes on once that is mended', sys.stderr)
        return 2
    except Exception as error:
        from big_vlm.training.loop import Interrupted
        from big_vlm.training.signals import Stopped

        if not isinstance(error, Interrupted | Stopped):
            end_if_alone(error)
            raise
        say(f'big_vlm: {error}' if isinstance(error, Interrupted) else _STOPPED, sys.stderr)
        return INTERRUPTED
    return 0


def let_go() -> None:
    """Forgets what a full disk or a reader who has gone has not taken of standard output and error.

    At its end Python would try once more, fail, and replace the exit status by 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


if __name__ == '__main__':
    status = main()
    let_go()
    sys.exit(status)
