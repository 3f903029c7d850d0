#!/usr/bin/env bash
# Compare the evaluation with CLIP_benchmark's own code (marker "parity"), about 4 minutes on 2 cores. clip-benchmark and what
# it needs go into a temporary environment, 300 MB, which uses torch and open_clip of $PYTHON, so both sides compute with the
# same versions. clip-benchmark 1.6.2 fails with numpy 2.4.
#   bash tools/clip_benchmark_parity.sh
#   PYTHON=.venv/bin/python bash tools/clip_benchmark_parity.sh    choose the interpreter, which has megacid
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
python=${PYTHON:-python3}
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
"$python" -m venv "$folder/env"
# A line of a .pth file is a search path.
"$python" -c "$packages" >"$("$folder/env/bin/python" -c "$packages")/shared.pth"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "clip-benchmark==1.6.2" "numpy<2.4"
MEGACID_PARITY_PYTHON="$folder/env/bin/python" "$python" -m pytest -q -p no:cacheprovider -m parity -rP --show-capture=stdout \
    tests/evaluate/test_parity.py
