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
set -euo pipefail
where=${1:?"usage: launch/deepspeed.sh RANKS|HOSTFILE [DEEPSPEED OPTIONS] [-- SCRIPT ARGUMENTS]"}
shift
options=() addressed='' made=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in --master_addr | --master_addr=*) addressed=1 ;; esac
    options+=("$1")
    shift
done
[ $# -eq 0 ] || shift
if [ $# -eq 0 ]; then
    set -- launch/examples/train.py --deepspeed_config configs/zero1.json
fi
case $where in
*[!0-9]*)
    [ -r "$where" ] || {
        echo "launch/deepspeed.sh: $where is neither a number of ranks nor a hostfile" >&2
        exit 2
    }
    first=$(sed -n 's/#.*//; s/^[[:space:]]*//; /./{s/[[:space:]].*//p;q;}' "$where")
    options=(--hostfile "$where" ${options[@]+"${options[@]}"})
    [ -n "$addressed" ] || options=(--master_addr "$first" "${options[@]}")
    if [ -z "${DS_ENV_FILE:-}" ]; then # where the launcher finds what it is to take along; your ~/.deepspeed_env is kept
        DS_ENV_FILE=$(mktemp) made=1
        for file in "$HOME/.deepspeed_env" .deepspeed_env; do
            [ ! -r "$file" ] || cat "$file" >>"$DS_ENV_FILE"
        done
        for name in PATH OMP_NUM_THREADS DS_ACCELERATOR TORCH_EXTENSIONS_DIR GLOO_SOCKET_IFNAME ${FORWARD:-}; do
            [ -z "${!name:-}" ] || echo "$name=${!name}" >>"$DS_ENV_FILE"
        done
        export DS_ENV_FILE
    fi
    ;;
*) options=(--num_accelerators "$where" ${options[@]+"${options[@]}"}) ;;
esac
[ -n "$made" ] || exec deepspeed "${options[@]}" "$@"
trap 'rm -f "$DS_ENV_FILE"' EXIT
deepspeed "${options[@]}" "$@" &
trap 'kill -TERM "$!"' INT TERM
wait "$!" || code=$?
wait "$!" 2>/dev/null || exit "${code:-1}" # a signal ends the first wait, not the ranks
