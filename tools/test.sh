#!/usr/bin/env bash
# Set everything up and run the tests (no GPU needed; GPU tests are skipped without one, longer soaks with -m slow).
#   bash tools/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
bin=${VIRTUAL_ENV:-$PWD/.venv}/bin
# One thread per process: the tests start several ranks on few cores. No accelerator unless asked for.
export OMP_NUM_THREADS=1 DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} TF_CPP_MIN_LOG_LEVEL=3
echo "test: ruff"
"$bin/ruff" check . && "$bin/ruff" format --check --quiet . || { echo 'test: step "ruff" failed. remedy: .venv/bin/ruff check --fix . && .venv/bin/ruff format .' >&2; exit 1; }
echo "test: mypy"
"$bin/mypy" || { echo 'test: step "mypy" failed. remedy: correct the types named above' >&2; exit 1; }
echo "test: mkdocs"
NO_MKDOCS_2_WARNING=1 "$bin/mkdocs" build --strict --quiet || { echo 'test: step "mkdocs" failed. remedy: correct the pages named above' >&2; exit 1; }
# Many tests wait for ranks, time limits or disks: two workers more than there are cores. Each begins with a run of files, so
# that their fixtures are made once.
cores=$(env -u OMP_NUM_THREADS nproc)
workers=$((cores < 6 ? cores + 2 : 8))
echo "test: pytest, $workers workers (about 15 minutes on 2 cores)"
exec "$bin/python" -m pytest -n $workers --dist worksteal --durations=15 "$@"
