"""Records what a few small runs compute: losses, checkpoints, labels, keep flags.

A refactoring must reproduce `tests/assets/traces.json` bit for bit (`test_traces.py`). After a change of numerics:

    python tests/traces.py tests/assets/traces.json
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import conftest  # noqa: F401  import paths of a plain checkout, one thread

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from harness import run_ranks
from offline_data import run as run_tool_here
from offline_data import save_model
from toy import run_file, tensors, write_features

import megacid.train
from megacid import failpoints

WORLDS = (1, 2)


def machine() -> dict[str, str]:
    """What the last bit of a matrix product depends on: the processor's features, and the libraries."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    names = ("vendor_id", "cpu family", "model", "stepping", "flags")
    digest = hashlib.sha256("|".join(told.get(name, "") for name in names).encode()).hexdigest()[:16]
    packages = ("torch", "numpy", "deepspeed", "faiss-cpu", "open_clip_torch", "pillow", "torchvision")
    return {"processor": digest, **{name: importlib.metadata.version(name) for name in packages}}


def _train_rank(argv: list[str]) -> list[float]:
    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(rank))
    losses: list[float] = []
    failpoints.hooks["train:applied"] = lambda verdict, **_: losses.append(float(verdict.loss))
    code = megacid.train.main(argv)
    assert code == 0, code
    return losses


def _train(world: int, file: Path, last: Path) -> dict[str, Any]:
    losses = run_ranks(_train_rank, world, ["--deepspeed_config", str(file)], timeout_s=120)
    digest = hashlib.sha256()
    for name, value in sorted(tensors(last).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"losses": losses[0], "checkpoint": digest.hexdigest()}


def _labels(folder: Path) -> list[int]:
    return [
        int(v)
        for path in sorted((folder / "labels").glob("*.parquet"))
        for v in pq.read_table(path)["label"].to_pylist()
    ]


def _keep(folder: Path) -> list[int]:
    return [int(v) for path in sorted((folder / "keep").glob("*.npy")) for v in np.load(path)]


def record(root: Path) -> dict[str, Any]:
    """Run everything below `root`; the result is JSON-able."""
    traces: dict[str, Any] = {}
    write_features(root / "features")
    for world in WORLDS:
        for name, options in {
            "features": {},
            "features-sgd-arcface": {"classifier__optimizer": "sgd", "classifier__m2": 0.2, "classifier__m3": 0.0,
                                     "classifier__log_q": True, "zero_optimization": {"stage": 2}},
        }.items():  # fmt: skip
            file = run_file(root, f"{name}-{world}", **options)
            traces[f"{name}-{world}"] = _train(world, file, root / "runs" / f"{name}-{world}" / "step-00000024")

    scenes, teacher, flat = root / "scenes", root / "teacher", root / "flat"
    sizes = ("--num", 144, "--clusters", 12, "--size", 32, "--samples-per-shard", 40)
    run_tool_here("synthesize", "scenes", "--out", scenes, *sizes)
    model = save_model(root / "model", seed=3)
    shards = scenes / "train"
    run_tool_here("embed", "--shards", shards, "--out", teacher, "--model", f"local-dir:{model}")
    run_tool_here("cluster", "--embeddings", teacher, "--out", flat, "--k", 13, "--iterations", 3)
    levels = root / "levels"
    run_tool_here("cluster", "--embeddings", teacher, "--out", levels, "--k", 13, "--method", "hierarchical",
                  "--refine", 2, "--refine-cells", 8)  # fmt: skip
    traces["labels-flat"], traces["labels-hierarchical"] = _labels(flat), _labels(levels)
    common = ("--shards", shards, "--embeddings", teacher, "--clusters", flat)
    for name, more in {
        "keep-components": ("--target-keep", 0.6),
        "keep-greedy": ("--target-keep", 0.6, "--link", "greedy"),
        "keep-across": ("--target-keep", 0.6, "--neighbor-clusters", 4),
    }.items():
        run_tool_here("balance", *common, "--out", root / name, *more)
        traces[name] = _keep(root / name)

    for world in WORLDS:
        file = run_file(
            root, f"pairs-{world}", train_batch_size=16, gradient_accumulation_steps=2,
            run__total_steps=6, run__save_every=3, student__model="digits-student", student__embed_dim=None,
            data__shards=str(shards), data__teacher=str(teacher), data__labels=str(flat),
            data__keep=str(root / "keep-components"),
            loss__contrastive=0.5, loss__instance=1.0, loss__cluster=0.5, loss__mse=0.1,
            loss__beta=0.5, loss__gamma=0.5,
            classifier__sample_rate=0.5, classifier__init="centroids",
        )  # fmt: skip
        block = json.loads(file.read_text())
        del block["megacid"]["data"]["features"]
        for unused in ("hidden", "layers", "embed_dim"):
            del block["megacid"]["student"][unused]
        file.write_text(json.dumps(block))
        traces[f"pairs-{world}"] = _train(world, file, root / "runs" / f"pairs-{world}" / "step-00000006")
    return traces


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {"machine": machine(), "traces": record(Path(folder))}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
