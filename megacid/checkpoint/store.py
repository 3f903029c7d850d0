"""The checkpoint directory protocol: a checkpoint is either complete or absent.

A checkpoint is a directory `step-00001000/` with safetensors files and a `manifest.json`, published in this order:

    all ranks   write their files into `.tmp-step-...`, flush, fsync, hash the bytes they wrote
    rank 0      checks the size of every file, writes the manifest (name, size, sha256 of each), fsync
    rank 0      renames the stage directory to its final name, fsync of the parent
    rank 0      prunes old checkpoints down to `keep_last`

`saver.py` runs these steps on all ranks. There is no `latest` file: the newest checkpoint is the highest step whose
manifest verifies. A published directory is never written to again.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from megacid.storage.atomic import file_sha256, fsync_dir, read_bounded, write_atomic

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_STEP = re.compile(r"step-([0-9]{8,15})")
MANIFEST_BYTES = 1 << 24
_COUNTS = {"world": 1 << 24, "num_classes": 1 << 40, "embed_dim": 1 << 24, "samples_seen": 1 << 62}  # largest
_GUARD_STEPS, _GUARD_LOSSES = 1000, 200  # kept by megacid.training.guard, at most


@dataclass(frozen=True)
class WrittenFile:
    """One file that a rank wrote: its name in the checkpoint, its size, the sha256 of the bytes handed to the disk."""

    name: str
    bytes: int
    sha256: str


def step_name(step: int) -> str:
    """Name of the checkpoint directory after `step` steps."""
    return f"step-{step:08d}"


def make_stage(root: Path, step: int) -> Path:
    """Create an empty stage directory below `root`.

    Its name is unique: a rank of an earlier start whose disk hung may still be writing to the stage of that start.
    """
    stage = root / f".tmp-{step_name(step)}-{time.time_ns():x}"
    stage.mkdir(parents=True)
    return stage


def remove(directory: Path) -> None:
    """Remove a directory as far as possible. Ignores errors, since a failing disk is often the reason to remove it."""
    shutil.rmtree(directory, ignore_errors=True)


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_WRITE_BYTES = 1 << 24


def write_tensors(
    stage: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, *, step: int = 0
) -> WrittenFile:
    """Write one safetensors file into the stage, fsync it, and hash the bytes handed to the disk.

    Tensors are copied to the host one at a time. The writer of the safetensors library copies all tensors of a file to
    the host before it writes the first, and neither hashes nor syncs.

    Args:
        stage: directory of the checkpoint to be.
        tensors: name -> tensor on any device.
        metadata: of the file's header.
        step: passed to the failpoints.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
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


def publish(root: Path, stage: Path, step: int, files: list[WrittenFile], fields: dict[str, Any]) -> Path:
    """Write the manifest and rename the stage. Runs on rank 0 alone.

    Args:
        files: of all ranks.
        fields: further fields of the manifest, JSON-able.

    Returns:
        The published directory.

    Raises:
        OSError: nothing was published.
    """
    for file in files:
        path = stage / file.name
        if (size := path.stat().st_size) != file.bytes:
            raise OSError(f"{path} has {size} bytes, expected the {file.bytes} that were written")
    manifest = {
        **fields,
        "format": FORMAT_VERSION,
        "step": step,
        "files": [vars(file) for file in sorted(files, key=lambda f: f.name)],
    }
    failpoint("store:before_manifest", step=step)
    write_atomic(stage / MANIFEST, seal(manifest))
    return rename_stage(root, stage, step)


def rename_stage(root: Path, stage: Path, step: int) -> Path:
    """Give a stage that has all files and its manifest the name of a checkpoint, and return the directory."""
    fsync_dir(stage)
    final = root / step_name(step)
    if os.path.lexists(final):
        # Damaged, or abandoned by --resume PATH: moved aside, never overwritten.
        final.rename(root / f".replaced-{final.name}-{time.time_ns():x}")
    failpoint("store:before_rename", step=step)
    os.replace(stage, final)
    fsync_dir(root)
    return final


