"""The whole program as two processes of two devices, found through what `srun` tells them, against one of one."""

import os
import signal
import subprocess
import sys

import compiler
import micro_run as runs
import numpy as np
import pytest

from big_vlm.checkpoints import load_weights
from big_vlm.checkpoints.trees import flat
from big_vlm.main import INTERRUPTED

pytestmark = pytest.mark.slow
STAGES = ('pretrain', 'multimodal')
# The texts of the loss go around all four devices; then rows and weights are split between the processes, columns
# inside them.
RING = '--config.pretrain.model.loss_form=ring'
MESH = ('--config.multimodal.mesh.fsdp=2', '--config.multimodal.mesh.model=2')


def start(data_dir, workdir, job, tokenizer):
    """The two processes of `job`, a number from which jax chooses their port."""
    flags = [f'--config.{stage}.tokenizer.path={tokenizer}' for stage in STAGES]
    flags += [f'--config.stages={STAGES}', RING, *MESH]
    command = [sys.executable, '-m', 'big_vlm.main', f'--config={runs.CONFIG}:{data_dir}', f'--workdir={workdir}']
    environment = os.environ | {
        'XLA_FLAGS': f'--xla_force_host_platform_device_count=2 {compiler.FLAGS}',
        'PYTHONUNBUFFERED': '1',
        'SLURM_JOB_ID': str(job),
        'SLURM_NTASKS': '2',
        'SLURM_STEP_NODELIST': 'localhost',
    }
    return [
        subprocess.Popen(
            [*command, *flags, '--distributed'],
            cwd=runs.ROOT,
            env=environment | {'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def test_two_processes_do_what_one_does_though_one_of_them_was_killed(micro_run, tmp_path, tiny_digit_scenes):
    # One test, because each of its runs takes long.
    # Trained on the texts of all stages, so it is not that of two of them.
    tokenizer = micro_run / 'tokenizer.model'
    first_life = one_is_killed(tmp_path, start(tiny_digit_scenes, tmp_path, os.getpid(), tokenizer))
    said = [runs.finish(process) for process in start(tiny_digit_scenes, tmp_path, os.getpid() + 1, tokenizer)]
    # Steps behind the checkpoint were taken once more.
    assert len(first_life) >= 4
    assert first_life == runs.losses(tmp_path / 'pretrain' / 'metrics.csv')[: len(first_life)]
    same_losses_scores_and_weights(micro_run, tmp_path, said)


def one_is_killed(workdir, processes):
    """Behind the checkpoint of step 3; the other ends within a minute with one line. Returns their losses."""
    try:
        assert runs.wait_for(processes[0], workdir / 'pretrain' / 'metrics.csv', 4)
        processes[1].send_signal(signal.SIGKILL)
        said, _ = processes[0].communicate(timeout=60)
        assert processes[0].returncode == INTERRUPTED and 'Traceback' not in said, said
        assert said.splitlines()[-1].startswith('big_vlm: another process of this run is gone'), said
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    return runs.losses(workdir / 'pretrain' / 'metrics.csv')


def same_losses_scores_and_weights(one, workdir, said):
    assert 'on 4 cpu devices' in said[0] and 'report: ' in said[0] and 'report: ' not in said[1]
    assert (workdir / 'report.html').stat().st_size > 10_000 and 'pictures of the report' not in said[0]
    for stage in STAGES:
        steps, here = zip(*runs.losses(workdir / stage / 'metrics.csv'), strict=True)
        there_steps, there = zip(*runs.losses(one / stage / 'metrics.csv'), strict=True)
        assert steps == there_steps
        np.testing.assert_allclose(np.float64(here), np.float64(there), rtol=1e-4)
        assert runs.scores(workdir, stage).keys() == runs.scores(one, stage).keys()
    # 'chance' and 'n' count examples: every one is scored once, however many processes look at them.
    for name, metrics in runs.scores(one, 'pretrain').items():
        for metric, score in metrics.items():
            assert runs.scores(workdir, 'pretrain')[name][metric]['n'] == score['n']
    a, b = (flat(load_weights(folder / 'multimodal' / 'bundle')) for folder in (one, workdir))
    assert a.keys() == b.keys()
    for path in a.keys() - {path for path in a if path.endswith('key/bias')}:  # softmax does not see those: noise
        np.testing.assert_allclose(a[path], b[path], rtol=1e-3, atol=1e-4, err_msg=path)
