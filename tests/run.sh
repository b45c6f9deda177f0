#!/usr/bin/env bash
# Runs the tests in the project's environment, which it makes when it isn't there.
#
#   ./tests/run.sh               what runs at every change
#   ./tests/run.sh --slow        all, the long proofs too
#   ./tests/run.sh -k freeze …   everything else goes to pytest
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/_venv.sh"

select=(-m "not slow") rest=()
for argument in "$@"; do
    case $argument in
    --slow) select=() ;;
    *) rest+=("$argument") ;;
    esac
done

smartfrz_venv test
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
cd "$root"
exec python -m pytest ${select[@]+"${select[@]}"} ${rest[@]+"${rest[@]}"}
