#!/usr/bin/env bash
# Runs a training script under torchrun, so that a run whose rank died goes on by itself (the script must resume from its checkpoint).
#
#   ./launch/torchrun.sh 8 -- SCRIPT ARGUMENTS …                         8 ranks on this host; without a script: launch/examples/train.py
#   ./launch/torchrun.sh 8 --nodes 2 --head node-a:29400 -- SCRIPT …     on each of 2 hosts; node-a is one of them
#
# MAX_RESTARTS: how often the ranks are started again (default: 3). RUN_ID: told apart from other runs with the same head (default: smartfrz).
# What else stands before `--` goes to torchrun.
set -euo pipefail
ranks=${1:?"usage: launch/torchrun.sh RANKS [--nodes N --head HOST:PORT] [TORCHRUN OPTIONS] [-- SCRIPT ARGUMENTS]"}
shift
nodes=1 head='' options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
    --nodes) nodes=${2:?"--nodes: how many?"} && shift ;;
    --head) head=${2:?"--head: HOST:PORT"} && shift ;;
    *) options+=("$1") ;;
    esac
    shift
done
[ $# -eq 0 ] || shift
if [ $# -eq 0 ]; then
    set -- launch/examples/train.py --deepspeed_config configs/zero1.json
fi
if [ -n "$head" ]; then
    where=(--nnodes "$nodes" --rdzv-id "${RUN_ID:-smartfrz}" --rdzv-backend c10d --rdzv-endpoint "$head")
elif [ "$nodes" = 1 ]; then
    where=(--standalone)
else
    echo "launch/torchrun.sh: --nodes $nodes needs --head HOST:PORT, the address of one of them" >&2
    exit 2
fi
# c10d (which --standalone is too), and a store of its own for each start: with the static rendezvous, or the store that torchrun shares with
# its ranks, ranks that are started again meet the addresses of the dead ones and hang (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun "${where[@]}" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" ${options[@]+"${options[@]}"} "$@"
