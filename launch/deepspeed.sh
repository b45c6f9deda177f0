#!/usr/bin/env bash
# Runs a training script by DeepSpeed's launcher, on this host or on those of a hostfile.
#
#   ./launch/deepspeed.sh 8 -- SCRIPT ARGUMENTS …                  8 ranks here; without a script: launch/examples/train.py
#   ./launch/deepspeed.sh HOSTFILE -- SCRIPT …                     on its hosts, which pdsh and ssh start from here
#   ./launch/deepspeed.sh HOSTFILE --launcher openmpi -- SCRIPT …  on its hosts, which Open MPI starts from here
#   ./launch/deepspeed.sh HOSTFILE --no_ssh --node_rank 0 -- …     this host's ranks only; call it on each host
#
# What else stands before `--` goes to deepspeed. The master is the hostfile's first host, unless --master_addr says otherwise.
# Variables that the other hosts' ranks need and that DeepSpeed doesn't take along by itself: FORWARD="NAME …", besides those below.
# shellcheck disable=SC1091,SC2154 # _starter.sh sets options and script
set -euo pipefail
. "$(dirname "$0")/_starter.sh"
where=${1:?"usage: launch/deepspeed.sh RANKS|HOSTFILE [DEEPSPEED OPTIONS] [-- SCRIPT ARGUMENTS]"}
split_at_dashes "${@:2}"
[[ $where == *[!0-9]* ]] || exec deepspeed --num_accelerators "$where" "${options[@]}" "${script[@]}"

[ -r "$where" ] || refuse "$where is neither a number of ranks nor a hostfile"
if [[ " ${options[*]} " != *" --master_addr"[=\ ]* ]]; then
    options+=(--master_addr "$(sed -n 's/#.*//; s/^[[:space:]]*//; /./{s/[[:space:]].*//p;q;}' "$where")")
fi
if [ -z "${DS_ENV_FILE:-}" ]; then # where the launcher finds what it is to take along; your ~/.deepspeed_env is kept
    file=$(mktemp)
    cat "$HOME/.deepspeed_env" .deepspeed_env >"$file" 2>/dev/null || true # either may be missing
    for name in PATH OMP_NUM_THREADS DS_ACCELERATOR TORCH_EXTENSIONS_DIR GLOO_SOCKET_IFNAME ${FORWARD:-}; do
        [ -z "${!name:-}" ] || echo "$name=${!name}" >>"$file"
    done
    exec 9<"$file" # the launcher reads the open file, and no path is left to be removed at its end
    rm "$file"
    export DS_ENV_FILE=/proc/self/fd/9
fi
exec deepspeed --hostfile "$where" "${options[@]}" "${script[@]}"
