#!/usr/bin/env bash
# Runs a training script under torchrun, so that a run whose rank died goes on by itself (the script must resume from its checkpoint).
#
#   ./launch/torchrun.sh 8 -- SCRIPT ARGUMENTS …                         8 ranks on this host; without a script: launch/examples/train.py
#   ./launch/torchrun.sh 8 --nodes 2 --head node-a:29400 -- SCRIPT …     on each of 2 hosts; node-a is one of them
#
# MAX_RESTARTS: how often the ranks are started again (default: 3). RUN_ID: told apart from other runs with the same head (default: smartfrz).
# What else stands before `--` goes to torchrun.
# shellcheck disable=SC1091,SC2154 # _starter.sh sets options and script
set -euo pipefail
. "$(dirname "$0")/_starter.sh"
ranks=${1:?"usage: launch/torchrun.sh RANKS [--nodes N --head HOST:PORT] [TORCHRUN OPTIONS] [-- SCRIPT ARGUMENTS]"}
split_at_dashes "${@:2}"
nodes=1 head='' more=()
set -- "${options[@]}"
while [ $# -gt 0 ]; do
    case $1 in
    --nodes) nodes=${2:?"--nodes: how many?"} && shift ;;
    --head) head=${2:?"--head: HOST:PORT"} && shift ;;
    *) more+=("$1") ;;
    esac
    shift
done
where=(--standalone)
[ -z "$head" ] || where=(--nnodes "$nodes" --rdzv-id "${RUN_ID:-smartfrz}" --rdzv-backend c10d --rdzv-endpoint "$head")
[ -n "$head" ] || [ "$nodes" = 1 ] || refuse "--nodes $nodes needs --head HOST:PORT, the address of one of them"
# c10d (which --standalone is too), and a store of its own for each start: with the static rendezvous, or the store that torchrun shares with
# its ranks, ranks that are started again meet the addresses of the dead ones and hang (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun "${where[@]}" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" "${more[@]}" "${script[@]}"
