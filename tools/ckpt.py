#!/usr/bin/env python3
"""Look at a run's checkpoints, and move class rows in and out.

    tools/ckpt.py list runs/vit_b32                         every checkpoint, verified
    tools/ckpt.py verify runs/vit_b32/step-00010000         every byte against the manifest
    tools/ckpt.py quarantine runs/vit_b32                   rename what does not verify to .bad-step-...
    tools/ckpt.py show runs/vit_b32                         what the newest one holds
    tools/ckpt.py export runs/vit_b32 --out rows.npy        the class rows [C, D] of all ranks in one file
    tools/ckpt.py import arcface_r50/ --out rows.npy        per-rank files of insightface's partial FC, the same

A RUN stands for its newest valid checkpoint. The .npy is what `classifier.init` takes; class rows are copied in blocks, so
that no machine has to hold them all. The student is exported by tools/export.py.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkout  # noqa: F401  import paths of a plain checkout
from megacid.checkpoint import store
from megacid.checkpoint.state import CheckpointReader
from megacid.classifier.initialization import load_rows, shape_of
from megacid.errors import UserError, run_tool
from megacid.evaluate.export import checkpoint_of
from megacid.storage.atomic import atomic_path

BLOCK_ROWS = 1 << 16


def resolve(path: Path) -> Path:
    """A step directory itself, verified, or the newest valid checkpoint of a run directory."""
    if not (path / store.MANIFEST).exists():
        return checkpoint_of(path, None)
    try:
        store.verify(path)
    except ValueError as error:
        raise UserError(f"not a valid checkpoint: {error}; choose another") from None
    return path


def states(run: Path) -> Iterator[tuple[int, Path, str]]:
    for step, path in store.list_steps(run):
        try:
            store.verify(path)
            yield step, path, "ok"
        except ValueError as error:
            yield step, path, str(error)


def list_(args: argparse.Namespace) -> int:
    found = list(states(args.path))
    if not found:
        raise UserError(f"{args.path} holds no checkpoint (step-...): name a run directory of train.py")
    for step, path, said in found:
        size = sum(file.lstat().st_size for file in path.rglob("*"))
        print(f"step {step:>10,}  {size / 2**20:>12,.1f} MiB  {said}")
    return 0 if all(said == "ok" for *_, said in found) else 1


def verify(args: argparse.Namespace) -> int:
    try:
        manifest = store.verify(args.path)
    except ValueError as error:
        raise UserError(f"not a valid checkpoint: {error}") from None
    print(f"{args.path}: {len(manifest['files'])} files, every byte as written")
    return 0


def quarantine(args: argparse.Namespace) -> int:
    for _, path, said in list(states(args.path)):
        if said != "ok":
            bad = path.with_name(f".bad-{path.name}")
            if bad.exists():
                raise UserError(f"{bad} exists already: look at it and move it away, then run this again")
            path.rename(bad)
            print(f"{path.name} -> {bad.name}: {said}")
    return 0


def show(args: argparse.Namespace) -> int:
    directory = resolve(args.path)
    reader = CheckpointReader(directory)
    facts = {key: value for key, value in reader.manifest.items() if key != "files"}
    print(f"{directory}\n{json.dumps(facts, indent=2, sort_keys=True)}")
    size: Counter[str] = Counter()
    for file in reader.manifest["files"]:
        size[file["name"].partition("-")[0]] += file["bytes"]
    for kind, total in sorted(size.items()):
        print(f"{kind:<12}{total / 2**20:>12,.1f} MiB")
    names = reader.names("param")
    print(f"student     {len(names):>12} parameters; rows: {', '.join(reader.row_names()) or 'none'}")
    return 0


def write_rows(out: Path, shape: tuple[int, int], read: Callable[[int, int], np.ndarray]) -> None:
    """`out` .npy float32 [C, D] from read(start, stop), whole or not at all."""
    if out.suffix != ".npy":
        raise UserError(f"--out is {out}, expected a name that ends in .npy")
    with atomic_path(out) as temporary, tqdm(total=shape[0], unit="class") as bar:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, call, text in (
        ("list", list_, "every checkpoint of a run, verified; exit code 1 when one is damaged"),
        ("verify", verify, "one checkpoint against its manifest"),
        ("quarantine", quarantine, "rename the checkpoints that do not verify, so that nobody meets them again"),
        ("show", show, "what a checkpoint holds"),
        ("export", export, "class rows of a checkpoint as one .npy"),
        ("import", import_, "class rows of published per-rank files, or of a .safetensors, as one .npy"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", type=Path)
        if call in (export, import_):
            command.add_argument("--out", type=Path, required=True, help=".npy to write")
        command.set_defaults(call=call)
    args = parser.parse_args(argv)
    return int(args.call(args))


if __name__ == "__main__":
    sys.exit(run_tool(main))
