"""The starter: what it decides, shown with a fake runner. CI proves the real installation by using it."""

import ast
import errno
import fcntl
import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools' / 'start.py'


@pytest.fixture
def starter():
    spec = importlib.util.spec_from_file_location('start', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like the project to the starter."""
    root = tmp_path / 'checkout'
    (root / 'configs').mkdir(parents=True)
    (root / 'configs' / 'quickstart.py').write_text('')
    (root / 'requirements.txt').write_text('jax\n')
    (root / 'pyproject.toml').write_text('[project]\n')
    return root


def environment(path):
    """A virtual environment as far as the starter looks: a python that runs, and the last file of pip."""
    (path / 'bin').mkdir(parents=True)
    os.symlink(sys.executable, path / 'bin' / 'python')
    (path / 'pyvenv.cfg').write_text('')
    record(path).parent.mkdir(parents=True)
    record(path).write_text('')
    return path


def record(venv):
    return venv / 'lib/python3.11/site-packages/pip-1.0.dist-info/RECORD'


class Fake:
    """Stands for subprocess.call and os.execve: notes what it is asked to do."""

    def __init__(self, statuses=()):
        self.ran, self.became, self.environ = [], None, None
        self.statuses = list(statuses)

    def run(self, argv):
        self.ran.append(argv)
        return self.statuses.pop(0) if self.statuses else 0

    def replace(self, path, argv, environ):
        assert path == argv[0]
        self.became, self.environ = argv, environ


@pytest.fixture
def launch(starter, checkout, tmp_path, monkeypatch):
    """launch(*argv) -> (exit status, Fake), in a checkout whose environment exists but is empty."""
    environment(checkout / '.venv')
    monkeypatch.chdir(tmp_path)

    def call(*argv, environ=None, statuses=()):
        fake = Fake(statuses)
        here = os.getcwd()
        try:
            environ = {} if environ is None else environ
            status = starter.start(list(argv), fake.run, fake.replace, environ, here, str(checkout))
        finally:
            os.chdir(here)
        return status, fake

    return call


def test_job_installs_then_becomes_the_main_program(launch, checkout):
    status, fake = launch('job', '--accelerator=cpu')
    inside = str(checkout / '.venv/bin/python')
    assert status == 0
    [pip] = fake.ran
    assert pip[:4] == [inside, '-m', 'pip', 'install'] and pip[-2:] == ['--editable', str(checkout)]
    config, workdir = checkout / 'configs/quickstart.py', checkout / 'runs/quickstart'
    assert fake.became == [inside, '-m', 'big_vlm.main', f'--config={config}', f'--workdir={workdir}']
    assert fake.environ['JAX_PLATFORMS'] == 'cpu'


def test_overrides_reach_the_main_program_in_order(launch):
    _, fake = launch(
        'job', '--accelerator=cpu', '--config.pretrain.seed=1', '--config.pretrain.log_every', '7', '--', '-v', '1'
    )
    assert fake.became[5:] == ['--config.pretrain.seed=1', '--config.pretrain.log_every=7', '-v', '1']


def test_switches_of_the_main_program_reach_it(launch):
    _, fake = launch('job', '--accelerator=cpu', '--check', '--distributed')
    assert fake.became[5:] == ['--check', '--distributed']


def test_paths_are_seen_from_where_the_caller_stands(launch, tmp_path):
    (tmp_path / 'mine.py').write_text('')
    _, fake = launch('job', '--accelerator=cpu', '--config=mine.py:small,lr=2', '--workdir', 'out')
    assert fake.became[3:] == [f'--config={tmp_path}/mine.py:small,lr=2', f'--workdir={tmp_path}/out']


@pytest.mark.parametrize('argument, folder', [('', 'quickstart'), (':smoke,seed=1', 'quickstart-smoke-seed=1')])
def test_a_config_of_the_checkout_is_found_from_anywhere_and_has_its_own_workdir(launch, checkout, argument, folder):
    _, fake = launch('job', '--accelerator=cpu', f'--config=configs/quickstart.py{argument}')
    assert fake.became[3:] == [
        f'--config={checkout}/configs/quickstart.py{argument}',
        f'--workdir={checkout}/runs/{folder}',
    ]


def test_tests_take_pytest_arguments_as_they_are_and_use_the_cores(launch, checkout, tmp_path):
    (tmp_path / 'test_mine.py').write_text('')
    (tmp_path / 'ring').mkdir()
    status, fake = launch('tests', '-k', 'ring', '-x', 'test_mine.py::test_one', '--tb=short')
    assert status == 0
    assert fake.ran[0][-1] == f'{checkout}[test]'
    assert fake.became[1:3] == ['-m', 'pytest']
    spread = ['-n', 'auto', '--maxprocesses=4']
    assert fake.became[3:] == [*spread, '-k', 'ring', '-x', f'{tmp_path}/test_mine.py::test_one', '--tb=short']
    # conftest chooses the simulated devices; nothing is decided for it.
    assert 'JAX_PLATFORMS' not in fake.environ


def test_an_accelerator_is_installed_and_required(launch, checkout):
    _, fake = launch('job', '--accelerator=cuda12')
    assert fake.ran[0][-1] == f'{checkout}[cuda12]'
    assert fake.environ['JAX_PLATFORMS'] == 'cuda,cpu'
    _, fake = launch('job', '--accelerator=tpu', environ={'JAX_PLATFORMS': 'proxy'})
    assert fake.environ['JAX_PLATFORMS'] == 'proxy'


def test_installs_only_when_something_changed(launch, checkout):
    assert len(launch('job', '--accelerator=cpu')[1].ran) == 1
    assert launch('job', '--accelerator=cpu')[1].ran == []
    # tests need more than the job does; afterwards both have what they need
    assert launch('tests')[1].ran[0][-1] == f'{checkout}[test]'
    assert launch('job', '--accelerator=cpu')[1].ran == []
    assert launch('tests')[1].ran == []
    for name in ('requirements.txt', 'pyproject.toml'):
        (checkout / name).write_text((checkout / name).read_text() + '# more\n')
        [pip] = launch('job', '--accelerator=cpu')[1].ran
        assert pip[-1] == f'{checkout}[test]', 'what an earlier call installed is kept up to date'
        assert launch('job', '--accelerator=cpu')[1].ran == []


def test_one_cuda_at_a_time(launch, checkout):
    launch('job', '--accelerator=cuda')
    assert launch('job', '--accelerator=cuda12')[1].ran[0][-1] == f'{checkout}[cuda12]'


def test_a_failed_install_stops_and_is_tried_again(launch, capsys):
    launch('job', '--accelerator=cpu')
    status, fake = launch('tests', statuses=[1])
    assert status == 2 and fake.became is None
    assert capsys.readouterr().err.startswith('start: pip could not install')
    assert len(launch('job', '--accelerator=cpu')[1].ran) == 1, 'the stamp of a broken environment is gone'


def test_a_damaged_stamp_is_an_absent_one(launch, checkout, starter):
    launch('job', '--accelerator=cpu')
    for text in ('', '[]', '{"extras": 3}', '{"fingerprint'):
        (checkout / '.venv' / starter.STAMP).write_text(text)
        assert len(launch('job', '--accelerator=cpu')[1].ran) == 1


def test_a_pip_that_is_missing_or_was_cut_off_is_installed_first(launch, checkout, capsys):
    venv = checkout / '.venv'
    inside = str(venv / 'bin/python')
    record(venv).unlink()  # the rest may be there: `import pip` works long before `python -m pip`
    status, fake = launch('job', '--accelerator=cpu', statuses=[1])
    assert (status, fake.ran) == (2, [[inside, '-m', 'ensurepip', '--upgrade']])
    assert f'start: {venv} has no pip' in capsys.readouterr().err
    status, fake = launch('job', '--accelerator=cpu')
    assert status == 0 and [argv[2] for argv in fake.ran] == ['ensurepip', 'pip']


def test_a_start_waits_for_another_that_prepares_the_same_environment(launch, checkout, starter, monkeypatch):
    lock = open(checkout / '.venv.lock', 'a')
    fcntl.flock(lock, fcntl.LOCK_EX)
    said = []

    def say(text):
        said.append(text)
        if 'waiting' in text:  # the other one is done now
            version = starter.ask_python(sys.executable, starter.VERSION)
            stamp = {'fingerprint': starter.fingerprint(str(checkout), version), 'extras': []}
            (checkout / '.venv' / starter.STAMP).write_text(json.dumps(stamp))
            lock.close()

    monkeypatch.setattr(starter, 'say', say)
    status, fake = launch('job', '--accelerator=cpu')
    assert status == 0 and said[0] == f'waiting for another start, which is preparing {checkout}/.venv'
    assert fake.ran == [], 'it has looked before the other one was done'


def test_the_lock_is_held_while_installing(starter, checkout):
    def run(argv):
        with open(checkout / '.venv.lock') as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return 1

    environment(checkout / '.venv')
    assert starter.start(['tests'], run, None, {}, str(checkout), str(checkout)) == 2


def test_a_file_system_without_locks_will_do(launch, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', flock)
    status, fake = launch('job', '--accelerator=cpu')
    assert status == 0 and len(fake.ran) == 1


def test_packages_of_elsewhere_reach_neither_pip_nor_the_program(starter, checkout, monkeypatch, capsys):
    environment(checkout / '.venv')
    monkeypatch.setenv('PYTHONPATH', '/elsewhere/site-packages')
    monkeypatch.setenv('PYTHONHOME', '/elsewhere')
    monkeypatch.chdir(checkout)
    seen = []

    def run(argv):
        seen.append([name for name in os.environ if name in starter.FOREIGN])
        return 0

    assert starter.start(['tests'], run, lambda path, argv, environ: seen.append(environ), root=str(checkout)) == 0
    nothing, environ = seen
    assert nothing == [] and environ == dict(os.environ)
    assert 'leaving PYTHONPATH out' in capsys.readouterr().out


def test_what_the_system_refuses_is_one_line(launch, checkout, starter, capsys):
    (checkout / '.venv' / starter.STAMP).mkdir()  # os.remove fails
    status, fake = launch('job', '--accelerator=cpu')
    assert status == 2 and fake.became is None
    err = capsys.readouterr().err
    assert err.startswith('start: [Errno ') and starter.STAMP in err and err.count('\n') == 1


def test_the_fingerprint_tells_python_versions_and_checkouts_apart(starter, checkout):
    one = starter.fingerprint(str(checkout), '3.11.7')
    assert one == starter.fingerprint(str(checkout), '3.11.7')
    assert one != starter.fingerprint(str(checkout), '3.12.1')
    moved = checkout.rename(checkout.with_name('elsewhere'))
    assert one != starter.fingerprint(str(moved), '3.11.7')


def test_makes_the_environment_when_there_is_none(starter, tmp_path):
    venv = tmp_path / 'new'
    fake = Fake()

    def run(argv):
        environment(venv)
        return fake.run(argv)

    inside, version = starter.make_environment(str(venv), sys.executable, run)
    assert fake.ran == [[sys.executable, '-m', 'venv', '--clear', str(venv)]]
    assert inside == str(venv / 'bin/python')
    assert version.split('.')[:2] == [str(part) for part in sys.version_info[:2]]


def python_that(tmp_path, name, version, ensurepip=True):
    """An executable that answers the starter's two questions as a Python of that version would."""
    script = tmp_path / name
    answer = f'echo {version}' if ensurepip else f'case "$2" in *ensurepip*) exit 1;; *) echo {version};; esac'
    script.write_text(f'#!/bin/sh\n{answer}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@pytest.mark.parametrize(
    ('version', 'ensurepip', 'message'),
    [
        ('3.10.13', True, 'needs Python 3.11 or newer'),
        ('2.7.18', True, 'needs Python 3.11 or newer'),
        ('3.12.1', False, 'apt install python3-venv'),
    ],
)
def test_a_python_that_will_not_do_is_one_line(starter, tmp_path, version, ensurepip, message):
    python = python_that(tmp_path, 'odd-python', version, ensurepip)
    with pytest.raises(starter.Stop, match=message) as stop:
        starter.make_environment(str(tmp_path / 'venv'), python, Fake().run)
    assert '\n' not in str(stop.value)


def test_no_python_at_all(starter, tmp_path):
    with pytest.raises(starter.Stop, match='does not run'):
        starter.make_environment(str(tmp_path / 'venv'), str(tmp_path / 'nothing'), Fake().run)


@pytest.mark.parametrize('version', ['3.10.13', '3.98.0'])
def test_an_environment_of_another_python_is_not_mixed(starter, tmp_path, version):
    (tmp_path / 'bin').mkdir()
    python_that(tmp_path / 'bin', 'python', version)
    other = python_that(tmp_path, 'newer-python', '3.99.0')
    with pytest.raises(starter.Stop, match=rf'holds Python {version}, not 3\.99\.0: remove it'):
        starter.make_environment(str(tmp_path), other, Fake().run)


def test_only_an_environment_of_ours_is_made_again(starter, tmp_path):
    """One whose python does not run now, such as after an update of the system."""
    venv = environment(tmp_path / 'mine')
    (venv / 'bin/python').unlink()
    cleared = [sys.executable, '-m', 'venv', '--clear', str(venv)]
    fake = Fake([1, 1])
    with pytest.raises(starter.Stop, match='the Python of .*/mine does not run: remove'):
        starter.make_environment(str(venv), sys.executable, fake.run, str(tmp_path))
    assert fake.ran == []
    (venv / starter.STAMP).write_text('')
    with pytest.raises(starter.Stop, match='could not make'):
        starter.make_environment(str(venv), sys.executable, fake.run, str(tmp_path))
    assert fake.ran == [cleared]
    (venv / starter.STAMP).unlink()
    venv = venv.rename(tmp_path / '.venv')
    with pytest.raises(starter.Stop, match='could not make'):
        starter.make_environment(str(venv), sys.executable, fake.run, str(tmp_path))
    assert fake.ran[1:] == [[*cleared[:-1], str(venv)]]


def test_a_folder_of_something_else_is_left_alone(starter, tmp_path):
    (tmp_path / 'thesis.tex').write_text('years of work')
    with pytest.raises(starter.Stop, match='something else'):
        starter.make_environment(str(tmp_path), sys.executable, Fake().run)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['jobs'], "unknown command 'jobs': did you mean 'job'?"),
        (['job', '--workdirr=x'], "unknown argument '--workdirr=x': did you mean '--workdir'?"),
        (['job', '--acelerator', 'cpu'], "unknown argument '--acelerator': did you mean '--accelerator'?"),
        (['job', 'extra'], "unknown argument 'extra'"),
        (['job', '--accelerator=gpu'], "unknown accelerator 'gpu'"),
        (['job', '--workdir'], '--workdir needs a value'),
        (['job', '--venv='], '--venv needs a value'),
        (['job', '--config=configs/quikstart.py', '--accelerator=cpu'], "no config 'configs/quikstart.py'"),
        (['--venv=x'], 'no command'),
    ],
)
def test_mistakes_are_one_line_and_exit_2(launch, capsys, argv, message):
    status, fake = launch(*argv)
    out, err = capsys.readouterr()
    assert (status, fake.ran, fake.became, out) == (2, [], None, '')
    assert err.startswith('start: ' + message) and err.count('\n') == 1


