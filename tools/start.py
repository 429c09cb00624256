"""Run the main job or the tests with one command, on a machine that has nothing but Python.

Needs the standard library alone, because it runs before anything is installed: it makes a virtual environment,
installs big_vlm into it when the requirements changed, and hands over to the real program. The syntax stays old
enough (3.7) for an old Python to reach the message that asks for a newer one.
"""

import contextlib
import difflib
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MINIMUM = (3, 11)
ACCELERATORS = ('cpu', 'cuda', 'cuda12', 'tpu')
COMMANDS = ('job', 'tests')
OWN_FLAGS = ('accelerator', 'venv', 'python')
JOB_FLAGS = ('config', 'workdir')
JOB_SWITCHES = ('--check', '--distributed')
SPREAD = ('-n', 'auto', '--maxprocesses=4')  # the tests, over the cores; `auto` gives way to --pdb
STAMP = 'big_vlm-installed.json'
FOREIGN = ('PYTHONPATH', 'PYTHONHOME')  # with them pip and the program take packages of elsewhere for the environment's

HELP = """\
usage: python tools/start.py job   [--workdir=DIR] [--config=FILE[:arg,key=value]] [--config.KEY=VALUE ...]
       python tools/start.py tests [pytest arguments]

job     trains the models of a config from nothing, evaluates them, and prints where its report.html is.
        Without flags that is configs/quickstart.py into runs/quickstart (another config: runs/ITS_NAME), on data that
        installs with the project.
        A run that was interrupted goes on where it stopped when the same command is given again.
tests   runs the test-suite on up to 4 cores; arguments go to pytest: tests/ops, -k attention, -n 0, -m slow.

Both first make the virtual environment (once) and install the project into it (only when its requirements changed).

  --accelerator=cpu|cuda|cuda12|tpu   which jax to install and run on; default: detected for job, cpu for tests (they
                                      simulate 8 devices). cuda: NVIDIA driver 580 or newer; cuda12: an older one.
  --check                             job: validate the config and say what would run, without running it
  --distributed                       job: one of several processes that train together; each host starts this once
  --venv=DIR                          the virtual environment; default: .venv in the checkout
  --python=PATH                       the Python (3.11 or newer) it is made from; default: the one running this
  --                                  what follows goes to the program as it is
  --help                              this page

examples
  python tools/start.py job
  python tools/start.py job --workdir=/tmp/first --config=configs/quickstart.py:smoke
  python tools/start.py job --workdir=/tmp/faster --config.pretrain.optimizer.lr=3e-3
  python tools/start.py tests -k ring -x
"""


class Stop(Exception):
    """Something a person has to change; its text is the one line they see."""


class Request:
    """What the command line asks for: the command, the starter's own flags, and the arguments for the program."""

    def __init__(self, command, flags, arguments):
        self.command = command
        self.flags = flags
        self.arguments = arguments


def say(text):
    print('start: ' + text, flush=True)


def nearest(name, valid):
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean '{close[0]}'?" if close else 'valid: ' + ', '.join(valid)


def parse(argv):
    """Reads a command line (without the program's name).

    Args:
      argv: list of str.

    Returns:
      A Request, or None when help is asked for.

    Raises:
      Stop: for an unknown command or flag, or a flag without its value.
    """
    arguments = list(argv)
    literal = []
    if '--' in arguments:
        cut = arguments.index('--')
        arguments, literal = arguments[:cut], arguments[cut + 1 :]
    if '--help' in arguments or '-h' in arguments or (not arguments and not literal):
        return None

    command, flags, passed = None, {}, []
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.lstrip('-').partition('=')
        is_flag = argument.startswith('--')
        if is_flag and name in OWN_FLAGS + (JOB_FLAGS if command != 'tests' else ()):
            if not equals:
                if not arguments or arguments[0].startswith('-'):
                    raise Stop(f'--{name} needs a value: --{name}=...')
                value = arguments.pop(0)
            if not value:
                raise Stop(f'--{name} needs a value: --{name}=...')
            flags[name] = value
        elif command is None and not argument.startswith('-'):
            if argument not in COMMANDS:
                raise Stop(f"unknown command '{argument}': {nearest(argument, COMMANDS)}")
            command = argument
        elif command == 'tests':
            passed.append(argument)
        elif argument in JOB_SWITCHES:
            passed.append(argument)
        elif is_flag and name.startswith('config.'):
            if not equals and arguments and not arguments[0].startswith('--'):
                argument += '=' + arguments.pop(0)
            passed.append(argument)
        else:
            valid = ['--' + flag for flag in OWN_FLAGS + JOB_FLAGS] + list(JOB_SWITCHES)
            hint = nearest(argument.partition('=')[0], valid)
            raise Stop(f"unknown argument '{argument}': {hint} (after '--' anything goes to the program)")

    if command is None:
        raise Stop('no command: say job or tests (--help tells more)')
    accelerator = flags.get('accelerator')
    if accelerator is not None and accelerator not in ACCELERATORS:
        raise Stop(f"unknown accelerator '{accelerator}': {nearest(accelerator, ACCELERATORS)}")
    return Request(command, flags, passed + literal)


