#!/usr/bin/env bash
# Runs a training script under plain mpirun, without DeepSpeed's launcher: DeepSpeed asks MPI (package mpi4py) for ranks and address.
#
#   ./launch/mpirun.sh 16 --hostfile hosts.txt -- SCRIPT ARGUMENTS …     without a script: launch/examples/train.py
#
# What stands before `--` goes to mpirun. `pip install 'smartfrz_ds[mpi]'` brings mpi4py and Open MPI itself.
# shellcheck disable=SC1091,SC2154 # _starter.sh sets options and script
set -euo pipefail
. "$(dirname "$0")/_starter.sh"
ranks=${1:?"usage: launch/mpirun.sh RANKS [MPIRUN OPTIONS] [-- SCRIPT ARGUMENTS]"}
split_at_dashes "${@:2}"
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
# Only variables that are named here reach the other hosts.
exec mpirun -n "$ranks" -x PATH -x PYTHONPATH -x OMP_NUM_THREADS -x DS_ACCELERATOR -x MASTER_PORT "${options[@]}" python -u "${script[@]}"
