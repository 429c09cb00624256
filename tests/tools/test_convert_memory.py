"""What `tools.convert` takes of memory at its peak, against the bounds it promises, on a model of 450 MB."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from big_vlm import config
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import hugging_face
from big_vlm.interop.lazy import LazyWeights
from big_vlm.interop.pretrained import Pretrained

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'goldens' / 'paligemma'
# A small conversion first, which loads the libraries; then the highest resident set beyond what was there.
CODE = """
import re, sys
from tools import convert
def status(key):
    return int(re.search(rf'{key}:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
warm, *arguments = sys.argv[1:]
steps = [['{golden}', f'{warm}/b'], *([f'{warm}/b', f'{warm}/{x}'] for x in ('f', 'x.npz', 'x.gguf'))]
steps.append([f'{warm}/x.gguf', f'{warm}/d', '--to=bundle'])
for step in steps:
    assert convert.main(step) == 0
open('/proc/self/clear_refs', 'w').write('5')
before = status('VmRSS')
assert convert.main(arguments) == 0
print(status('VmHWM') - before)
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """The model as folder `hf`, its bytes, and those of its largest array."""
    folder = tmp_path_factory.mktemp('memory')
    tokenizer = Tokenizer.load(GOLDEN / 'tokenizer.model')
    decoder = config.Decoder('gemma_2b', 1024, depth=4, mlp_dim=8192, num_heads=8, num_kv_heads=1, head_dim=128)
    sections = config.Model(image=config.ImageTower('mu/14', pool='none'), decoder=decoder)
    settings = config.Contract(image_size=28, text_length=8, lower=False)
    model = Pretrained('paligemma', sections, settings, tokenizer.vocab_size, None)
    shapes, rng = model.expected(), np.random.default_rng(0)
    lazy = LazyWeights(shapes, lambda name: rng.standard_normal(shapes[name].shape, np.float32), 'synthetic')
    hugging_face.write(folder / 'hf', dataclasses.replace(model, weights=lazy), model.contract(tokenizer), tokenizer)
    return folder, lazy.nbytes, max(4 * leaf.size for leaf in shapes.values())


def peak(folder, *arguments):
    (warm := folder / f'warm{len(list(folder.iterdir()))}').mkdir()
    code = CODE.replace('{golden}', str(GOLDEN))
    command = [sys.executable, '-c', code, str(warm), *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1])


def test_peaks_are_bounded(made):
    """A folder's only shard is as large as the model."""
    folder, model, largest = made
    assert largest > 0.5 * model
    runs = {
        ('hf', 'bundle'): 1.1 * model,
        ('hf', 'x.npz'): 1.3 * largest,
        ('bundle', 'y.npz'): 1.3 * largest,
        ('bundle', 'folder'): 1.3 * largest + model,
        ('bundle', 'x.gguf'): 1.4 * largest,
        ('x.gguf', 'decoder', '--to=bundle'): 1.1 * model,
    }
    found = {}
    for (source, destination, *flags), bound in runs.items():
        found[source, destination] = peak(folder, folder / source, folder / destination, *flags) / bound
    assert all(share <= 1 for share in found.values()), found
    print({key: round(share, 2) for key, share in found.items()})
