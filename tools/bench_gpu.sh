#!/usr/bin/env bash
# Everything there is to measure on one GPU, in the order of its worth: the kernels' tests on real hardware, tiles, the head,
# optimizers, k-means' assignment, the contrastive terms, a step at ten million classes. About an hour; what fails is said at
# the end and does not stop the rest.
#   bash tools/bench_gpu.sh [OUT]         results in OUT (default docs/bench): SUITE-GPU.json and the table, SUITE-GPU.md
#   PYTHON=python3 bash tools/bench_gpu.sh      with another environment than .venv
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath -m "${1:-docs/bench}")
python=${PYTHON:-${VIRTUAL_ENV:-$PWD/.venv}/bin/python}
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower())' 2>/dev/null) ||
    { echo "bench_gpu: torch finds no GPU. remedy: run this where there is one, or name its environment: PYTHON=..." >&2; exit 2; }
mkdir -p "$out"
failed=()

step() { # step NAME command...: its output goes to the terminal and to OUT/NAME-GPU.md
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
[ ${#failed[@]} = 0 ] || { echo "bench_gpu: failed, or below a bar: ${failed[*]}; see $out" >&2; exit 1; }
