"""A small pipeline to train on, and whole training runs on forked ranks: what they leave on disk."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from harness import run_ranks
from preloaded import share_results
from torch import Tensor

from megacid import train
from megacid.checkpoint.state import CheckpointReader
from megacid.models.clip import StudentSpec, tokenizer_for

tokenizer_for(StudentSpec("digits-student"))  # reads the vocabulary here, for every forked rank


@dataclass(frozen=True)
class Pipeline:
    root: Path
    shards: Path
    teacher: Path
    labels: Path

    def run_file(self, name: str, **changes: Any) -> Path:
        """A run file with every term on; `changes` are "section__key" of the megacid block or DeepSpeed's own keys."""
        block: dict[str, Any] = {
            "run": {"name": name, "dir": str(self.root / "runs"), "total_steps": 6, "save_every": 3, "log_every": 2},
            "student": {"model": "digits-student"},
            "data": {"shards": str(self.shards), "teacher": str(self.teacher), "labels": str(self.labels)},
            "loss": {
                "contrastive": 0.5,
                "instance": 1.0,
                "cluster": 0.5,
                "mse": 0.1,
                "alpha": 1.0,
                "beta": 0.5,
                "gamma": 0.5,
            },
            "classifier": {"sample_rate": 0.5, "scale": 16.0},
            "schedule": {"warmup_steps": 2},
        }
        tree: dict[str, Any] = {
            "train_batch_size": 16, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        }  # fmt: skip
        for key, value in changes.items():
            section, _, field = key.partition("__")
            if field:
                block.setdefault(section, {})[field] = value
            else:
                tree[key] = value
        path = self.root / f"{name}.json"
        path.write_text(json.dumps({**tree, "megacid": block}))
        return path


def train_rank(argv: list[str]) -> int:
    share_results()
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(dist.get_rank()))
    return train.main(argv)


def run_train(world: int, file: Path, *options: str, expect: int = 0) -> None:
    assert run_ranks(train_rank, world, ["--deepspeed_config", str(file), *options], timeout_s=120) == [expect] * world


def tensors(directory: Path) -> dict[str, Tensor]:
    """Everything a checkpoint holds, whatever number of ranks wrote it."""
    reader = CheckpointReader(directory)
    values = {
        f"{kind}/{name}": reader.tensor(kind, name)
        for kind in ("param", "exp_avg", "exp_avg_sq", "buffer")
        for name in reader.names(kind)
    }
    classes = reader.manifest["num_classes"]
    for name in ("head/weight", "optimizer/exp_avg", "optimizer/exp_avg_sq", "optimizer/updates"):
        values[name] = reader.rows(name, 0, classes)
    # Copies: what is read from a file is mapped to it, and a test may change the file.
    return {name: value.clone() for name, value in values.items()}


def losses(run: Path) -> dict[int, float]:
    return scalars(run, "train/loss")


def scalars(run: Path, tag: str) -> dict[int, float]:
    """step -> value of a tag in a run's tensorboard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}
