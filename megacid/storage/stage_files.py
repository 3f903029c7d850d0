"""Files of a stage: written whole or not at all, with one line about the disk when that fails; partial results.

A stage that is killed may leave temporary files and partial results; the next run removes or uses them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.storage.atomic import atomic_path, read_json, write_json_atomic
from megacid.storage.metadata import read_meta
from megacid.storage.npy import load_npy, write_npy

log = logging.getLogger(__name__)
WORK = ".work"


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """An OSError of the block becomes a UserError that names `path`: the disk is full, or may not be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error}): free space on that disk or correct its permissions, and run the same "
            "command again; what was complete is kept"
        ) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`atomic_path` with `disk_errors`: yields the temporary name; no reading inside."""
    with disk_errors(path), atomic_path(path) as temporary:
        yield temporary
        failpoint("offline:file", path=path)


def write_array(path: Path, array: np.ndarray) -> None:
    """A .npy without pickles, atomic and durable."""
    with writing(path) as temporary, open(temporary, "wb") as file:
        write_npy(file, array.dtype, array.shape, [array])


def write_text(path: Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text)


def read_array(path: Path, shape: tuple[int | None, ...], kind: str) -> np.ndarray | None:
    """A memory map of the array; None when the file is missing, cut off, or not of that shape (None: any) and dtype kind."""
    try:
        array = load_npy(path, "it is made again")
    except UserError:
        return None
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape))
    return array if fits and array.dtype.kind == kind else None


def remove_temporary_files(out: Path) -> None:
    """Remove the temporary files that a killed run left in a stage directory and the folders in it."""
    for pattern in (".tmp-*", "*/.tmp-*"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `out`, which takes its place (or the place of an older one) when the block ends well.

    Removes the hidden folders of runs that were killed. UserError when the disk does not take it.
    """
    for left in out.parent.glob(f".{out.name}.tmp-*"):
        with contextlib.suppress(ValueError, PermissionError):
            try:
                os.kill(int(left.name.rpartition("-")[2]), 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)
    stage = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    with disk_errors(out):
        stage.mkdir(parents=True)
        try:
            yield stage
            failpoint("offline:folder", path=out)
            if out.exists():
                shutil.rmtree(out)
            os.replace(stage, out)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def finished_meta(out: Path, tool: str) -> dict[str, Any] | None:
    """meta.json of a stage that has one; None when it is missing, or damaged (with a warning): then the stage is not done."""
    if not (out / "meta.json").exists():
        return None
    try:
        return read_meta(out, expect=tool)
    except UserError as error:
        try:
            json.loads((out / "meta.json").read_text())
        except (ValueError, RecursionError):
            log.warning("%s is damaged: doing this stage again where needed", out / "meta.json")
            return None
        raise error


class PartialResults:
    """What a stage has worked out so far, in OUT/.work: only whole files, and only of the same arguments and inputs.

    Made on one rank with `begin`, then used by all; `remove` when the stage is done.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        """fingerprint: JSON-able, everything that decides the result."""
        self.folder, self.fingerprint = out / WORK, fingerprint

    def begin(self) -> None:
        """Drop what was made with other arguments, with a warning, and make the folder."""
        path = self.folder / "settings.json"
        before = read_json(path)
        if before is not None and before != self.fingerprint:
            old = before if isinstance(before, dict) else {}
            changed = [name for name, value in self.fingerprint.items() if old.get(name) != value]
            log.warning(
                "%s holds partial results of other arguments or inputs (%s): starting afresh",
                self.folder,
                ", ".join(changed) or "more of them",
            )
        if before != self.fingerprint:
            shutil.rmtree(self.folder, ignore_errors=True)
            with disk_errors(path):
                write_json_atomic(path, self.fingerprint)
        remove_temporary_files(self.folder)

    def json(self, name: str) -> Any:
        """What was stored under that name; None when it is missing or damaged."""
        return read_json(self.folder / f"{name}.json")

    def save_json(self, name: str, value: Any) -> None:
        write_text(self.folder / f"{name}.json", json.dumps(value))

    def array(self, name: str, shape: tuple[int | None, ...], kind: str) -> np.ndarray | None:
        return read_array(self.folder / f"{name}.npy", shape, kind)

    def save_array(self, name: str, array: np.ndarray) -> None:
        write_array(self.folder / f"{name}.npy", array)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