def nvidia_driver():
    """Major version of the NVIDIA driver, or None where no GPU answers."""
    if not shutil.which('nvidia-smi'):
        return None
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        found = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    major = found.stdout.decode('ascii', 'replace').strip().split('.')[0]
    return int(major) if found.returncode == 0 and major.isdigit() else None


def has_tpu(environ):
    """Whether this is a Cloud TPU machine: it says so, or Google's accelerator device is there."""
    if any(environ.get(name) for name in ('TPU_NAME', 'TPU_WORKER_ID', 'TPU_ACCELERATOR_TYPE')):
        return True
    if os.path.exists('/dev/accel0'):
        return True
    if not glob.glob('/dev/vfio/[0-9]*'):
        return False
    for path in glob.glob('/sys/bus/pci/devices/*/vendor'):
        try:
            with open(path) as file:
                if file.read().strip() == '0x1ae0':
                    return True
        except OSError:
            continue
    return False


def detect_accelerator(environ):
    """Which jax this machine wants: 'cuda', 'cuda12' (a driver older than CUDA 13 needs), 'tpu' or 'cpu'."""
    driver = nvidia_driver()
    if driver is not None:
        return 'cuda' if driver >= 580 else 'cuda12'
    return 'tpu' if has_tpu(environ) else 'cpu'


