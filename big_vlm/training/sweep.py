"""The runs of a sweep: one after another, each `big_vlm.main` in a process and a folder of its own; or a SLURM array.

WORKDIR/NAME/       the working directory of each run, and log.txt, what it said
"""

import fcntl
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

from big_vlm.config import SweepRun, UserError

LOG = 'log.txt'


def check(runs: Sequence[SweepRun], workdir: pathlib.Path) -> None:
    """Refuses what `big_vlm.main --check` would, of any run, and folders that another config has begun.

    It asks for the devices, which then are this process's: on an accelerator, no run may be started from it.
    """
    from big_vlm.config import located
    from big_vlm.training import remembered, stages

    for run in runs:
        with located(run.name):
            stages.check(run.stages)
            remembered.check(workdir / run.name, run.stages)


def is_finished(run: SweepRun, workdir: pathlib.Path) -> bool:
    """Whether `start` would find nothing left to do: bundles, scores and the report are there."""
    from big_vlm.training import remembered

    folder = workdir / run.name
    if not (folder / 'report.html').is_file():
        return False
    scores = remembered.scores(folder, run.stages)
    return all(
        (folder / name / 'bundle' / 'bundle.json').is_file() and stage.evals.keys() <= scores[name].keys()
        for name, stage in run.stages.items()
    )


def start(
    run: SweepRun,
    workdir: pathlib.Path,
    say: Callable[[str], object] = lambda line: None,
    started: Callable[[subprocess.Popen], object] = lambda process: None,
) -> int | None:
    """Runs it to its end, or on from where it stopped. Returns its exit code.

    None: it is under way already. Sweeps in one folder, as of several devices, so share the runs among them.

    Args:
      run: of the sweep.
      workdir: of the sweep.
      say: is given each line that the run says, which also goes to its log.
      started: is given the process, to which signals have to be passed on: it does not hear those of the terminal.
    """
    folder = workdir / run.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / LOG).open('a', encoding='utf-8')
    except OSError as error:
        raise UserError(f'--workdir={workdir}: cannot be written ({error.strerror}): name a folder that can') from error
    with log:
        try:  # The run holds it too, and goes on holding it if this process dies.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        command = [sys.executable, '-m', 'big_vlm.main', *run.flags(str(folder))]
        said = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8', errors='replace')
        with subprocess.Popen(command, **said, pass_fds=(log.fileno(),), start_new_session=True) as process:
            started(process)
            for line in process.stdout:
                print(line, end='', file=log, flush=True)
                say(line.rstrip('\n'))
        return process.returncode


def slurm_array(runs: Sequence[SweepRun], workdir: pathlib.Path, launch: str) -> str:
    """A job script that makes all runs, as an array: `launch`, the text of tools/launch/slurm.sh, once per run."""
    head, rest = launch.split('set -uo pipefail\n')
    options = [line for line in head.splitlines() if line.startswith('#SBATCH') and '--output' not in line]
    cases = '\n'.join(
        f'  {i}) set -- {shlex.join(run.flags(str(workdir / run.name)))} ;;' for i, run in enumerate(runs)
    )
    return f"""#!/usr/bin/env bash
# {len(runs)} runs of a sweep, each a job of its own. In the checkout: sbatch FILE, again for what is left unfinished.
# Options of sbatch go before FILE, as --array=0-{len(runs) - 1}%2 for two at once; those of each job stand here.
#SBATCH --array=0-{len(runs) - 1}
#SBATCH --output=slurm-%A_%a.log
{chr(10).join(options)}
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
set -uo pipefail
{rest}"""
