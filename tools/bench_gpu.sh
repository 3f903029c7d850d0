#!/usr/bin/env bash
<<<<<<< HEAD
# Run all measurements on one GPU, most important first: the kernels' tests on the GPU, tiles, the head, optimizers, k-means'
# assignment, the contrastive terms, a step at ten million classes, the model of a training step. Takes about an hour. A step
# that fails does not stop the others; it is named at the end.
#   bash tools/bench_gpu.sh [OUT]               write OUT/SUITE-GPU.json and the table OUT/SUITE-GPU.md (default docs/bench)
#   PYTHON=python3 bash tools/bench_gpu.sh      use another environment than .venv
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath -m "${1:-docs/bench}")
python=${PYTHON:-${VIRTUAL_ENV:-$PWD/.venv}/bin/python}
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower())' 2>/dev/null) ||
    { echo "bench_gpu: torch finds no GPU. remedy: run this on a GPU machine, or pass its environment: PYTHON=..." >&2; exit 2; }
mkdir -p "$out"
failed=()

step() { # step NAME command...: run it; output goes to the terminal and to OUT/NAME-GPU.md
    local name=$1; shift
    printf '\n=== %s: %s\n' "$name" "$*"
    "$@" 2>&1 | tee "$out/$name-$gpu.md"
    [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
}
suite() { # suite NAME options...
    local name=$1; shift
    step "$name" "$python" tools/bench.py --json "$out/$name-$gpu.json" "$@"
}

step tests "$python" -m pytest -q -m gpu tests/kernels
step tune "$python" tools/tune.py --out "$out/kernel-table-$gpu.json"
[ -f "$out/kernel-table-$gpu.json" ] && export MEGACID_KERNEL_TABLE=$out/kernel-table-$gpu.json
suite head --suite head --check
suite optimizer --suite optimizer --check
suite assignment --suite assignment --check
suite contrastive --suite contrastive --check
suite step-10m --suite step --shapes 10000000,512,4096,0.1
suite head-init --suite head --geometry init
suite step-time --suite step-time --clock wall --check
[ ${#failed[@]} = 0 ] || { echo "bench_gpu: failed, or missed a limit: ${failed[*]}; see $out" >&2; exit 1; }
=======
# tools/bench_gpu.py in the project's environment: measure on one GPU in slices, see --help.
#   bash tools/bench_gpu.sh [OUT] [OPTION...]           results in OUT (default docs/bench)
#   PYTHON=python3 bash tools/bench_gpu.sh [OUT] ...    use another environment than .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-${VIRTUAL_ENV:-$PWD/.venv}/bin/python}" tools/bench_gpu.py "$@"
>>>>>>> e493d9a (tools/bench_gpu.py: GPU measurements in slices that resume, a dry mode in Triton's interpreter; lowest versions that were tested)