def ask_python(python, code):
    """What `python -c code` prints, or None where it cannot run or fails."""
    try:
        answer = subprocess.run([python, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return None
    return answer.stdout.decode('utf-8', 'replace').strip() if answer.returncode == 0 else None


def check_version(python, version):
    """Refuses a Python older than MINIMUM, naming a newer one if the machine has it. `version` is e.g. '3.10.13'."""
    if version is None:
        raise Stop(f'{python} does not run: give a Python 3.11 or newer with --python=PATH')
    if tuple(int(part) for part in version.split('.')[:2]) >= MINIMUM:
        return
    newer = [name for name in ('python3.13', 'python3.12', 'python3.11') if shutil.which(name)]
    working = [name for name in newer if ask_python(name, '') is not None]
    fix = 'give one with --python=' + (working[0] if working else 'PATH')
    raise Stop(f'big_vlm needs Python 3.11 or newer and {python} is {version}: {fix}')


VERSION = 'import platform; print(platform.python_version())'


@contextlib.contextmanager
def alone(venv):
    """Keeps other starts, also those of other hosts, from preparing `venv` meanwhile, where files can be locked."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl  # which Windows has not

            os.makedirs(os.path.dirname(venv), exist_ok=True)
            file = stack.enter_context(open(venv + '.lock', 'a'))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f'waiting for another start, which is preparing {venv}')
                fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def make_environment(venv, python, run, root=ROOT):
    """Makes the virtual environment unless it is there.

    Args:
      venv: absolute path of its folder.
      python: the interpreter asked for with --python, or None.
      run: callable(list of str) -> exit status.
      root: the checkout, whose .venv is ours to make again when its python does not run.

    Returns:
      (path of the environment's own python, its version such as '3.12.1')

    Raises:
      Stop: a Python too old, without ensurepip, or not the one the environment was made from; a folder not ours.
    """
    inside = os.path.join(venv, 'bin', 'python')
    version = ask_python(inside, VERSION)
    if version is not None:
        if python is not None:
            asked = ask_python(python, VERSION)
            check_version(python, asked)
            if asked.split('.')[:2] != version.split('.')[:2]:
                raise Stop(f'{venv} holds Python {version}, not {asked}: remove it or name another with --venv')
        check_version(inside, version)
        return inside, version

    if os.path.isdir(venv) and os.listdir(venv):
        if not os.path.exists(os.path.join(venv, 'pyvenv.cfg')):
            raise Stop(f'{venv} is a folder of something else: name another with --venv')
        if venv != os.path.join(root, '.venv') and not os.path.exists(os.path.join(venv, STAMP)):
            raise Stop(f'the Python of {venv} does not run: remove that environment or name another with --venv')
    base = python or sys.executable
    check_version(base, ask_python(base, VERSION))
    if ask_python(base, 'import ensurepip, venv') is None:
        raise Stop(
            f'{base} cannot make virtual environments (no ensurepip): on Debian and Ubuntu run '
            "'apt install python3-venv', or give another with --python=PATH"
        )
    say(f'making the virtual environment {venv}')
    # --clear: what an interrupted start left behind is not trusted.
    status = run([base, '-m', 'venv', '--clear', venv])
    version = ask_python(inside, VERSION)
    if status or version is None:
        raise Stop(f'could not make the virtual environment {venv} (see above)')
    return inside, version


def fingerprint(root, version):
    """A hash of everything that decides what gets installed, other than the extras."""
    digest = hashlib.sha256()
    for part in (os.path.abspath(root), version):
        digest.update(part.encode() + b'\0')
    for name in ('pyproject.toml', 'requirements.txt'):
        with open(os.path.join(root, name), 'rb') as file:
            digest.update(file.read() + b'\0')
    return digest.hexdigest()


def read_stamp(venv):
    """What was installed last: {'fingerprint': str, 'extras': list}; empty if nothing or unreadable."""
    try:
        with open(os.path.join(venv, STAMP)) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and isinstance(stamp.get('extras'), list) else {}


def install(venv, inside, version, extras, run, root=ROOT):
    """Installs the project, editable, with `extras`, unless the environment already has exactly that or more.

    The stamp is removed before pip starts and written after it succeeded: an interrupted install is done again.
    Extras of earlier calls are kept, so that `job` and `tests` can take turns in one environment.

    Returns:
      True if it installed something.

    Raises:
      Stop: pip failed, or could not be had.
    """
    stamp, wanted = read_stamp(venv), fingerprint(root, version)
    if stamp.get('fingerprint') == wanted and set(extras) <= set(stamp['extras']):
        return False
    kept = set(stamp.get('extras', ())) | set(extras)
    if 'cuda' in extras:
        kept.discard('cuda12')
    if 'cuda12' in extras:
        kept.discard('cuda')
    everything = sorted(kept)
    target = root + ('[' + ','.join(everything) + ']' if everything else '')
    path = os.path.join(venv, STAMP)
    if os.path.exists(path):
        os.remove(path)
    # Made without pip, as uv does, or cut off while it came: its list of files is written last.
    if not glob.glob(os.path.join(glob.escape(venv), 'lib', '*', 'site-packages', 'pip-*.dist-info', 'RECORD')):
        say(f'installing pip into {venv}')
        if run([inside, '-m', 'ensurepip', '--upgrade']):
            raise Stop(f'{venv} has no pip and cannot install it (see above): remove it or name another with --venv')
    say(f'installing big_vlm and what it needs into {venv} (a few minutes the first time)')
    began = time.time()
    pip = [inside, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-input']
    pip += ['--no-compile']  # a third of the time: Python compiles what it imports, when it does
    if run(pip + ['--editable', target]):
        raise Stop(f'pip could not install {target} (its message is above)')
    with open(path, 'w') as file:
        json.dump({'fingerprint': wanted, 'extras': everything}, file)
    say(f'installed in {time.time() - began:.0f} s')
    return True


def absolute(path, here):
    """A path the caller wrote, seen from where they stand."""
    if '://' in path:
        return path  # the main program refuses it by the name it was given
    return os.path.abspath(os.path.join(here, os.path.expanduser(path)))


def job_command(request, inside, here, root):
    """The argv of the main program. A config is looked for from the caller's folder first, then in the checkout."""
    workdir = request.flags.get('workdir')
    file, colon, argument = request.flags.get('config', 'configs/quickstart.py').partition(':')
    name = os.path.splitext(os.path.basename(file))[0] + ('-' + re.sub(r'[^\w.=-]+', '-', argument) if argument else '')
    workdir = absolute(workdir, here) if workdir else os.path.join(root, 'runs', name)
    for folder in (here, root):
        if os.path.exists(absolute(file, folder)):
            file = absolute(file, folder)
            break
    else:
        raise Stop(f"no config '{file}': it is neither in {here} nor in {root}")
    head = [inside, '-m', 'big_vlm.main', '--config=' + file + colon + argument, '--workdir=' + workdir]
    return head + request.arguments


def tests_command(request, inside, here):
    """The argv of pytest. Paths (also with ::test_name) are seen from the caller's folder."""
    arguments = []
    for argument in request.arguments:
        path, colons, test = argument.partition('::')
        found = not argument.startswith('-') and os.path.exists(os.path.join(here, path))
        # '-k ring' beside a folder called ring: an option's value is not a path.
        after_option = bool(arguments) and arguments[-1] in ('-k', '-m', '-n', '-p', '-o', '-c', '-r', '-W')
        arguments.append(absolute(path, here) + colons + test if found and not after_option else argument)
    return [inside, '-m', 'pytest', *SPREAD, *arguments]


def program_command(request, inside, here, root):
    """The argv that this process becomes."""
    return (
        job_command(request, inside, here, root) if request.command == 'job' else tests_command(request, inside, here)
    )


def program_environment(request, accelerator, environ):
    """The environment variables of the program.

    JAX_PLATFORMS begins with the accelerator that was chosen: where that cannot start, jax goes on with the next, in
    silence if no such device is there, and then big_vlm.main refuses the slow CPU.
    """
    environ = dict(environ)
    chosen = request.command == 'job' or 'accelerator' in request.flags
    if chosen and not environ.get('JAX_PLATFORMS'):
        platform = 'cuda' if accelerator == 'cuda12' else accelerator
        environ['JAX_PLATFORMS'] = 'cpu' if platform == 'cpu' else platform + ',cpu'
    return environ


def start(argv, run=subprocess.call, replace=os.execve, environ=None, here=None, root=ROOT):
    """Does what `argv` says. The program replaces this process: exit status and Ctrl-C are its own.

    Args:
      argv: the command line without the program's name.
      run: callable(list of str) -> exit status; for the steps before the program.
      replace: callable(path, argv, environ) that becomes the program, as os.execve does.
      environ: environment variables, which lose FOREIGN; None takes the process's.
      here: the folder relative paths are seen from; None takes the current one.
      root: the checkout.

    Returns:
      An exit status; 0 after help, 2 after a mistake on the command line or a step that failed.
    """
    try:
        environ = os.environ if environ is None else environ
        here = os.getcwd() if here is None else here
        request = parse(argv)
        if request is None:
            print(HELP, end='')
            return 0
        for name in FOREIGN:  # taken from this process, so from all that it starts
            if environ.pop(name, None):
                say(f'leaving {name} out: only the packages of the environment count')
        accelerator = request.flags.get('accelerator')
        if accelerator is None:
            accelerator = detect_accelerator(environ) if request.command == 'job' else 'cpu'
        extras = ([] if accelerator == 'cpu' else [accelerator]) + (['test'] if request.command == 'tests' else [])
        venv = absolute(request.flags['venv'], here) if 'venv' in request.flags else os.path.join(root, '.venv')
        # A mistaken config is told before minutes of installing.
        program_command(request, 'python', here, root)
        with alone(venv):
            inside, version = make_environment(venv, request.flags.get('python'), run, root)
            if not install(venv, inside, version, extras, run, root):
                say(f'using {venv} (Python {version}, nothing to install)')
        command = program_command(request, inside, here, root)
        say('running {} on {}: {}'.format(request.command, accelerator, ' '.join(command)))
        sys.stdout.flush()
        os.chdir(root)
        return replace(inside, command, program_environment(request, accelerator, environ)) or 0
    except (Stop, OSError) as error:
        print('start: ' + str(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('start: interrupted', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(start(sys.argv[1:]))
