"""Shared by all tests: import paths of a plain checkout, one thread per process, no accelerator unless a test asks."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools"), str(ROOT / "tests")]

from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}  # item.keywords has names of folders, too
        if "gpu" in marks and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "slow" in marks and "slow" not in (config.getoption("markexpr") or ""):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if "parity" in marks and not os.environ.get("MEGACID_PARITY_PYTHON"):
            item.add_marker(pytest.mark.skip(reason="parity: run tools/clip_benchmark_parity.sh"))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small finished pipeline (shards, teacher embeddings, clusters) that whole training runs share."""
    from offline_data import run as run_tool_inside
    from offline_data import save_model
    from train_run import Pipeline

    root = tmp_path_factory.mktemp("pipeline")
    made = Pipeline(root, root / "scenes" / "train", root / "teacher", root / "clusters")
    sizes = ("--num", 72, "--clusters", 12, "--size", 32, "--samples-per-shard", 30)
    run_tool_inside("synthesize", "scenes", "--out", root / "scenes", *sizes)
    model = save_model(root / "model", seed=3)
    run_tool_inside("embed", "--shards", made.shards, "--out", made.teacher, "--model", f"local-dir:{model}")
    run_tool_inside("cluster", "--embeddings", made.teacher, "--out", made.labels, "--k", 13, "--iterations", 3)
    return made


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    """Where a payload would leave its mark; checked at the end of every test that asks for it."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code of the input was executed"
