"""Output directories of the offline stages: begin, resume, finish, and partial results.

    OUT/settings.json   the arguments and inputs that decide the result; written first
    OUT/.work/          partial results of an unfinished stage
    OUT/meta.json       written last: its presence says that the stage is complete
    OUT/.lock           locked by the first rank while it writes, so a second tool on the same directory is refused

One rule for all tools: the same command continues an interrupted stage, and repairs or keeps a finished one. A
directory that was started with other arguments or inputs is refused; nothing in it is touched.
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
from megacid.storage.atomic import disk_errors, read_json, remove_temporary_files, write_json_atomic, write_text
from megacid.storage.directory_lock import DirectoryLock
from megacid.storage.metadata import read_meta, write_meta
from megacid.storage.npy import read_array, write_array

log = logging.getLogger(__name__)
WORK, LOCK = ".work", ".lock"


class StageDirectory:
    """The output directory of one stage. All ranks may call `finished`; one rank calls the other methods."""

    def __init__(
        self,
        path: Path,
        made_by: str,
        arguments: dict[str, Any],
        *,
        notes: dict[str, Any] | None = None,
        command: str | None = None,
    ) -> None:
        """
        Args:
            made_by: Name of the stage in meta.json.
            arguments: JSON-able, everything that decides the result.
            notes: JSON-able, what decides the last bit at most: another value is a warning.
            command: The tool as its user calls it, for messages; None: tools/`made_by`.py.
        """
        self.path, self.made_by, self.arguments, self.notes = path, made_by, arguments, notes or {}
        self.command = command or f"tools/{made_by}.py"
        self.work = PartialResults(path, arguments)
        self._lock: DirectoryLock | None = None

    def finished(self) -> dict[str, Any] | None:
        """meta.json of a finished stage; None where there is none, or a damaged one (with a warning).

        Raises:
            UserError: the directory holds something else, or was started with other arguments.
        """
        self._check()
        return finished_meta(self.path, self.made_by)

    def begin(self) -> None:
        """Make and lock the directory, remove temporary files and meta.json, record the arguments.

        Raises:
            UserError: as `finished`, or another process writes to the directory.
        """
        self._check()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(self.path / LOCK, str(self.path), "take another output directory")
        stored = self._check()  # another process may have finished in the meantime
        for name, value in self.notes.items():
            if stored and stored.get(name) != value:
                log.warning(
                    "%s was started with %s %s, this run has %s: finished parts are kept, last bits may differ",
                    *(self.path, name, stored.get(name), value),
                )
        with disk_errors(self.path):
            remove_temporary_files(self.path)
            settings = {"made_by": self.made_by, **self.arguments, **self.notes}
            write_json_atomic(self.path / "settings.json", stored or settings)
            (self.path / "meta.json").unlink(missing_ok=True)

    def commit(self, source: dict[str, Any], **facts: Any) -> None:
        """Write meta.json, which completes the stage.

        Args:
            source: Where the inputs are.
            facts: What the next stage needs to know or checks.
        """
        failpoint(f"{self.made_by}:before_meta")
        with disk_errors(self.path / "meta.json"):
            write_meta(self.path, self.made_by, source, **facts)
        failpoint(f"{self.made_by}:after_meta")
        self.remove_partial_results()
        if self._lock is not None:
            self._lock.release()

    def remove_partial_results(self) -> None:
        """Remove what only an unfinished stage needs, also the lock file of a killed process."""
        if self._lock is None and (self.path / LOCK).exists():
            try:
                DirectoryLock(self.path / LOCK, str(self.path), "take another output directory").release()
            except (UserError, OSError):  # another process writes to the directory, or it is read-only
                return
        self.work.remove()
        remove_temporary_files(self.path)

    def _check(self) -> dict[str, Any] | None:
        """The recorded settings; None for an empty or missing directory."""
        path = self.path / "settings.json"
        stored = read_json(path)
        remedy = "take another output directory, or delete it"
        if not isinstance(stored, dict):
            if path.exists():
                raise UserError(f"{path} is damaged, expected the arguments of {self.command}: {remedy}")
            if (self.path / "meta.json").exists() and read_meta(self.path).get("made_by") == self.made_by:
                raise UserError(f"{self.path} was written by an earlier version of {self.command}: {remedy}")
            if self.path.is_dir() and any(not entry.name.startswith((".tmp-", LOCK)) for entry in self.path.iterdir()):
                raise UserError(f"{self.path} is not empty and was not made by {self.command}: {remedy}")
            return None
        expected = {"made_by": self.made_by, **json.loads(json.dumps(self.arguments))}
        for name in dict.fromkeys([*expected, *stored]):
            if name not in self.notes and stored.get(name) != expected.get(name):
                raise UserError(
                    f"{self.path} was made with {name} {stored.get(name)!r}, this run has {expected.get(name)!r}: "
                    f"{remedy}"
                )
        return stored


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `out` that replaces `out` when the block ends without an error.

    Removes the hidden folders of killed runs. Raises UserError when the disk is full or not writable, or another
    process is writing the same folder.
    """
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock(out.with_name(f".{out.name}{LOCK}"), str(out), "take another output directory")
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
            lock.release()


def finished_meta(out: Path, tool: str) -> dict[str, Any] | None:
    """meta.json of a finished stage; None when it is missing, or damaged (with a warning)."""
    path = out / "meta.json"
    if not path.exists():
        return None
    if read_json(path) is None:
        log.warning("%s is damaged: doing this stage again where needed", path)
        return None
    return read_meta(out, expect=tool)


class PartialResults:
    """Intermediate results in OUT/.work: only whole files, and only of the same arguments and inputs.

    One rank calls `begin`, then all ranks read and write; `remove` when the stage is done.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        """fingerprint: JSON-able, everything that decides the result."""
        self.folder, self.fingerprint = out / WORK, fingerprint

    def begin(self) -> None:
        """Make the folder. Results of another fingerprint are removed, with a warning."""
        path = self.folder / "settings.json"
        before = read_json(path)
        if before is not None and before != self.fingerprint:
            old = before if isinstance(before, dict) else {}
            changed = [name for name, value in self.fingerprint.items() if old.get(name) != value]
            log.warning(
                "%s holds partial results of other arguments or inputs (%s): starting again",
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
