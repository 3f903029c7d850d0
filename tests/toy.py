"""A training run of a second or two for the fault tests: 1001 classes, 120 vectors in 5 uneven files, 24 steps of 8."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from faultplan import FaultPlan
from harness import rank_fates, run_ranks
from preloaded import share_results
from torch import Tensor

import megacid.train

CLASSES, DIM, STEPS = 1001, 32, 24
SIZES = (31, 7, 40, 1, 41)


def write_features(root: Path) -> Path:
    """The data of the toy run."""
    random = np.random.default_rng(7)
    for folder in ("features", "labels"):
        (root / folder).mkdir(parents=True)
    for number, size in enumerate(SIZES):
        rows = random.standard_normal((size, DIM), np.float32)
        np.save(root / "features" / f"features_{number:05d}.npy", rows.astype(np.float16))
        np.save(root / "labels" / f"labels_{number:05d}.npy", random.integers(0, CLASSES, size).astype(np.int32))
    meta = {"made_by": "synthesize", "source": {"seed": 7}, "classes": CLASSES, "dim": DIM}
    (root / "meta.json").write_text(json.dumps(meta))
    return root


def run_file(root: Path, name: str, **changes: Any) -> Path:
    """Write a run file for the data in root/"features". changes: "section__key" of the block, or DeepSpeed's keys."""
    block: dict[str, Any] = {
        "run": {"name": name, "dir": str(root / "runs"), "total_steps": STEPS, "save_every": 6, "log_every": 1},
        "student": {"model": "feature-mlp", "embed_dim": 32, "hidden": 32, "layers": 1},
        "data": {"features": str(root / "features"), "block_shards": 2},
        "loss": {"cluster": 1.0},
        "classifier": {"init": "random", "sample_rate": 0.3, "m3": 0.1, "scale": 16.0, "lr": 2e-2},
        "schedule": {"warmup_steps": 3},
    }
    tree: dict[str, Any] = {
        "train_batch_size": 8, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            block.setdefault(section, {})[field] = value
        else:
            tree[key] = value
    path = root / f"{name}.json"
    path.write_text(json.dumps({**tree, "megacid": block}))
    return path


def train_here(argv: list[str], plan: str | None = None) -> int:
    """The trainer on an already formed group of ranks; plan: a FaultPlan as JSON."""
    share_results()
    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(rank))
    if plan is not None:
        FaultPlan.from_json(plan).install(rank)
    return megacid.train.main(argv)


def train_toy(world: int, file: Path, *options: str, plan: FaultPlan | None = None, timeout_s: float = 60) -> list[int]:
    """Exit codes by rank of `train.py --deepspeed_config file options` on forked ranks; -9 for a killed rank."""
    argv = ["--deepspeed_config", str(file), *options]
    run = rank_fates if plan is not None else run_ranks
    return run(train_here, world, argv, plan.to_json() if plan else None, timeout_s=timeout_s)


def tensors(directory: Path) -> dict[str, Tensor]:
    """Everything a checkpoint holds, whatever number of ranks wrote it."""
    from megacid.checkpoint.state import CheckpointReader

    reader = CheckpointReader(directory)
    kinds = ("param", "exp_avg", "exp_avg_sq", "momentum_buffer", "buffer")
    found = {f"{kind}/{name}": reader.tensor(kind, name) for kind in kinds for name in reader.names(kind)}
    for name in reader.row_names():
        found[name] = reader.rows(name, 0, reader.manifest["num_classes"])
    # Copies: what is read from a file is mapped to it, and a test may change the file.
    return {name: value.clone() for name, value in found.items()}


def differing(want: dict[str, Tensor], got: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bits in both."""
    return sorted(want.keys() ^ got.keys()) + [name for name in want if name in got and not want[name].equal(got[name])]


def estimated(argv: list[str]) -> str:
    """What tools/estimate.py prints, run in a fork: PyTorch refuses to fork after a backward on fake tensors."""
    return str(run_ranks(_estimate_here, 1, argv, timeout_s=300)[0])


def _estimate_here(argv: list[str]) -> str:
    import estimate

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert estimate.main(argv) == 0
    return out.getvalue()
