"""A mirror: whole checkpoints of a run at a URL.

    URL/config.json                       that of the run, by which a mirror of another run is recognised
    URL/step-00001000/*.safetensors       each copied by the rank that wrote it
    URL/step-00001000/manifest.json       copied last: without it there is no checkpoint

A checkpoint here has the same files as in the run directory. What a killed process leaves has no manifest.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megacid.checkpoint import store
from megacid.checkpoint.verification import share_of_files
from megacid.distributed.divided_work import Workers
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.storage import object_store
from megacid.storage.atomic import SETTINGS_BYTES, disk_errors, write_atomic
from megacid.storage.object_store import ObjectDiffers, Purpose, RemoteError

log = logging.getLogger(__name__)

CONFIG = "config.json"
_WRITE = Purpose("written", "remove it", "free space there")
_READ = Purpose("read", "an older checkpoint is used", "free space on the disk of the run directory")


class Mirror:
    """Reads and writes the checkpoints at `url`. Methods are for one rank unless they say otherwise.

    Each may raise RemoteError, after the retries of `object_store`.

    Args:
        url: of a folder in any store that fsspec can write, or a local path.
        keep_last: number of newest checkpoints that stay.
    """

    def __init__(self, url: str, *, keep_last: int) -> None:
        self.url, self.keep_last = url.rstrip("/"), keep_last
        if url.startswith(("http://", "https://")):
            raise UserError(
                f'"megacid.run.checkpoint_mirror" is {url}, expected a store that can be written: name an s3://, gs:// '
                "or hf:// URL or a path"
            )

    def directory(self, step: int) -> str:
        """URL of a checkpoint."""
        return f"{self.url}/{store.step_name(step)}"

    # ---- at the start ------------------------------------------------------------------------------------------

    def read_config(self) -> bytes | None:
        """The config.json of the run whose mirror it is; None for a new one."""
        return object_store.read(f"{self.url}/{CONFIG}", SETTINGS_BYTES, _READ)

    def steps(self) -> list[int]:
        """The steps that have a manifest, oldest first, without verification."""
        return [step for step, files in sorted(self._folders().items()) if store.MANIFEST in files]

    def fetch(self, step: int, root: Path, workers: Workers) -> str | None:
        """Copy a checkpoint into the run directory `root`, which gets the config.json of the mirror if it has none.

        The ranks divide the files, and check size and sha256 of each. A collective.

        Returns:
            Why the checkpoint cannot be used, the same on every rank; None for one that is in the run directory now.
        """
        log.info("fetching %s", self.directory(step))
        with contextlib.ExitStack() as stack:
            problem: str | None = None
            stage: Path | None = None
            files: list[dict[str, Any]] = []
            with workers.together():
                if workers.rank == 0:
                    try:
                        stage, files = self._make_stage(step, root)
                        stack.callback(store.remove, stage)  # after the rename there is nothing to remove
                    except ValueError as error:
                        if isinstance(error, UserError):
                            raise
                        problem = str(error)
            problem, name, files = workers.broadcast([problem, stage and stage.name, files])
            if problem is not None:
                return str(problem)
            fetch = partial(_fetch_file, self.directory(step), root / name)
            found = workers.divide(fetch, {n: files[n] for n in share_of_files(files, workers)}, 0)
            problem = next((problem for _, problem in sorted(found.items()) if problem is not None), None)
            with workers.together():
                if stage is not None and problem is None:
                    self._publish(stage, step, root)
        return problem

    def _make_stage(self, step: int, root: Path) -> tuple[Path, list[dict[str, Any]]]:
        """A stage directory with the manifest alone, and the files to be fetched. ValueError for a damaged manifest."""
        url = self.directory(step)
        data = object_store.read(f"{url}/{store.MANIFEST}", store.MANIFEST_BYTES, _READ)
        if data is None:
            raise ValueError(f"{url} has no {store.MANIFEST}")
        files = store.parse_manifest(data, url, step, to_resume=True)["files"]
        with disk_errors(root):
            stage = store.make_stage(root, step)
            write_atomic(stage / store.MANIFEST, data)
        return stage, list(files)

    def _publish(self, stage: Path, step: int, root: Path) -> None:
        failpoint("mirror:fetched", step=step)
        config = None if (root / CONFIG).exists() else self.read_config()
        with disk_errors(root):
            if config is not None:
                write_atomic(root / CONFIG, config)
            store.rename_stage(root, stage, step)

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, since the next start would use them."""
        for later in (number for number in self.steps() if number > step):
            self._remove(later)
            log.warning("going back to step %d: removed %s", step, self.directory(later))

    def put_config(self, root: Path) -> None:
        """Make this the mirror of the run in the directory `root`, which finds out whether the URL can be written."""
        object_store.upload(root / CONFIG, f"{self.url}/{CONFIG}", _WRITE)

    # ---- while training ----------------------------------------------------------------------------------------

    def put(self, path: Path, step: int) -> None:
        """Copy a file of a checkpoint. Raises OSError for a file that cannot be read."""
        failpoint("mirror:file", step=step)
        object_store.upload(path, f"{self.directory(step)}/{path.name}", _WRITE)

    def commit(self, directory: Path, step: int) -> None:
        """Copy the manifest, when all other files of the checkpoint are there; then remove old checkpoints."""
        failpoint("mirror:before_manifest", step=step)
        self.put(directory / store.MANIFEST, step)
        failpoint("mirror:after_manifest", step=step)
        try:
            self.prune(step)
        except RemoteError as error:  # the new checkpoint is there
            log.warning("could not remove an old checkpoint at %s: %s", self.url, error)

    def prune(self, step: int) -> None:
        """Remove checkpoints before `step`, just copied, except the newest `keep_last`, as `store.prune` does.

        Damaged ones are kept and not counted. Folders without a manifest are of copies that have failed.
        """
        older = {number: files for number, files in sorted(self._folders().items()) if number <= step}
        partial_copies = [number for number, files in older.items() if store.MANIFEST not in files and number < step]
        whole = [number for number in older if number not in partial_copies and self._has_its_sizes(number, older)]
        for number in (*partial_copies, *whole[: -self.keep_last]):
            self._remove(number)

    def _has_its_sizes(self, step: int, folders: dict[int, dict[str, int | None]]) -> bool:
        url, sizes = self.directory(step), folders[step]
        data = object_store.read(f"{url}/{store.MANIFEST}", store.MANIFEST_BYTES, _READ)
        try:
            files = store.parse_manifest(data or b"", url, step)["files"]
        except ValueError:
            return False
        return all(sizes.get(file["name"]) == file["bytes"] for file in files)

    def _remove(self, step: int) -> None:
        # The manifest first: a half-removed folder must not look like a checkpoint.
        object_store.remove(f"{self.directory(step)}/{store.MANIFEST}", _WRITE)
        object_store.remove(self.directory(step), _WRITE)

    def _folders(self) -> dict[int, dict[str, int | None]]:
        """Step -> sizes of the files by name, for every folder with the name of a checkpoint."""
        return {step: object_store.list_folder(self.directory(step), _READ) for step in self._steps_listed()}

    def _steps_listed(self) -> Iterator[int]:
        for name, size in object_store.list_folder(self.url, _READ).items():
            if size is None and (step := store.step_of(name)) is not None:
                yield step


def _fetch_file(url: str, stage: Path, file: dict[str, Any]) -> str | None:
    """Copy a file of a checkpoint into the stage. Returns what differs from its entry in the manifest."""
    path = stage / file["name"]
    try:
        object_store.download(f"{url}/{file['name']}", path, file["bytes"], file["sha256"], purpose=_READ)
    except ObjectDiffers as error:
        return str(error)
    with disk_errors(path), open(path, "rb+") as handle:
        os.fsync(handle.fileno())
    return None
