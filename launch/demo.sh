#!/usr/bin/env bash
# Fine-tunes MiniLM-L6 on BBC News under DeepSpeed ZeRO-2 with two ranks while its converged layers freeze. Makes its own environment.
#
#   ./launch/demo.sh                 one run with the policy of the configuration
#   ./launch/demo.sh --compare       the same without freezing, with the linear policy, and without freezing in as few steps as cost
#                                    the arithmetic of the first run
#   ./launch/demo.sh --steps 100 …   everything else goes to launch/examples/finetune.py (--help lists it)
#
# CONFIG: another DeepSpeed JSON (default: configs/zero2.json). SMARTFRZ_VENV: where the environment lies.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/_venv.sh"

compare=false help=false out=runs/demo rest=()
while [ $# -gt 0 ]; do
    case $1 in
    --compare) compare=true ;;
    --out) out=${2:?--out needs a directory} && shift ;;
    --out=*) out=${1#--out=} ;;
    -h | --help) help=true ;;
    *) rest+=("$1") ;;
    esac
    shift
done

smartfrz_venv demo
! $help || exec python "$root/launch/examples/finetune.py" --help
python "$root/smartfrz_ds/integrations/build_locks.py" # the lock of a killed build would make this start wait indefinitely
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -lt 2 ]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Third parties' notes to their own developers; warnings and errors of any other kind still show.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}

launch() { # arguments of finetune.py
    local port
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    deepspeed --num_accelerators 2 --master_port "$port" --log_level error \
        "$root/launch/examples/finetune.py" --deepspeed_config "${CONFIG:-$root/configs/zero2.json}" "${rest[@]}" "$@"
}

if ! $compare; then
    launch --out "$out"
    exit
fi
# Four runs, each in processes of its own: none inherits another's warm caches, and a finished one stays on disk whatever comes after.
for policy in none attention linear; do
    echo "== $policy"
    launch --policy "$policy" --out "$out/$policy"
done
echo "== matched"
launch --matched "$out/attention" --out "$out/matched"
echo "== all four"
python "$root/launch/examples/table.py" "$out"/none "$out"/matched "$out"/attention "$out"/linear | tee "$out/comparison.txt"
