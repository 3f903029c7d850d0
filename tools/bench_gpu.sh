#!/usr/bin/env bash
# tools/bench_gpu.py in the project's environment: measure on one GPU in slices, see --help.
#   bash tools/bench_gpu.sh [OUT] [OPTION...]           results in OUT (default docs/bench)
#   PYTHON=python3 bash tools/bench_gpu.sh [OUT] ...    use another environment than .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-${VIRTUAL_ENV:-$PWD/.venv}/bin/python}" tools/bench_gpu.py "$@"
