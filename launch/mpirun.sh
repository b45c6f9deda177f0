#!/usr/bin/env bash
# Runs a training script under plain mpirun, without DeepSpeed's launcher: DeepSpeed asks MPI (package mpi4py) for ranks and address.
#
#   ./launch/mpirun.sh 16 --hostfile hosts.txt -- SCRIPT ARGUMENTS …     without a script: launch/examples/train.py
#
# What stands before `--` goes to mpirun. `pip install 'smartfrz_ds[mpi]'` brings mpi4py and Open MPI itself.
set -euo pipefail
ranks=${1:?"usage: launch/mpirun.sh RANKS [MPIRUN OPTIONS] [-- SCRIPT ARGUMENTS]"}
shift
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
[ $# -eq 0 ] || shift
if [ $# -eq 0 ]; then
    set -- launch/examples/train.py --deepspeed_config configs/zero1.json
fi
if [ "$(id -u)" = 0 ]; then
    options+=(--allow-run-as-root)
fi
# Only variables that are named here reach the other hosts.
exec mpirun -n "$ranks" -x PATH -x PYTHONPATH -x OMP_NUM_THREADS -x DS_ACCELERATOR -x MASTER_PORT ${options[@]+"${options[@]}"} python -u "$@"
