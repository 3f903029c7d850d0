"""Inputs made to do harm, and complete good inputs that a test replaces a part of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pair_data import save, stream, write_parquet

from megacid.checkpoint import store
from megacid.data.batch import Positions
from megacid.data.features import FeatureSet, FeatureStream
from megacid.data.index import ShardIndex
from megacid.errors import UserError

CLASSES, DIM = 5, 3


class Evil:
    """Unpickled, it makes a file: the mark that code of the input has run."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


BOMBS = {
    "deep list": b"[" * 200_000,
    "deep dict": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "long number": b'{"made_by": ' + b"9" * 5000 + b"}",
    "no text": b"\x80\x04\x95\xff",
    "number": b"7",
    "list": b"[1, 2]",
    "null": b"null",
    "empty": b"",
}


RUN: dict[str, Any] = {
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "megacid": {
        "run": {"name": "x", "total_steps": 2},
        "student": {"model": "feature-mlp", "embed_dim": 8},
        "data": {"features": "somewhere"},
        "loss": {"cluster": 1.0},
        "classifier": {"init": "random"},
    },
}


def write_meta_json(folder: Path, **meta: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def teacher(folder: Path, index: ShardIndex) -> Path:
    for number, name in enumerate(index.names):
        keys = index.table(number).keys
        for kind in ("img", "text"):
            save(folder / f"{kind}_emb" / f"{kind}_emb_{number:05d}.npy", np.ones((len(keys), 2), np.float16))
        write_parquet(folder / "metadata" / f"metadata_{number:05d}.parquet", image_path=keys, shard=[name] * len(keys))
    partitions = {name: number for number, name in enumerate(index.names)}
    return write_meta_json(folder, made_by="embed", shards_digest=index.digest, dim=2, partitions=partitions,
                num_samples=index.num_samples)  # fmt: skip


def labels(folder: Path, index: ShardIndex) -> Path:
    for number, name in enumerate(index.names):
        keys = index.table(number).keys
        write_parquet(folder / "labels" / f"{name}.parquet", key=keys, label=pa.array([0] * len(keys), pa.int32()))
    return write_meta_json(folder, made_by="cluster", shards_digest=index.digest, k=CLASSES)


def keep(folder: Path, index: ShardIndex) -> Path:
    for name, size in zip(index.names, index.sizes):
        save(folder / "keep" / f"{name}.npy", np.ones(size, bool))
    return write_meta_json(folder, made_by="balance", shards_digest=index.digest)


def features(folder: Path) -> Path:
    save(folder / "features" / "features_00000.npy", np.ones((16, DIM), np.float16))
    save(folder / "labels" / "labels_00000.npy", np.zeros(16, np.int32))
    return write_meta_json(folder, made_by="synthesize", classes=CLASSES, dim=DIM)


def read_pairs(index: ShardIndex, **tables: Any) -> None:
    """Everything of an epoch; a failure becomes a UserError, as the trainer makes one error of it."""
    for batch in stream(index, total_steps=3, **tables):
        if batch.failure:
            raise UserError(batch.failure)


def read_features(folder: Path) -> None:
    plan = Positions(8, 8, 1, 0, 1, 0, 2)
    for batch in FeatureStream(FeatureSet(folder), plan, seed=0):
        if batch.failure:
            raise UserError(batch.failure)


def checkpoint(folder: Path, data: bytes, name: str = "student-0.safetensors", **changes: Any) -> Path:
    """A checkpoint whose manifest is right about a file that may be anything."""
    folder.mkdir(parents=True)
    (folder / "student-0.safetensors").write_bytes(data)
    entry = {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"format": 1, "step": 3, "updates": 3, "num_classes": 2, "embed_dim": 2, "files": [entry], **changes}
    (folder / store.MANIFEST).write_bytes(store.seal(manifest))
    return folder


def build(model: str, pretrained: str | None) -> Any:
    from megacid.models.student import build_student

    return build_student(model, embed_dim=None, pretrained=pretrained, seed=0)
