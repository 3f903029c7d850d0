#!/usr/bin/env bash
# Prepare the environment: .venv (or the virtual environment that is already active) with megacid installed editable.
# Does nothing when the environment already matches pyproject.toml and setup.py. Source it or run it; both work:
#   bash tools/setup.sh            prepare, print where the environment is
#   PYTHON=python3.12 bash tools/setup.sh    choose the interpreter for a new .venv
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { printf 'setup: step "%s" failed.\n  remedy: %s\n' "$1" "$2" >&2; exit 1; }
timed() { # timed "what it does" "what to do when it fails" command...
    local what=$1 remedy=$2 began=$SECONDS; shift 2
    printf 'setup: %s ...\n' "$what"
    "$@" || fail "$what" "$remedy"
    printf 'setup: %s: %d s\n' "$what" $((SECONDS - began))
}

python=${PYTHON:-python3}
if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
    venv=$VIRTUAL_ENV
else
    venv=$root/.venv
    if [ ! -x "$venv/bin/python" ]; then
        command -v "$python" >/dev/null || fail "find $python" "install Python 3.11 or newer, or name one: PYTHON=/path/to/python3 bash tools/setup.sh"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "check $python" "megacid needs Python 3.11 or newer, this is $("$python" -V 2>&1); name another with PYTHON=..."
        timed "create $venv" "install the venv module (Debian: apt-get install python3-venv) and remove $venv" "$python" -m venv "$venv"
    fi
fi

# The stamp holds what was installed: the same files and the same checkout need no second pass.
stamp=$venv/.megacid-installed
want=$(cd "$root" && { pwd; cat pyproject.toml setup.py; } | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    rm -f "$stamp"
    # DS_BUILD_OPS=0: DeepSpeed's C++ and CUDA operators are not needed and must not ask for a compiler.
    DS_BUILD_OPS=0 timed "install megacid and what it needs (about 6 GB, 2 to 5 minutes)" \
        "check the network, the free disk (8 GB) and the messages above; then run this script again" \
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[demo,dev,faiss]"
    timed "import torch, deepspeed, open_clip and faiss" "remove $venv and run this script again" \
        "$venv/bin/python" -W ignore -c 'import torch, faiss, open_clip, deepspeed, megacid, megacid_kernels'
    printf '%s' "$want" >"$stamp"
else
    echo "setup: $venv is up to date"
fi