def seal(manifest: dict[str, Any]) -> bytes:
    """The bytes of manifest.json: canonical JSON with its own sha256, so that any flipped byte is detected."""
    body = json.dumps(manifest, indent=1, sort_keys=True)
    sealed = {"manifest": manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode()


def prune(root: Path, keep_last: int, *, step: int) -> None:
    """Remove checkpoints older than `step`, just published, except the newest `keep_last` valid ones. Rank 0 alone.

    Damaged checkpoints are kept and not counted, since they would displace ones that the run can resume from. So are
    checkpoints of later steps, left over from before --resume PATH. Raises OSError.
    """
    for left in root.glob(".tmp-pruned-*"):
        remove(left)
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


def remove_stages(root: Path) -> None:
    """Remove the stage directories of saves that were killed."""
    for path in root.glob(".tmp-*"):
        if path.is_dir() and not path.is_symlink():
            remove(path)
        else:
            path.unlink(missing_ok=True)


def list_steps(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every published checkpoint, oldest first, without verification."""
    steps = []
    for path in root.iterdir() if root.is_dir() else ():
        step = step_of(path.name)
        if step is not None and path.is_dir():
            steps.append((step, path))
    return sorted(steps)


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint directory; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def read_manifest(directory: Path, *, to_resume: bool = False) -> dict[str, Any]:
    """Read the manifest of one checkpoint. Raises ValueError with the defect, whatever the file holds.

    to_resume: as of `verify`.
    """
    path = directory / MANIFEST
    data = None
    try:
        if _size_of_file(path) is not None:
            data = read_bounded(path, MANIFEST_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {str(error)[:200]}") from None
    if data is None:
        raise ValueError(f"{directory} has no {MANIFEST}")
    return parse_manifest(data, str(directory), step_of(directory.name), to_resume=to_resume)


def parse_manifest(
    data: bytes, directory: str, expected_step: int | None, *, to_resume: bool = False
) -> dict[str, Any]:
    """The manifest with the bytes `data`. Raises ValueError with the defect, whatever they are.

    Args:
        directory: for messages.
        expected_step: by the name of the directory; None: any.
        to_resume: as of `verify`.
    """
    path = f"{directory}/{MANIFEST}"
    try:
        manifest = json.loads(data)["manifest"]
        sealed = seal(manifest)
        version, step, files = manifest.get("format"), manifest.get("step"), manifest.get("files")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {str(error)[:200] or type(error).__name__}") from None
    if data != sealed:
        raise ValueError(f"{path}: its sha256 does not match its content")
    if version != FORMAT_VERSION:
        raise ValueError(f"{directory} has format {version!r}, expected {FORMAT_VERSION}")
    if not _is_count(step, 10**15) or expected_step not in (None, step):
        raise ValueError(f"{path} has step {step!r}, expected that of its directory {directory.rpartition('/')[2]}")
    if not isinstance(files, list) or not files or not all(map(_is_file_entry, files)):
        raise ValueError(f"{path} lists entries that cannot be files of a checkpoint")
    names = [file["name"] for file in files]
    if len(set(names)) != len(names):
        raise ValueError(f"{path} lists a file twice")
    largest = {**_COUNTS, "updates": step}
    for key in largest.keys() & manifest.keys():
        if not _is_count(manifest[key], largest[key]):
            raise ValueError(
                f"{path} has {key} {str(manifest[key])[:50]}, expected an integer from 0 to {largest[key]}"
            )
    if "guard" in manifest and not _is_guard_state(manifest["guard"], step):
        raise ValueError(f"{path} has guard {str(manifest['guard'])[:100]}, which is not the state of the guard")
    if to_resume and (missing := [key for key in ("updates", "guard") if key not in manifest]):
        raise ValueError(f"{path} has no {' and no '.join(missing)}")
    return dict(manifest)


def _is_count(value: Any, largest: int) -> bool:
    return type(value) is int and 0 <= value <= largest


def _is_guard_state(state: Any, step: int) -> bool:
    """Whether `state` is what `Guard.state` returns after at most `step` steps."""
    if not isinstance(state, dict) or state.keys() != {"skipped", "consecutive", "recent", "losses"}:
        return False
    recent, losses = state["recent"], state["losses"]
    if not isinstance(recent, list) or not isinstance(losses, list):
        return False
    counts = [state["skipped"], state["consecutive"], *recent]
    return (
        len(recent) <= _GUARD_STEPS
        and len(losses) <= _GUARD_LOSSES
        and all(_is_count(count, step) for count in counts)
        and all(type(loss) is float and math.isfinite(loss) for loss in losses)
    )


def _is_file_entry(entry: Any) -> bool:
    """Whether an entry is {"name", "bytes", "sha256"} with a name inside the directory."""
    if not isinstance(entry, dict) or entry.keys() != {"name", "bytes", "sha256"}:
        return False
    name, size, digest = entry["name"], entry["bytes"], entry["sha256"]
    good_name = isinstance(name, str) and re.fullmatch(r"[\w][\w.-]*", name) is not None and name != MANIFEST
    return good_name and _is_count(size, 1 << 62) and isinstance(digest, str)


def verify(directory: Path, *, hashes: bool = True, to_resume: bool = False) -> dict[str, Any]:
    """Check the size and, with `hashes`, the sha256 of every file. Returns the manifest. Raises ValueError.

    to_resume: whether the fields that training continues from must be there, not only those that export needs.
    """
    manifest = read_manifest(directory, to_resume=to_resume)
    for file in manifest["files"]:
        if (problem := file_problem(directory, file, hashes=hashes)) is not None:
            raise ValueError(problem)
    return manifest


def file_problem(directory: Path, file: dict[str, Any], *, hashes: bool = True) -> str | None:
    """What differs between a file of a checkpoint and its entry in the manifest; None for nothing."""
    path = directory / file["name"]
    try:
        size = _size_of_file(path)
        if size is None:
            return f"{path} is missing, expected {file['bytes']} bytes"
        if size != file["bytes"]:
            return f"{path} has {size} bytes, expected {file['bytes']} bytes"
        digest = file_sha256(path) if hashes else file["sha256"]
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if digest != file["sha256"]:
        return f"{path} has sha256 {digest[:16]}..., expected {file['sha256'][:16]}..."
    return None


def _size_of_file(path: Path) -> int | None:
    """Size of a regular file; None for anything else, since opening a pipe would block."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def newest_valid(root: Path, *, to_resume: bool = False) -> tuple[Path | None, list[str]]:
    """(directory of the newest checkpoint that verifies, or None; one message for each newer one that does not)."""
    problems: list[str] = []
    for _, path in reversed(list_steps(root)):
        try:
            verify(path, to_resume=to_resume)
            return path, problems
        except ValueError as error:
            problems.append(str(error))
    return None, problems
