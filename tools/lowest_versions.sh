#!/usr/bin/env bash
# Install the lowest versions that pyproject.toml allows, and run a short set of tests with them: in a temporary environment,
# 6 GB, about 10 minutes on 2 cores. Run it after a change of the requirements. The extras trackio and eval are left out:
# their own requirements would raise those of megacid.
#   bash tools/lowest_versions.sh
#   PYTHON=python3.11 bash tools/lowest_versions.sh    choose the interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu DS_BUILD_OPS=0 UV_CACHE_DIR=${UV_CACHE_DIR:-$folder/cache}
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$folder/env/bin/uv" pip install --quiet --python "$folder/env/bin/python" --resolution lowest-direct \
    --editable ".[faiss,simplejpeg,demo,corpus,wandb,remote]" "pytest>=8.3" "hypothesis>=6.100"
"$folder/env/bin/uv" pip freeze --quiet --python "$folder/env/bin/python" | grep -iE "^(torch|triton|deepspeed|open.clip|numpy)"
"$folder/env/bin/python" -m pytest -q -p no:cacheprovider tests/test_import_direction.py tests/models/test_student.py \
    tests/models/test_pretrained.py tests/kernels/test_fused_rows.py tests/kernels/test_aot.py tests/data/test_images.py \
    tests/data/test_jpeg.py tests/data/test_image_bounds.py tests/data/test_image_fuzz.py tests/data/test_remote_http.py \
    tests/data/test_remote_ahead.py tests/config tests/classifier tests/storage/test_parquet.py \
    tests/offline/test_nearest_backends.py tests/training/test_trackers.py tests/e2e/test_train.py
