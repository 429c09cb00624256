"""Eight simulated CPU devices and a persistent compilation cache for every test. Set before jax is imported."""

import fcntl
import getpass
import os
import pathlib
import resource
import sys
import tempfile

import pytest

sys.path.append(str(pathlib.Path(__file__).parent))  # `compiler`, `micro_config`, `micro_run`
import compiler

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', f'--xla_force_host_platform_device_count=8 {compiler.FLAGS}')
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', os.path.join(tempfile.gettempdir(), f'big_vlm_jax_cache_{getpass.getuser()}')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')


def pytest_collection_modifyitems(items: list) -> None:
    """One test that needs `micro_run` comes first, the files of others last: no worker waits while another trains."""
    users = [item for item in items if 'micro_run' in item.fixturenames]
    files = {item.path for item in users}
    items.sort(key=lambda item: item.path in files)
    if users:
        items.remove(users[0])
        items.insert(0, users[0])


@pytest.fixture(scope='session')
def tiny_digit_scenes(tmp_path_factory) -> str:
    """A data_dir in which `digit_scenes/cells_tiny` and `digit_scenes/free_tiny` (96, 32, 32 scenes) are prepared."""
    from big_vlm.data import sources

    # The first worker to come draws, under the lock of `sources.load`.
    folder = _shared(tmp_path_factory) / 'digit_scenes'
    for layout in ('cells_tiny', 'free_tiny'):
        sources.load(f'digit_scenes/{layout}', 'train', str(folder))
    return str(folder)


@pytest.fixture
def file_limit():
    """Sets how many bytes a file of this process may have, -1: any number. What is more is cut, as by a full disk."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before if size < 0 else size, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@pytest.fixture
def one_device(monkeypatch):
    """Runs of stages are on the first device: such programs take two thirds of the time to compile."""
    import jax

    from big_vlm.sharding import mesh as meshes
    from big_vlm.training import stages

    monkeypatch.setattr(stages, '_mesh', lambda stage: meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1]))


@pytest.fixture(scope='session')
def micro_run(tmp_path_factory, tiny_digit_scenes) -> pathlib.Path:
    """The workdir of an uninterrupted run of `micro_config`, not to be changed; `said.txt` holds what it printed."""
    import micro_run

    workdir = _shared(tmp_path_factory) / 'micro_run'
    with open(workdir.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / 'said.txt').is_file():
            said = micro_run.finish(micro_run.start(tiny_digit_scenes, workdir))
            (workdir / 'said.txt').write_text(said)
    return workdir


def _shared(tmp_path_factory) -> pathlib.Path:
    """A folder that all workers of one run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get('PYTEST_XDIST_WORKER') else base
