#!/usr/bin/env bash
# Freezing on this machine's GPUs, the first time: what to run where there are two, in less than eight minutes. Prints one table.
#
#   ./launch/gpu_check.sh [OUT]     OUT: a folder for the table and the output of each check (default: runs/gpu_check)
#
# Exit code: 0 all passed, 1 a check failed, 2 fewer than two GPUs here. SMARTFRZ_VENV: where the environment lies.
# Nothing of this has been run on a machine with GPUs yet. bitsandbytes is used where it is installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC1091 # _venv.sh is followed with -x only
. "$root/launch/_venv.sh"
out=${1:-runs/gpu_check}

too_few() { # how many
    [ "$1" -lt 2 ] || return 0
    echo "launch/gpu_check.sh: $1 GPU(s) here, two are needed: one process alone exchanges nothing" >&2
    if [ "$1" -eq 1 ]; then
        echo "with one: deepspeed --num_accelerators 1 launch/gpu_check.py zero 2 --dtype bf16 --out FILE (also: fsdp2, 8bit, profile)" >&2
    else
        echo "with none: ./launch/demo.sh and ./tests/run.sh run on two CPU processes" >&2
    fi
    exit 2
}

too_few "$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)" # before an environment is made
smartfrz_venv demo
too_few "$(python -c 'import torch; print(torch.cuda.device_count())')"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
mkdir -p "$out"
table=$out/table.md failed=0
printf '| check | outcome |\n| --- | --- |\n' >"$table"

check() { # seconds, name, command …: its output goes to OUT/NAME.txt
    local limit=$1 name=$2
    shift 2
    echo "== $name" >&2
    if ! timeout --kill-after 10 "$limit" "$@" >"$out/$name.txt" 2>&1; then
        failed=1
        printf '| %s | FAILED, see %s: %s |\n' "$name" "$out/$name.txt" \
            "$(grep -E 'Error|assert' "$out/$name.txt" | tail -n 1 | tr '|' '/' | cut -c 1-160)" >>"$table"
    fi
}

on_two() { # seconds, name, arguments of gpu_check.py
    local limit=$1 name=$2 port
    shift 2
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    check "$limit" "$name" deepspeed --num_accelerators 2 --master_port "$port" --log_level warning \
        "$root/launch/gpu_check.py" "$@" --out "$table"
}

check 150 demo "$root/launch/demo.sh" --steps 60 --out "$out/demo"
on_two 45 zero0-fp32 zero 0
on_two 45 zero1-bf16 zero 1 --dtype bf16
on_two 45 zero2-fp32 zero 2
on_two 45 zero3-bf16 zero 3 --dtype bf16
on_two 70 fsdp2-fused-compiled fsdp2
on_two 35 adamw8bit 8bit --dtype bf16
on_two 35 profile profile --dtype bf16
cat "$table"
exit "$failed"
