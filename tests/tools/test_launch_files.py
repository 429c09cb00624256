"""The launch files: their syntax, and that the commands they start are ours, with flags that we take."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import yaml

from big_vlm import config, main

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / 'tools' / 'launch'
ARGUMENTS = ['--config=configs/quickstart.py:seed=1', '--workdir=/shared/runs/mine', '--config.transfer.batch_size=64']


def check_command(words, python):
    """That these start a run of several processes."""
    assert words[:3] == [python, '-m', 'big_vlm.main']
    rest, overrides = config.take_overrides(words[3:])
    flags = main._flags(rest)
    assert flags.distributed and flags.workdir.startswith('/')
    config.validate(config.load_config(str(ROOT / flags.config), overrides))


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Runs a script with stand-ins for a cluster's commands: (exit code, the words that each was called with)."""
    calls = tmp_path / 'calls'

    def run(script, *arguments, codes, **env):
        for name, code in codes.items():
            fake = tmp_path / name
            write = f'import json, sys; print(json.dumps(["{name}", *sys.argv[1:]]), file=open({str(calls)!r}, "a"))'
            fake.write_text(f'#!{sys.executable}\n{write}\nsys.exit({code})\n')
            fake.chmod(0o755)
        calls.write_text('')
        env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'HOME': str(tmp_path)} | env
        result = subprocess.run(
            ['bash', LAUNCH / script, *arguments], cwd=ROOT, env=env, capture_output=True, text=True
        )
        return result, [json.loads(line) for line in calls.read_text().splitlines()]

    return run


@pytest.mark.parametrize('script', sorted(path.name for path in LAUNCH.glob('*.sh')))
def test_bash_reads_it(script):
    subprocess.run(['bash', '-n', LAUNCH / script], check=True)


def test_slurm_starts_a_process_per_gpu_and_goes_on_after_75(shell, tmp_path):
    env = dict(SLURM_JOB_ID='12', SLURM_SUBMIT_DIR=str(tmp_path))
    for code, then in ((0, []), (75, [['scontrol', 'requeue', '12']]), (2, [])):
        result, calls = shell('slurm.sh', *ARGUMENTS, codes={'srun': code, 'scontrol': 0}, **env)
        assert result.returncode == code, result.stderr
        assert calls[1:] == then
        words = calls[0]
        check_command(words[words.index('python') :], 'python')
        assert words[-4:-1] == ARGUMENTS
    options = [line.split()[1] for line in (LAUNCH / 'slurm.sh').read_text().splitlines() if line.startswith('#SBATCH')]
    sizes = dict(option.split('=') for option in options if '=' in option)
    assert sizes['--ntasks-per-node'] == sizes['--gpus-per-node']


def test_cloud_tpu_starts_every_host(shell):
    env = dict(TPU_NAME='my-tpu', ZONE='here')
    result, (call,) = shell('cloud_tpu.sh', *ARGUMENTS, codes={'gcloud': 0}, **env)
    assert result.returncode == 0, result.stderr
    assert call[:6] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'my-tpu'] and '--worker=all' in call
    words = shlex.split(call[-1].removeprefix('--command=cd big_vlm && '))
    check_command(words, '.venv/bin/python')
    assert words[3:6] == ARGUMENTS

    result, calls = shell('cloud_tpu.sh', 'setup', codes={'gcloud': 0, 'git': 0}, **env)
    assert result.returncode == 0, result.stderr
    assert [call[0] for call in calls] == ['git', 'gcloud', 'git', 'gcloud'] and 'scp' in calls[1]

    result, calls = shell('cloud_tpu.sh', *ARGUMENTS, codes={'gcloud': 0}, TPU_NAME='my-tpu')
    assert result.returncode and 'set ZONE to its zone' in result.stderr and not calls


def test_gke_has_a_pod_per_host_and_a_name_for_each():
    service, job = yaml.safe_load_all((LAUNCH / 'gke.yaml').read_text())
    assert (service['kind'], job['kind']) == ('Service', 'Job')
    spec, pod = job['spec'], job['spec']['template']['spec']
    # Without these, GKE does not tell the pods of each other.
    assert spec['completionMode'] == 'Indexed' and pod['subdomain'] == service['metadata']['name']
    assert service['spec'] == {
        'clusterIP': 'None',
        'publishNotReadyAddresses': True,
        'selector': {'job-name': job['metadata']['name']},
    }
    (container,) = pod['containers']
    check_command(container['command'], 'python')
    sides = [int(side) for side in pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')]
    chips = container['resources']['limits']['google.com/tpu']
    assert spec['parallelism'] == spec['completions'] == sides[0] * sides[1] // chips
    fail, stopped, preempted = spec['podFailurePolicy']['rules']
    assert pod['restartPolicy'] == 'Never', 'or the policy is refused'
    for rule, action, code in ((fail, 'FailJob', 2), (stopped, 'Ignore', main.INTERRUPTED)):
        exits = {'containerName': container['name'], 'operator': 'In', 'values': [code]}
        assert rule == {'action': action, 'onExitCodes': exits}
    assert preempted == {'action': 'Ignore', 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]}
    assert pod['volumes'][0]['name'] == container['volumeMounts'][0]['name']
    assert container['command'][4].startswith(f'--workdir={container["volumeMounts"][0]["mountPath"]}/')
