"""An optimizer state that waits in the host's memory: the same bits, resumed too."""

import json
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from toy import Toy, batches, stage

from big_vlm.checkpoints import trees
from big_vlm.config import UserError
from big_vlm.sharding.mesh import make_mesh
from big_vlm.training import loop, memory, offloading

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_same_bits_also_when_it_is_resumed(tmp_path, capsys):
    """On four devices; the second run is cut off after its third step and goes on from what the first one saved.

    And a run that begins to do so on the way, from its third step on.
    """
    mesh = make_mesh(2, 2, 1, jax.devices()[:4])
    optimizer = {'lr': 0.2, 'warmup': {'percent': 10.0}, 'ema_decay': 0.9, 'clip': 1.0}
    changes = {'mesh': {'data': 2, 'fsdp': 2}, 'checkpoint': {'every': 3, 'keep': 2}}

    def train(folder, steps=5, source=batches, **more):
        config = stage(steps, optimizer=optimizer | more, **changes)
        return trees.flat(loop.train(config, Toy(), source, folder, mock.Mock(), mesh=mesh))

    def short(first):
        return (batch for batch, _ in zip(batches(first), range(4), strict=False))

    whole = train(tmp_path / 'whole')
    with pytest.raises(UserError, match='ended before step'):
        train(tmp_path / 'cut', source=short, offload=True)
    resumed = train(tmp_path / 'cut', offload=True)
    assert 'more of the host' in capsys.readouterr().out
    kinds = {path: leaf.sharding.memory_kind for path, leaf in resumed.items()}
    waiting = {path for path, kind in kinds.items() if kind == 'pinned_host'}
    assert waiting == {path for path in kinds if path.startswith('opt_state/') and whole[path].ndim}
    assert len(waiting) == 4 and memory.offloaded(list(resumed.values())) == 4 * 2 * (32 + 4)
    shutil.rmtree(tmp_path / 'whole' / 'checkpoints' / '5')
    begun = train(tmp_path / 'whole', offload=True)
    assert {path: leaf.sharding.memory_kind for path, leaf in begun.items()} == kinds
    for path, leaf in whole.items():
        np.testing.assert_array_equal(resumed[path], leaf, err_msg=path)
        np.testing.assert_array_equal(begun[path], leaf, err_msg=path)


def test_devices_without_such_memory_are_refused():
    device = mock.Mock(device_kind='abacus')
    device.addressable_memories.return_value = [mock.Mock(kind='beads')]
    mesh = mock.Mock(devices=np.array([device]))
    with pytest.raises(UserError, match='abacus has the memories beads, and none of the host.*pinned_host.: leave'):
        offloading.check(mesh)


@pytest.mark.parity
def test_of_one_chip():
    """The TPU compiler takes the step, and between steps the chip holds no moments. At the peak it may hold more."""
    pytest.importorskip('libtpu')
    config = 'configs/transfers/forkme.py:data=mine.jsonl,weights=none,batch_size=8,fsdp=1,runlocal'
    command = [sys.executable, '-m', 'tools.preflight', f'--config={config}', '--topology=v5e:1x1', '--json']
    command.append('--config.optimizer.offload=True')
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)['train']
    assert told['fits'] and told['memory'].get('optimizer', 0) < 2**10 < told['memory']['parameters']
