#!/usr/bin/env bash
# One run as a SLURM job. Arguments are those of `deconstruct train`; sbatch's options say where.
#
#   one process per GPU:
#     sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 \
#         launch/slurm.sh --process-per=gpu --config=configs/paper.py:size=500m --workdir=runs/500m
#   one process per node:
#     sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --time=24:00:00 \
#         launch/slurm.sh --process-per=node --config=configs/paper.py:size=500m --workdir=runs/500m
#   what it would run:
#     launch/slurm.sh --dry-run --config=configs/paper.py:size=500m --workdir=runs/500m
#
# Two minutes before the time limit the processes get TERM: they save, end with status 75, and the job is put back into
# the queue, as it is after `scancel --signal=TERM JOB`. Plain `scancel JOB` ends it for good. Any other failure is left
# to look at. Activate the environment that has `deconstruct` first; workdir and data must be on shared storage.
# As a job array over lines of arguments: --runs=FILE, which launch/sweep.py writes.
#
#SBATCH --job-name=deconstruct
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=yes
    shift
fi
if [[ ${1:-} == --runs=* ]]; then
    line=$(sed -n "${SLURM_ARRAY_TASK_ID:-1}p" "${1#--runs=}")
    eval "set -- $line" # each line is written quoted for a shell
fi
# A node whose GPUs are not all there, or an installation that only finds the CPU, is then refused at the start.
expect=${SLURM_GPUS_ON_NODE:+--expect-devices=$((SLURM_GPUS_ON_NODE * ${SLURM_JOB_NUM_NODES:-1}))}
# --wait: once one process has ended, the others have a minute.
command=(srun --wait=60 deconstruct train --distributed ${expect:+"$expect"} "$@")
if [[ $dry ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi

status=0
"${command[@]}" || status=$?
if ((status == 75)); then
    echo "slurm.sh: saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