@pytest.mark.parametrize(
    ('answer', 'expected'), [('580.65.06', 'cuda'), ('575.57', 'cuda12'), ('', 'cpu'), ('failed', 'cpu')]
)
def test_the_driver_decides_which_cuda(starter, tmp_path, monkeypatch, answer, expected):
    smi = tmp_path / 'nvidia-smi'
    smi.write_text(f'#!/bin/sh\necho {answer}\n')
    smi.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr(starter, 'has_tpu', lambda environ: False)
    assert starter.detect_accelerator({}) == expected


def test_a_tpu_machine_says_so(starter, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert starter.detect_accelerator({'TPU_ACCELERATOR_TYPE': 'v5litepod-4'}) == 'tpu'


def test_help_teaches_and_runs_from_anywhere(tmp_path):
    for flags in (['--help'], ['job', '--help'], []):
        shown = subprocess.run(
            [sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        for word in ('job', 'tests', '--workdir', '--accelerator', '--venv', '--python', 'report.html', 'examples'):
            assert word in shown.stdout
        assert shown.stderr == ''


def test_the_exit_status_is_the_programs_own(checkout):
    """The real os.execve: the started process becomes the program, so its status (and what Ctrl-C does) is too."""
    venv = environment(checkout / '.venv')
    stub = checkout / 'big_vlm'
    stub.mkdir()
    (stub / 'main.py').write_text('import sys; print(sys.argv[1:]); sys.exit(7)')
    (checkout / 'tools').mkdir()
    copy = checkout / 'tools' / 'start.py'
    copy.write_text(SCRIPT.read_text())
    spec = importlib.util.spec_from_file_location('start_copy', copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    version = module.ask_python(sys.executable, module.VERSION)
    stamp = {'fingerprint': module.fingerprint(str(checkout), version), 'extras': []}
    (venv / module.STAMP).write_text(json.dumps(stamp))
    done = subprocess.run(
        [sys.executable, str(copy), 'job', '--accelerator=cpu', '--config.a=1'], capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines()[-1].endswith("'--config.a=1']")


def test_needs_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text(), feature_version=(3, 7))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split('.')[0])
    assert imported and imported <= sys.stdlib_module_names
