"""Small inputs for the offline tools, and `run`, which calls a tool's command line inside the test process."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import save_file

from megacid.errors import run_tool
from megacid.models.student import build_student, open_clip_config
from megacid.storage.metadata import write_meta

ROOT = Path(__file__).resolve().parents[1]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *args: object, expect: int = 0) -> str:
    """Run a tool's command line inside this process, which saves the seconds that importing torch takes.

    Returns its output and log; asserts the exit code.
    """
    tool, output = load_tool(name), io.StringIO()
    handler = logging.StreamHandler(output)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = run_tool(lambda: tool.main([str(arg) for arg in args]))
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert code == expect, output.getvalue()
    return output.getvalue()


def save_model(folder: Path, seed: int) -> Path:
    student = build_student("digits-student", embed_dim=32, seed=seed)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(student)))
    tensors = {name: value.detach().clone().contiguous() for name, value in student.clip.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def write_shards(folder: Path) -> None:
    """Three tars of 12 pictures; every third picture is a copy of the one before; one picture is damaged."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in range(12):
                key = f"{shard:05d}{row:04d}"
                redundant = row % 3 == 2
                if not redundant:
                    picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((40, 40))
                    origin = key
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                image = b"not a picture" if key == "000010004" else buffer.getvalue()
                fields = {
                    "key": key,
                    "origin": origin,
                    "redundant": redundant,
                    "uid": hashlib.md5(key.encode()).hexdigest(),
                }
                for ending, data in (
                    ("png", image),
                    ("txt", f"picture {key}".encode()),
                    ("json", json.dumps(fields).encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def rewrite(tar: Path, replace: Callable[[str, bytes], tuple[str, bytes]]) -> None:
    """Write a tar again with other names and contents of its members."""
    with tarfile.open(tar) as file:
        members = [replace(m.name, file.extractfile(m).read()) for m in file.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def write_embeddings(folder: Path, x: np.ndarray, tars: int, **meta: object) -> Path:
    """Write rows x (fp16 [n, D]) in `tars` partitions like tools/embed.py. meta: entries of meta.json to replace."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, part in enumerate(np.array_split(x, tars)):
        np.save(folder / "img_emb" / f"img_emb_{number:05d}.npy", part)
        keys = pa.table({"image_path": [f"{number:05d}{row:04d}" for row in range(len(part))]})
        pq.write_table(keys, folder / "metadata" / f"metadata_{number:05d}.parquet")
    entries: dict[str, object] = {
        "dim": x.shape[1],
        "num_samples": len(x),
        "shards_digest": "d",
        "model": "m",
        "weights": "w",
    }
    entries |= {"precision": "fp32", "partitions": {f"{number:05d}": number for number in range(tars)}}
    write_meta(folder, "embed", source={"shards": "s"}, **(entries | meta))
    return folder


def embed_args(folder: Path, out: str = "emb", model: str = "model") -> list[object]:
    return [
        "--shards",
        folder / "shards",
        "--out",
        folder / out,
        "--model",
        f"local-dir:{folder / model}",
        "--workers",
        0,
        "--batch-size",
        5,
    ]


def cluster_args(folder: Path, out: str = "clusters", k: int = 4, emb: str = "emb") -> list[object]:
    return ["--embeddings", folder / emb, "--out", folder / out, "--k", k, "--iterations", 4, "--top-labels", 2]


def balance_args(folder: Path, out: str = "balance", *rest: object) -> list[object]:
    return ["--embeddings", folder / "emb", "--clusters", folder / "clusters", "--out", folder / out, *rest]


def write_benchmark(folder: Path) -> None:
    """A classification set of 3 classes, 6 pictures in train and 6 in test."""
    folder.mkdir()
    (folder / "classnames.txt").write_text("one\ntwo\nthree\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}.\n")
    rng = np.random.default_rng(1)
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / split / "nshards.txt").write_text("1\n")
        with tarfile.open(folder / split / "0.tar", "w") as tar:
            for row in range(6):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
                for ending, data in (("png", buffer.getvalue()), ("cls", str(row % 3).encode())):
                    info = tarfile.TarInfo(f"s{row}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def results(out: Path) -> dict[str, object]:
    """The files of a stage by name, also hidden ones: sha256 of the bytes; meta.json as its content without date."""
    files: dict[str, object] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.name == "meta.json":
            files[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "date"}
        else:
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files
