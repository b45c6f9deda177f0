# Sourced by launch/demo.sh and tests/run.sh; bash. Makes the virtual environment that both use, once.
#
#   smartfrz_venv demo|test    afterwards $venv/bin is first on PATH
#
# SMARTFRZ_VENV: where the environment lies (default: .venv in the repository).
# PYTHON: the interpreter that makes it (default: python3).

die() {
    echo "smartfrz_ds: $*" >&2
    exit 1
}

installed() { # a package's version, without a local part such as +cpu; fails if it is not there. Imports nothing
    python -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]).split("+")[0])' "$1" 2>/dev/null
}

smartfrz_venv() {
    local extra=$1 python=${PYTHON:-python3} venv=${SMARTFRZ_VENV:-$root/.venv} stamp want torch
    command -v "$python" >/dev/null || die "no $python here; install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.11"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$("$python" --version) is too old; Python 3.11 or newer is needed (PYTHON=/path/to/python3.11 names one)"
    # DeepSpeed builds its communication op for CPUs at the first start.
    command -v "${CXX:-c++}" >/dev/null || die "no C++ compiler (${CXX:-c++}); install one, for example the package g++"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' ||
        die "Python's headers (Python.h) are missing, which building an extension needs; install them, for example the package python3-dev"

    if [ ! -x "$venv/bin/python" ]; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python has no venv module; install it, for example the package python3-venv"
        echo "smartfrz_ds: making $venv" >&2
        "$python" -m venv "$venv"
    fi
    export PATH=$venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
    # torch keeps one build of an extension a user, whatever the environment: two environments would build theirs anew in turns.
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}

    want=$(cat "$root/pyproject.toml" "$root/constraints.txt" <(echo "$root") | cksum)
    for stamp in "$venv/.smartfrz-test" "$venv/.smartfrz-$extra"; do # test has all of demo
        [ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || return 0
    done
    echo "smartfrz_ds: installing into $venv (some minutes, once)" >&2
    # torch first and alone: what is here stays, and nothing that comes after may bring another build of it.
    if ! torch=$(installed torch); then
        pip install --quiet "$(grep '^torch==' "$root/constraints.txt")"
        torch=$(installed torch)
    fi
    sed "s/^torch==.*/torch==$torch/" "$root/constraints.txt" >"$venv/constraints.txt"
    pip install --quiet -c "$venv/constraints.txt" -e "${root}[$extra]"
    echo "$want" >"$stamp"
}
