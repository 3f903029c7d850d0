"""What a checkpoint holds, by name and by global row, so that any number of ranks can read it.

    student-00000.safetensors      of each rank: whole tensors "param/NAME", "exp_avg/NAME", "exp_avg_sq/NAME", "buffer/NAME"; parameter i is
                                   written by rank i % world
    classifier-00000.safetensors   of each rank: rows [start, stop) of "head/..." and "optimizer/...", bounds in the metadata
    manifest.json                  step, number of classes, which file holds what, sizes, sha256

Random numbers need no state: order, augmentation, class sampling are pure functions of seed and step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from megacid.checkpoint import store
from megacid.errors import UserError

PREFIX = "clip."
"""Student parameters are saved under the names that open_clip gives them."""


class NamedState(Protocol):
    """The part of the engine that a checkpoint needs."""

    def named_state(self) -> Any: ...
    def named_buffers(self) -> dict[str, Tensor]: ...
    def load_named_state(self, state: Callable[[str, str], Tensor], step: int) -> None: ...
    def load_buffers(self, buffers: dict[str, Tensor]) -> None: ...


class RowState(Protocol):
    """The classifier, or its optimizer: tensors whose first dimension is this rank's classes."""

    def state_rows(self) -> dict[str, Tensor]: ...
    def load_state_rows(self, read: Callable[[str, int, int], Tensor]) -> None: ...


class CheckpointReader:
    """Tensors of one published checkpoint by name, and classifier rows by global row."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, store.read_manifest(directory)
        self._where: dict[str, Path] = {}
        self._read: set[str] = set()
        self._rows: list[tuple[int, int, Path]] = []
        for file in self.manifest["files"]:
            path = directory / file["name"]
            with safe_open(path, "pt") as handle:
                if file["name"].startswith("classifier-"):
                    facts = handle.metadata()
                    self._rows.append((int(facts["start"]), int(facts["stop"]), path))
                else:
                    self._where |= dict.fromkeys(handle.keys(), path)
        self._rows.sort()

    def names(self, kind: str) -> list[str]:
        return [name.removeprefix(kind + "/") for name in self._where if name.startswith(kind + "/")]

    def row_names(self) -> list[str]:
        """Names of what is saved by global row: "head/weight", "optimizer/exp_avg", ...; empty without a classifier."""
        if not self._rows:
            return []
        with safe_open(self._rows[0][2], "pt") as handle:
            return sorted(handle.keys())

    def unread(self) -> list[str]:
        """What the checkpoint holds and nobody has asked for."""
        return sorted((self._where.keys() | set(self.row_names())) - self._read)

    def tensor(self, kind: str, name: str) -> Tensor:
        self._read.add(f"{kind}/{name}")
        try:
            path = self._where[f"{kind}/{name}"]
        except KeyError:
            raise UserError(
                f"{self.directory} has no {kind} of parameter {name}: it was saved by a run with another student"
            ) from None
        with safe_open(path, "pt") as handle:
            return handle.get_tensor(f"{kind}/{name}")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Global rows [start, stop) of `name` ("head/weight", "optimizer/exp_avg", ...), whoever wrote them."""
        self._read.add(name)
        parts = []
        for first, last, path in self._rows:
            lo, hi = max(start, first), min(stop, last)
            if lo < hi:
                with safe_open(path, "pt") as handle:
                    if name not in handle.keys():  # noqa: SIM118  (no mapping)
                        raise UserError(
                            f"{self.directory} has no {name}: it was saved by another version, or with other settings of the classifier's "
                            "optimizer; give the run the same ones"
                        )
                    parts.append(handle.get_slice(name)[lo - first : hi - first])
        out = torch.cat(parts) if parts else torch.empty(0)
        if out.shape[0] != stop - start:
            raise UserError(
                f"{self.directory} has {out.shape[0]} of the classifier rows {start} to {stop}: it belongs to another number of classes"
            )
        return out


def restore(directory: Path, engine: NamedState, rows: dict[str, RowState], facts: dict[str, Any]) -> int:
    """Load everything from `directory`; returns its step. Shapes that differ, and names that only the checkpoint or only
    the run has, are UserErrors. A collective."""
    reader = CheckpointReader(directory)
    for key in ("num_classes", "embed_dim"):
        if reader.manifest.get(key) != facts.get(key):
            raise UserError(
                f"{directory} has {key} {reader.manifest.get(key)}, this run has {facts.get(key)}: start another run, or correct data.labels"
            )
    engine.load_named_state(
        lambda name, kind: reader.tensor(kind, name.removeprefix(PREFIX)), int(reader.manifest["updates"])
    )
    engine.load_buffers({name: reader.tensor("buffer", name.removeprefix(PREFIX)) for name in engine.named_buffers()})
    for part, owner in rows.items():
        owner.load_state_rows(lambda name, start, stop, part=part: reader.rows(f"{part}/{name}", start, stop))  # type: ignore[misc]
    if unread := reader.unread():
        raise UserError(
            f"{directory} holds {', '.join(unread[:5])}{' and more' if len(unread) > 5 else ''}, for which this run has no "
            "place: it was saved by a run with another student or optimizer, or by another version; give the run the same"
        )
    return int(reader.manifest["step"])


def load_student_tensors(directory: str | Path) -> dict[str, Tensor]:
    """The student alone: fp32 parameters and buffers under open_clip's names."""
    directory = Path(directory)
    try:
        store.verify(directory)
    except ValueError as error:
        raise UserError(f"not a whole checkpoint: {error}; choose another step") from None
    reader = CheckpointReader(directory)
    return {name: reader.tensor(kind, name) for kind in ("param", "buffer") for name in reader.names(kind)}
