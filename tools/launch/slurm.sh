#!/usr/bin/env bash
# Trains on several nodes of a SLURM cluster, one process per GPU; jax finds the others from what srun tells each.
#
#   sbatch tools/launch/slurm.sh --config=configs/quickstart.py --workdir=/shared/runs/mine
#
# Submit it in the checkout, on a file system that all nodes see, as the working directory must be. Set the lines below
# to your cluster; as many tasks as GPUs on a node. Options of sbatch itself go before the script: sbatch --nodes=4 …
#SBATCH --job-name=big_vlm
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Five minutes before its time is up, every process is told to save and stop.
#SBATCH --signal=TERM@300
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ ! -f .venv/bin/activate ]] || source .venv/bin/activate

# Every process sees all GPUs of its node, and jax gives it the one of its number there.
srun --gpu-bind=none --kill-on-bad-exit=1 python -m big_vlm.main "$@" --distributed
status=$?
# 75: stopped with everything saved. The same job goes on from there.
if [[ $status -eq 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
