#!/usr/bin/env bash
# Runs the tests in the project's environment, which it makes when it isn't there.
#
#   ./tests/run.sh               what runs at every change
#   ./tests/run.sh --slow        all, the long proofs too
#   ./tests/run.sh -m unit       the tests that start no ranks; -m takes any expression of the markers in pyproject.toml
#   ./tests/run.sh --gpu         on this machine's GPUs: the exactness matrix, and what only a GPU shows (tests/gpu). Exit code 2 without one
#   ./tests/run.sh --system      as root: first installs what tests on two hosts and of HTML pages need (iproute2, pdsh, sshd, Chromium)
#   ./tests/run.sh --versions [X …]  the same package with other releases of DeepSpeed, and a table (tests/versions; --help lists the options)
#   ./tests/run.sh -k freeze …   everything else goes to pytest
#   ./tests/run.sh -n 0          in one process; without --slow, two share the test files (-n N for another number), so that ranks overlap
#   ATEN_CPU_CAPABILITY=default ./tests/run.sh
#                                with another processor's kernels, in the ranks too; so do MKL_CBWR, ONEDNN_MAX_CPU_ISA, OMP_NUM_THREADS
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/_venv.sh"

# Debian's packages that tests need and that no wheel brings. Without them those tests are skipped, with their reason.
smartfrz_system() {
    local package missing=()
    for package in iproute2 pdsh openssh-server openssh-client chromium; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "--system installs ${missing[*]} with apt-get, which needs root"
    if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >&2; then
        echo "smartfrz_ds: apt-get could not install ${missing[*]}; the tests that need them are skipped" >&2
    fi
}

slow=false gpu=false versions=false marks="" rest=() processes=(-n 2 --dist loadfile)
while [ $# -gt 0 ]; do
    case $1 in
    --slow) slow=true processes=() ;; # long proofs have the machine for themselves
    --gpu) gpu=true processes=() ;;   # and so do those that need a GPU's memory
    --versions)
        versions=true
        shift
        rest=("$@") # releases and options of tests/versions
        break
        ;;
    --system) smartfrz_system ;;
    -m)
        [ $# -gt 1 ] || die "-m: expected an expression of markers, for example -m unit"
        marks=$2
        shift
        ;;
    -m?*) marks=${1#-m} ;;
    -n | --numprocesses)
        [ $# -gt 1 ] || die "$1: expected a number of processes, for example -n 2"
        processes=(-n "$2" --dist loadfile)
        shift
        ;;
    -n?*) processes=(-n "${1#-n}" --dist loadfile) ;;
    --pdb) processes=() rest+=("$1") ;;
    *) rest+=("$1") ;;
    esac
    shift
done
# The long proofs run only where they are asked for, by --slow or by their marker.
if [ "$slow" = false ] && ! grep -qw slow <<<"$marks"; then
    marks=${marks:+($marks) and }"not slow"
fi

# DeepSpeed's name of the accelerator here; nothing on a CPU.
accelerator() {
    python -c 'import torch; print(torch.accelerator.current_accelerator() if torch.accelerator.device_count() else "")'
}

smartfrz_venv test
if [ "$gpu" = true ]; then
    DS_ACCELERATOR=$(accelerator)
    if [ -z "$DS_ACCELERATOR" ]; then
        echo "tests/run.sh --gpu: torch sees no GPU here. Run ./tests/run.sh, which tests everything on the CPU;" \
            "tests/engines/test_fake_gpu.py among it finds tensors on the wrong device" >&2
        exit 2
    fi
    [ ${#rest[@]} -gt 0 ] || rest=(tests/gpu tests/engines/test_exact.py)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
python "$root/smartfrz_ds/integrations/build_locks.py" # the lock of a killed build would make this start wait indefinitely
cd "$root"
if [ "$versions" = true ]; then
    PYTHONPATH=$root/tests${PYTHONPATH:+:$PYTHONPATH} exec python -m versions ${rest[@]+"${rest[@]}"}
fi
exec python -m pytest ${processes[@]+"${processes[@]}"} ${marks:+-m "$marks"} ${rest[@]+"${rest[@]}"}
