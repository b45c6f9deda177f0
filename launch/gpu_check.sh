#!/usr/bin/env bash
# Freezing on this machine's GPUs, the first time: what to run where there are one or two, in less than eight minutes. Prints one table.
#
#   ./launch/gpu_check.sh [--cpu] [OUT]     OUT: a folder for the table and the output of each check (default: runs/gpu_check)
#                                           --cpu: checks this script itself, on one and on two CPU ranks
#
# Exit code: 0 all passed, 1 a check failed, 2 no GPU here. SMARTFRZ_VENV: where the environment lies.
# Nothing of this has been run on a machine with GPUs yet. bitsandbytes is used where it is installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC1091 # _venv.sh is followed with -x only
. "$root/launch/_venv.sh"
cpu=false
if [ "${1:-}" = --cpu ]; then
    cpu=true
    export DS_ACCELERATOR=cpu
    shift
fi
out=${1:-runs/gpu_check} gpus=0

none() {
    echo "launch/gpu_check.sh: no GPU here; --cpu checks this script, ./launch/demo.sh and ./tests/run.sh run on two CPU processes" >&2
    exit 2
}

[ "$cpu" = true ] || nvidia-smi -L 2>/dev/null | grep -q '^GPU' || none # before an environment is made
smartfrz_venv demo
if [ "$cpu" = false ]; then
    gpus=$(python -c 'import torch; print(torch.accelerator.device_count())')
    [ "$gpus" -gt 0 ] || none
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
mkdir -p "$out"
table=$out/table.md failed=0
printf '| check | outcome |\n| --- | --- |\n' >"$table"

check() { # seconds, name, command …: its output goes to OUT/NAME.txt
    local limit=$1 name=$2
    shift 2
    echo "== $name" >&2
    # a check that ran out of time may have been building an extension: its lock would make all later ones wait
    python "$root/smartfrz_ds/integrations/build_locks.py"
    if ! timeout --kill-after 10 "$limit" "$@" >"$out/$name.txt" 2>&1; then
        failed=1
        printf '| %s | FAILED, see %s: %s |\n' "$name" "$out/$name.txt" \
            "$(grep -E 'Error|assert' "$out/$name.txt" | tail -n 1 | tr '|' '/' | cut -c 1-160)" >>"$table"
    fi
}

on() { # ranks, seconds, name, arguments of gpu_check.py
    local ranks=$1 limit=$2 name=$3-$1 port
    shift 3
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    # two ranks on one GPU: deepspeed would refuse to start more ranks than there are devices
    check "$limit" "$name" python -m torch.distributed.run --nproc-per-node "$ranks" --master-port "$port" \
        "$root/launch/gpu_check.py" "$@" --out "$table"
}

all_on() { # ranks
    on "$1" 180 zero0-fp32 zero 0 # the first start reads a cold disk, and on a CPU DeepSpeed builds its communication kernel in it
    on "$1" 45 zero1-bf16 zero 1 --dtype bf16
    on "$1" 45 zero2-fp32 zero 2
    on "$1" 45 zero2-offloaded zero 2 --offload
    on "$1" 45 zero3-bf16 zero 3 --dtype bf16
    on "$1" 70 fsdp2-fused-compiled fsdp2
    on "$1" 35 adamw8bit 8bit --dtype bf16
    on "$1" 35 pipeline pipeline
    on "$1" 35 profile profile --dtype bf16
}

if [ "$cpu" = true ]; then
    all_on 1
    all_on 2
elif [ "$gpus" -eq 1 ]; then
    all_on 1
    on 2 45 zero2-fp32-shared zero 2 # an exchange between ranks, over gloo
else
    check 150 demo "$root/launch/demo.sh" --steps 60 --out "$out/demo"
    all_on 2
fi
cat "$table"
exit "$failed"
