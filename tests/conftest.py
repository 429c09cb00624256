"""Eight simulated CPU devices and a persistent compilation cache for every test. Set before jax is imported."""

import getpass
import os
import tempfile

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', os.path.join(tempfile.gettempdir(), f'big_vlm_jax_cache_{getpass.getuser()}')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')


@pytest.fixture(scope='session')
def tiny_digit_scenes(tmp_path_factory) -> str:
    """A data_dir in which `digit_scenes/cells_tiny` and `digit_scenes/free_tiny` (96, 32, 32 scenes) are prepared."""
    from big_vlm.data import sources

    # Shared by the workers of one run: the first to come draws, under the lock of `sources.load`.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get('PYTEST_XDIST_WORKER') else base) / 'digit_scenes'
    for layout in ('cells_tiny', 'free_tiny'):
        sources.load(f'digit_scenes/{layout}', 'train', str(folder))
    return str(folder)
