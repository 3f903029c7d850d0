"""What a checkpoint holds, by name and by global row, so that any number of ranks can read it.

    student-00000.safetensors      of each rank: whole tensors "param/NAME", "exp_avg/NAME", "exp_avg_sq/NAME", "buffer/NAME"; parameter i is
                                   written by rank i % world
    classifier-00000.safetensors   of each rank: rows [start, stop) of "head/..." and "optimizer/...", bounds in the metadata
    manifest.json                  step, number of classes, which file holds what, sizes, sha256

Random numbers need no state: order, augmentation, class sampling are pure functions of seed and step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from megacid.checkpoint import store
from megacid.distributed.collectives import Group, barrier, broadcast_json, gather_json, rank, world_size
from megacid.errors import UserError

log = logging.getLogger(__name__)
_PREFIX = "clip."
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


def save_checkpoint(
    root: Path,
    step: int,
    engine: NamedState,
    rows: dict[str, RowState],
    row_range: tuple[int, int],
    facts: dict[str, Any],
    *,
    keep_last: int,
    group: Group = None,
) -> Path | None:
    """Write and publish `root/step-...` together; returns it, or None when a rank could not write (the old ones stay).

    rows: {"head": classifier, "optimizer": its optimizer}, or empty. row_range: this rank's classes. A collective.
    """
    began = time.perf_counter()
    if rank(group) == 0:
        store.make_stage(root, step)
    barrier(group)
    stage = root / f".tmp-{store.step_name(step)}"
    report: dict[str, Any] = {"error": None, "files": []}
    # Collectives first, files afterwards: a full disk on one rank must not leave the others waiting inside a collective.
    student = _own_student_tensors(engine, group)
    try:
        me = rank(group)
        written = [store.write_tensors(stage, f"student-{me:05d}.safetensors", student)]
        if rows:
            own = {
                f"{part}/{name}": value for part, owner in rows.items() for name, value in owner.state_rows().items()
            }
            bounds = {"start": str(row_range[0]), "stop": str(row_range[1])}
            written.append(store.write_tensors(stage, f"classifier-{me:05d}.safetensors", own, bounds))
        report["files"] = [vars(file) for file in written]
    except OSError as error:
        report["error"] = f"rank {rank(group)}: {error}"
    reports = gather_json(report, group)
    errors = [r["error"] for r in reports if r["error"]]
    final = None
    if rank(group) == 0:
        final = _finish(root, stage, step, reports, errors, facts, keep_last)
    published = broadcast_json(final is not None, group)
    if rank(group) == 0 and final is not None:
        size = sum(f["bytes"] for r in reports for f in r["files"])
        seconds = time.perf_counter() - began
        log.info("saved %s: %.1f MiB in %.2f s (%.0f MiB/s)", final, size / 2**20, seconds, size / 2**20 / seconds)
    return root / store.step_name(step) if published else None


def _finish(
    root: Path, stage: Path, step: int, reports: list[Any], errors: list[str], facts: dict[str, Any], keep_last: int
) -> Path | None:
    try:
        if errors:
            raise OSError("; ".join(errors))
        files = [store.WrittenFile(**file) for report in reports for file in report["files"]]
        return store.publish(root, stage, step, files, facts, keep_last)
    except OSError as error:
        log.warning("could not save step %d, the older checkpoints stay: %s", step, error)
        store.sweep_stages(root)
        return None


def _own_student_tensors(engine: NamedState, group: Group) -> dict[str, Tensor]:
    me, world = rank(group), world_size(group)
    own: dict[str, Tensor] = {}
    for i, (name, tensors) in enumerate(engine.named_state()):
        if i % world == me:
            own |= {f"{kind}/{name.removeprefix(_PREFIX)}": value for kind, value in tensors.items()}
    if me == 0:
        own |= {f"buffer/{name.removeprefix(_PREFIX)}": value for name, value in engine.named_buffers().items()}
    return own


class CheckpointReader:
    """Tensors of one published checkpoint by name, and classifier rows by global row."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, store.read_manifest(directory)
        self._where: dict[str, Path] = {}
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

    def tensor(self, kind: str, name: str) -> Tensor:
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
        out = torch.cat(parts)
        if out.shape[0] != stop - start:
            raise UserError(
                f"{self.directory} has {out.shape[0]} of the classifier rows {start} to {stop}: it belongs to another number of classes"
            )
        return out


def restore(directory: Path, engine: NamedState, rows: dict[str, RowState], facts: dict[str, Any]) -> int:
    """Load everything from `directory`; returns its step. Shape or name mismatches are UserErrors. A collective."""
    reader = CheckpointReader(directory)
    for key in ("num_classes", "embed_dim"):
        if reader.manifest.get(key) != facts.get(key):
            raise UserError(
                f"{directory} has {key} {reader.manifest.get(key)}, this run has {facts.get(key)}: start another run, or correct data.labels"
            )
    engine.load_named_state(
        lambda name, kind: reader.tensor(kind, name.removeprefix(_PREFIX)), int(reader.manifest["updates"])
    )
    engine.load_buffers({_PREFIX + name: reader.tensor("buffer", name) for name in reader.names("buffer")})
    for part, owner in rows.items():
        owner.load_state_rows(lambda name, start, stop, part=part: reader.rows(f"{part}/{name}", start, stop))  # type: ignore[misc]
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
