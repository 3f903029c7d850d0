"""Files that are either whole or not there: atomic writes, stage metadata, and the checkpoint directory protocol.

A checkpoint is a directory `step-00001000/` with safetensors files and a `manifest.json`, published in this order:

    all ranks   write their files into `.tmp-step-...`, flush, fsync, hash the bytes they wrote
    rank 0      finds every file with its size, writes the manifest (name, size, sha256 of each), fsync
    rank 0      renames the stage directory to its final name, fsync of the parent
    rank 0      prunes old checkpoints down to `keep_last`

`saver.py` leads the ranks through it.

There is no `latest` file: the newest checkpoint is the highest step whose manifest verifies. A published directory is
never written to again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacid.failpoints import failpoint
from megacid.storage.atomic import file_sha256, fsync_dir, write_atomic

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_STEP = re.compile(r"step-([0-9]{8,})")


# ---- single files ------------------------------------------------------------------------------------------------


# ---- meta.json of the stage directories --------------------------------------------------------------------------


# ---- checkpoint directories --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrittenFile:
    """What one rank reports about one file: name inside the checkpoint, bytes, sha256 of the bytes handed to the disk."""

    name: str
    bytes: int
    sha256: str


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def make_stage(root: Path, step: int) -> Path:
    """A fresh, empty stage directory below `root`.

    Its name is new each time: a rank of an earlier start that outlived rank 0, or whose disk hung, may still be writing,
    and would write over the files of this one.
    """
    stage = root / f".tmp-{step_name(step)}-{time.time_ns():x}"
    stage.mkdir(parents=True)
    return stage


def drop(directory: Path) -> None:
    """Remove a directory, or as much of it as can be: the reason to remove it is often a disk that fails."""
    shutil.rmtree(directory, ignore_errors=True)


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_WRITE_BYTES = 1 << 24


def write_tensors(
    stage: Path, name: str, tensors: dict[str, Tensor], facts: dict[str, str] | None = None, *, step: int = 0
) -> WrittenFile:
    """Write one safetensors file into the stage, durable, and hash what was written (not what a re-read gives back).
    step: for the probes.

    Tensors may be on any device and are taken to the host one at a time: the library's own writer first makes one byte
    string of all of them, which for the rows of a classifier and their moments doubles what the process needs.
    """
    header: dict[str, Any] = {} if facts is None else {"__metadata__": facts}
    end = 0
    # Wide types first, as the format asks for aligned tensors.
    ordered = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    for key in ordered:
        tensor, start = tensors[key], end
        end += tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    half = (8 + len(text) + end) // 2
    with open(stage / name, "wb") as handle:

        def write(data: bytes | memoryview) -> None:
            nonlocal written
            at = 0
            while at < len(data):
                # One of the cuts is in the middle of the file.
                part = data[at : at + min(_WRITE_BYTES, half - written if written < half else _WRITE_BYTES)]
                handle.write(part)
                digest.update(part)
                at, written = at + len(part), written + len(part)
                if written == half:
                    handle.flush()  # what a crash leaves here is half a file, not an empty one
                    failpoint("store:mid_file", step=step)

        write(len(text).to_bytes(8, "little") + text)
        for key in ordered:
            host = tensors[key].detach().contiguous().cpu().reshape(-1)
            if host.numel():
                write(host.view(torch.uint8).numpy().data)
        handle.flush()
        failpoint("store:before_fsync", step=step)
        os.fsync(handle.fileno())
    failpoint("store:after_fsync", step=step)
    return WrittenFile(name, written, digest.hexdigest())


def publish(root: Path, stage: Path, step: int, files: list[WrittenFile], facts: dict[str, Any]) -> Path:
    """Rank 0: manifest, rename. Returns the published directory. Raises OSError, then nothing is published."""
    for file in files:
        path = stage / file.name
        if (size := path.stat().st_size) != file.bytes:
            raise OSError(f"{path} has {size} of the {file.bytes} bytes that were written to it")
    manifest = {
        **facts,
        "format": FORMAT_VERSION,
        "step": step,
        "files": [vars(file) for file in sorted(files, key=lambda f: f.name)],
    }
    failpoint("store:before_manifest", step=step)
    write_atomic(stage / MANIFEST, seal(manifest))
    fsync_dir(stage)
    final = root / step_name(step)
    if os.path.lexists(final):
        # Damaged, or from a part of the run that was given up (--resume PATH): moved away, never overwritten.
        final.rename(root / f".replaced-{final.name}-{time.time_ns():x}")
    failpoint("store:before_rename", step=step)
    os.replace(stage, final)
    fsync_dir(root)
    return final


def seal(manifest: dict[str, Any]) -> bytes:
    """The content of manifest.json. It carries its own hash, and there is one way to write it, so that every flipped
    byte is found as in any other file."""
    body = json.dumps(manifest, indent=1, sort_keys=True)
    sealed = {"manifest": manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode()


def prune(root: Path, keep_last: int, *, step: int) -> None:
    """Rank 0, after `step` was published: remove older checkpoints, so that `keep_last` whole ones stay. Raises OSError.

    Damaged ones do not count and stay: they must not push out the ones that the run can go on from. Nor do those of
    later steps, which a run that was sent back (--resume PATH) has left behind: they would push out the new one.
    """
    for left in root.glob(".tmp-pruned-*"):
        drop(left)
    older = [path for number, path in list_steps(root) if number <= step and _has_its_sizes(path)]
    for path in older[:-keep_last]:
        # Renamed first: a half-deleted directory must not look like a checkpoint.
        doomed = root / f".tmp-pruned-{path.name}"
        os.replace(path, doomed)
        failpoint("store:during_prune", step=step)
        shutil.rmtree(doomed)
    failpoint("store:after_prune", step=step)


def _has_its_sizes(directory: Path) -> bool:
    try:
        verify(directory, hashes=False)
    except ValueError:
        return False
    return True


def sweep_stages(root: Path) -> None:
    """Remove what killed saves left behind."""
    for path in root.glob(".tmp-*"):
        if path.is_dir() and not path.is_symlink():
            drop(path)
        else:
            path.unlink(missing_ok=True)


def list_steps(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every published checkpoint, oldest first, verified or not."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        step = _step_of(path)
        if step is not None and path.is_dir():
            found.append((step, path))
    return sorted(found)


def _step_of(directory: Path) -> int | None:
    """The step that the directory's name says; None when it is not the name of a checkpoint."""
    match = _STEP.fullmatch(directory.name)
    return int(match[1]) if match and step_name(int(match[1])) == directory.name else None


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of one checkpoint. Raises ValueError naming what is wrong with it, whatever the file holds."""
    path = directory / MANIFEST
    data = None
    try:
        if _size_of_file(path) is not None:
            data = path.read_bytes()
            manifest = json.loads(data)["manifest"]
            sealed = seal(manifest)
            version, step, files = manifest.get("format"), manifest.get("step"), manifest.get("files")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {str(error)[:200] or type(error).__name__}") from None
    if data is None:
        raise ValueError(f"{directory} has no {MANIFEST}")
    if data != sealed:
        raise ValueError(f"{path}: its sha256 does not match its content")
    if version != FORMAT_VERSION:
        raise ValueError(f"{directory} has format {version!r}, this version reads format {FORMAT_VERSION}")
    if type(step) is not int or _step_of(directory) not in (None, step):
        raise ValueError(f"{path} says step {step!r}, its directory {directory.name}")
    if not isinstance(files, list) or not files or not all(map(_is_file_entry, files)):
        raise ValueError(f"{path} has entries that are no files of a checkpoint")
    names = [file["name"] for file in files]
    if len(set(names)) != len(names):
        raise ValueError(f"{path} names a file twice")
    return dict(manifest)


def _is_file_entry(entry: Any) -> bool:
    """{"name", "bytes", "sha256"}, and nothing that could lead out of the directory."""
    if not isinstance(entry, dict) or entry.keys() != {"name", "bytes", "sha256"}:
        return False
    name, size, digest = entry["name"], entry["bytes"], entry["sha256"]
    good_name = isinstance(name, str) and re.fullmatch(r"[\w][\w.-]*", name) is not None and name != MANIFEST
    return good_name and type(size) is int and size >= 0 and isinstance(digest, str)


def verify(directory: Path, *, hashes: bool = True) -> dict[str, Any]:
    """The manifest, after every file was found with its size and, with `hashes`, its sha256. Raises ValueError."""
    manifest = read_manifest(directory)
    for file in manifest["files"]:
        path = directory / file["name"]
        try:
            size = _size_of_file(path)
            if size != file["bytes"]:
                held = "no file" if size is None else f"{size} bytes"
                raise ValueError(f"{path} has {held}, the manifest says {file['bytes']} bytes")
            if not hashes:
                continue
            digest = file_sha256(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        if digest != file["sha256"]:
            raise ValueError(f"{path} has sha256 {digest[:16]}..., the manifest says {file['sha256'][:16]}...")
    return manifest


def _size_of_file(path: Path) -> int | None:
    """None where there is nothing, or something that is no file (opening a pipe would wait for ever)."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def newest_valid(root: Path, *, hashes: bool = True) -> tuple[Path | None, list[str]]:
    """(directory of the newest checkpoint that verifies or None, one message for each newer one that does not)."""
    problems: list[str] = []
    for _, path in reversed(list_steps(root)):
        try:
            verify(path, hashes=hashes)
            return path, problems
        except ValueError as error:
            problems.append(str(error))
    return None, problems
