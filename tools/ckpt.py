#!/usr/bin/env python3
"""Inspect a run's checkpoints, and export or import class rows.

    tools/ckpt.py list runs/vit_b32                         verify and list every checkpoint
    tools/ckpt.py verify runs/vit_b32/step-00010000         check every byte against the manifest
    tools/ckpt.py quarantine runs/vit_b32                   rename invalid checkpoints to .bad-step-...
    tools/ckpt.py show runs/vit_b32                         print the contents of the newest checkpoint
    tools/ckpt.py export runs/vit_b32 --out rows.npy        write the class rows [C, D] of all ranks to one file
    tools/ckpt.py import arcface_r50/ --out rows.npy        the same from insightface's per-rank partial FC files

A run directory stands for its newest valid checkpoint. `classifier.init` accepts the .npy. Class rows are copied in
blocks, so they need not fit in memory. tools/export.py exports the student.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path
from megacid.checkpoint import store
from megacid.checkpoint.state import CheckpointReader
from megacid.classifier.initialization import load_rows, shape_of
from megacid.distributed.progress import progress_bar
from megacid.errors import UserError, run_tool
from megacid.evaluate.export import checkpoint_of
from megacid.storage.atomic import atomic_path

BLOCK_ROWS = 1 << 16


def resolve(path: Path) -> Path:
    """The checkpoint directory `path`, verified, or the newest valid checkpoint of the run directory `path`."""
    if not (path / store.MANIFEST).exists():
        return checkpoint_of(path, None)
    try:
        store.verify(path)
    except ValueError as error:
        raise UserError(f"not a valid checkpoint: {error}; choose another") from None
    return path


def verified(run: Path) -> Iterator[tuple[int, Path, str]]:
    """(step, directory, "ok" or the defect) of every checkpoint."""
    for step, path in store.list_steps(run):
        try:
            store.verify(path)
            yield step, path, "ok"
        except ValueError as error:
            yield step, path, str(error)


def list_(args: argparse.Namespace) -> int:
    checkpoints = list(verified(args.path))
    if not checkpoints:
        raise UserError(
            f"{args.path} has no checkpoints (step-...), expected a run directory of train.py: correct the path"
        )
    for step, path, status in checkpoints:
        size = sum(file.lstat().st_size for file in path.rglob("*"))
        print(f"step {step:>10,}  {size / 2**20:>12,.1f} MiB  {status}")
    return 0 if all(status == "ok" for *_, status in checkpoints) else 1


def verify(args: argparse.Namespace) -> int:
    try:
        manifest = store.verify(args.path)
    except ValueError as error:
        raise UserError(f"not a valid checkpoint: {error}") from None
    print(f"{args.path}: {len(manifest['files'])} files, all bytes match the manifest")
    return 0


def quarantine(args: argparse.Namespace) -> int:
    for _, path, status in list(verified(args.path)):
        if status != "ok":
            bad = path.with_name(f".bad-{path.name}")
            if bad.exists():
                raise UserError(f"{bad} exists: move or remove it, then run the same command again")
            path.rename(bad)
            print(f"{path.name} -> {bad.name}: {status}")
    return 0


def show(args: argparse.Namespace) -> int:
    directory = resolve(args.path)
    reader = CheckpointReader(directory)
    fields = {key: value for key, value in reader.manifest.items() if key != "files"}
    print(f"{directory}\n{json.dumps(fields, indent=2, sort_keys=True)}")
    size: Counter[str] = Counter()
    for file in reader.manifest["files"]:
        size[file["name"].partition("-")[0]] += file["bytes"]
    for kind, total in sorted(size.items()):
        print(f"{kind:<12}{total / 2**20:>12,.1f} MiB")
    names = reader.names("param")
    print(f"student     {len(names):>12} parameters; rows: {', '.join(reader.row_names()) or 'none'}")
    return 0


def write_rows(out: Path, shape: tuple[int, int], read: Callable[[int, int], np.ndarray]) -> None:
    """Write the float32 [C, D] rows that read(start, stop) returns to the .npy file `out`, atomically."""
    if out.suffix != ".npy":
        raise UserError(f"--out is {out}, expected a name that ends in .npy")
    with atomic_path(out) as temporary, progress_bar(out.name, "class", shape[0]) as bar:
        rows = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
        for start in range(0, shape[0], BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, shape[0])
            rows[start:stop] = read(start, stop)
            bar.update(stop - start)
        rows.flush()
    print(f"{out}: {shape[0]:,} classes x {shape[1]}")


def export(args: argparse.Namespace) -> int:
    directory = resolve(args.path)
    reader = CheckpointReader(directory)
    if not reader.row_names():
        raise UserError(f"{directory} has no classifier: its run had no cluster term")
    shape = int(reader.manifest["num_classes"]), int(reader.manifest["embed_dim"])
    write_rows(args.out, shape, lambda start, stop: reader.rows("head/weight", start, stop).numpy())
    return 0


def import_(args: argparse.Namespace) -> int:
    shape = shape_of(args.path)
    write_rows(args.out, shape, lambda start, stop: load_rows(args.path, start, stop, shape).numpy())
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, call, text in (
        ("list", list_, "verify and list every checkpoint of a run; exit code 1 when one is invalid"),
        ("verify", verify, "check every byte of one checkpoint against its manifest"),
        ("quarantine", quarantine, "rename the invalid checkpoints of a run to .bad-step-..."),
        ("show", show, "print the contents of a checkpoint"),
        ("export", export, "write the class rows of a checkpoint to one .npy file"),
        (
            "import",
            import_,
            "write the class rows of per-rank insightface files, or of a .safetensors file, to one .npy file",
        ),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", type=local_path, help="run or checkpoint directory; for import: files to read")
        if call in (export, import_):
            command.add_argument("--out", type=local_path, required=True, help="the .npy file to write")
        command.set_defaults(call=call)
    args = parser.parse_args(argv)
    return int(args.call(args))


if __name__ == "__main__":
    sys.exit(run_tool(main))
