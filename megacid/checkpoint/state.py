"""Contents of a checkpoint, by name and by global row, which any number of ranks can read.

    student-00000.safetensors      one per rank: whole tensors "param/NAME", "exp_avg/NAME" and the other state of the
                                   optimizer, "buffer/NAME", and "ema/NAME" with student.ema_decay; rank i % world
                                   writes parameter i
    classifier-00000.safetensors   one per rank: rows [start, stop) of "head/..." and "optimizer/...", bounds in the
                                   metadata
    manifest.json                  step, number of classes, and name, size and sha256 of every file

Random generators have no state to save: sample order, augmentation, class sampling and dropout are functions of seed
and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacid.checkpoint import store
from megacid.distributed.collectives import Group
from megacid.distributed.consensus import fail_together
from megacid.errors import UserError

PREFIX = "clip."
"""Student parameters are saved under the names that open_clip gives them."""


class NamedState(Protocol):
    """The part of the engine that a checkpoint needs."""

    def named_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, {kind: copy on the host}) of every parameter; training may change the originals. A collective."""
        ...

    def named_buffers(self) -> dict[str, Tensor]: ...
    def load_named_state(self, state: Callable[[str, str], Tensor], step: int) -> None: ...
    def load_average(self, read: Callable[[str], Tensor] | None) -> None: ...
    def load_buffers(self, buffers: dict[str, Tensor]) -> None: ...


class RowState(Protocol):
    """The classifier or its optimizer: tensors whose first dimension is this rank's classes."""

    def state_rows(self) -> dict[str, Tensor]: ...
    def load_state_rows(self, read: Callable[[str, int, int], Tensor]) -> None: ...


class CheckpointReader:
    """Tensors of one published checkpoint by name, and classifier rows by global row."""

    def __init__(self, directory: Path) -> None:
        """Read names and shapes. Raises UserError when they are not those of a complete checkpoint."""
        self.directory = directory
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._rows: list[tuple[int, int, Path]] = []
        self._row_shapes: dict[str, tuple[int, ...]] = {}
        try:
            self.manifest: dict[str, Any] = store.read_manifest(directory)
            for file in self.manifest["files"]:
                self._add(directory / file["name"])
            self._rows.sort()
            bounds = [0, *(stop for _, stop, _ in self._rows)]
            starts, num_classes = [start for start, _, _ in self._rows], self.manifest.get("num_classes", 0)
            if starts != bounds[:-1] or bounds[-1] != num_classes:
                raise ValueError(
                    f"its classifier files end at rows {bounds[1:]}, expected each of {num_classes} rows once"
                )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{directory} cannot be read: {error!r}; choose another checkpoint") from None

    def _add(self, path: Path) -> None:
        with safe_open(path, "pt") as handle:
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
            if path.name.startswith("classifier-"):
                metadata = handle.metadata()
                start, stop = int(metadata["start"]), int(metadata["stop"])
                self._rows.append((start, stop, path))
                rows = {name: shape[1:] for name, shape in shapes.items() if shape[0] == stop - start}
                if len(rows) < len(shapes) or rows != (self._row_shapes or rows):
                    raise ValueError(f"{path.name} has other row tensors than its bounds or the other files imply")
                self._row_shapes = rows
            elif twice := sorted(shapes.keys() & self._shapes.keys()):
                raise ValueError(f"two files hold {twice[0]}")
            else:
                self._shapes |= shapes
                self._where |= dict.fromkeys(shapes, path)

    def names(self, kind: str) -> list[str]:
        """Names of the student's tensors of a kind: "param", "buffer", "ema" or a tensor of the optimizer's state."""
        return [name.removeprefix(kind + "/") for name in self._where if name.startswith(kind + "/")]

    def row_names(self) -> list[str]:
        """Names of the tensors stored by global row, such as "head/weight"; empty without a classifier."""
        return sorted(self._row_shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor; of tensors stored by global row, the shape of one row."""
        return self._shapes | self._row_shapes

    def tensor(self, kind: str, name: str) -> Tensor:
        """One whole tensor of the student, on the host. Raises UserError when it is missing."""
        try:
            path = self._where[f"{kind}/{name}"]
        except KeyError:
            raise UserError(
                f"{self.directory} has no {kind} of parameter {name}: it was saved by a run with another student"
            ) from None
        with safe_open(path, "pt") as handle:
            return handle.get_tensor(f"{kind}/{name}")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Global rows [start, stop) of `name` ("head/weight", "optimizer/exp_avg", ...), from any number of files.

        Rows of a single file, the usual case with an unchanged number of ranks, are memory-mapped.
        """
        if name not in self._row_shapes:
            raise UserError(
                f"{self.directory} has no {name}: it was saved by another version, or with other settings of the "
                "classifier's optimizer; use the same settings"
            )
        parts = []
        for first, last, path in self._rows:
            lo, hi = max(start, first), min(stop, last)
            if lo < hi or (first, last) == (start, stop):
                with safe_open(path, "pt") as handle:
                    parts.append(handle.get_slice(name)[lo - first : hi - first])
        out = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, *self._row_shapes[name])
        if out.shape[0] != stop - start:
            raise UserError(
                f"{self.directory} has {out.shape[0]} of the classifier rows {start} to {stop}, expected all: it has "
                "another number of classes"
            )
        return out


def restore(
    directory: Path, engine: NamedState, rows: dict[str, RowState], identity: dict[str, int], group: Group = None
) -> int:
    """Load a checkpoint into the engine and the class rows, and return its step. A collective.

    An EMA of the weights that the checkpoint lacks starts with the loaded weights; one that the run lacks is dropped.

    Args:
        rows: {"head": classifier, "optimizer": its optimizer}; empty without a classifier.
        identity: num_classes and embed_dim of the run.

    Raises:
        UserError: names or shapes of checkpoint and run differ; nothing was changed.
    """
    with fail_together(group):
        reader = CheckpointReader(directory)
        updates = _check_identity(reader, identity)
    expected = _shapes(engine, rows)
    with fail_together(group):
        _refuse_other_state(reader, expected)
    engine.load_named_state(lambda name, kind: reader.tensor(kind, name.removeprefix(PREFIX)), updates)
    has_average = bool(reader.names("ema"))
    engine.load_average((lambda name: reader.tensor("ema", name.removeprefix(PREFIX))) if has_average else None)
    engine.load_buffers({name: reader.tensor("buffer", name.removeprefix(PREFIX)) for name in engine.named_buffers()})
    for part, owner in rows.items():
        owner.load_state_rows(lambda name, start, stop, part=part: reader.rows(f"{part}/{name}", start, stop))  # type: ignore[misc]
    return int(reader.manifest["step"])


def _check_identity(reader: CheckpointReader, identity: dict[str, int]) -> int:
    """The number of updates before the checkpoint. Raises UserError when it has other classes or another width."""
    for key in ("num_classes", "embed_dim"):
        if reader.manifest.get(key) != identity.get(key):
            raise UserError(
                f"{reader.directory} has {key} {reader.manifest.get(key)}, expected {identity.get(key)} as in this "
                "run: start another run, or correct data.labels"
            )
    updates = reader.manifest.get("updates")
    if type(updates) is not int:
        raise UserError(
            f"{reader.directory} has updates {updates!r}, expected an integer: it was saved by another version"
        )
    return updates


def _shapes(engine: NamedState, rows: dict[str, RowState]) -> dict[str, tuple[int, ...]]:
    """What `CheckpointReader.shapes` gives for a checkpoint of this run. A collective."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensors in engine.named_state():
        shapes |= {f"{kind}/{name.removeprefix(PREFIX)}": tuple(value.shape) for kind, value in tensors.items()}
    shapes |= {f"buffer/{name.removeprefix(PREFIX)}": tuple(t.shape) for name, t in engine.named_buffers().items()}
    for part, owner in rows.items():
        shapes |= {f"{part}/{name}": tuple(value.shape[1:]) for name, value in owner.state_rows().items()}
    return shapes


def _refuse_other_state(reader: CheckpointReader, expected: dict[str, tuple[int, ...]]) -> None:
    # Loading tensor by tensor would ignore one that the run lacks, and broadcast one of another shape.
    shapes = reader.shapes()
    if any(name.startswith("ema/") for name in expected) != bool(reader.names("ema")):
        expected, shapes = ({k: v for k, v in x.items() if not k.startswith("ema/")} for x in (expected, shapes))
    differences = [f"has no {name}" for name in sorted(expected.keys() - shapes.keys())]
    differences += [f"has {name}, which this run does not have" for name in sorted(shapes.keys() - expected.keys())]
    differences += [
        f"has {name} of shape {shapes[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & shapes.keys())
        if expected[name] != shapes[name]
    ]
    if differences:
        more = f", and {len(differences) - 5} more such differences" if len(differences) > 5 else ""
        raise UserError(
            f"{reader.directory} {'; '.join(differences[:5])}{more}: it was saved by a run with another student or "
            "optimizer, or by another version; use the same"
        )


def load_student_tensors(directory: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The student's fp32 parameters and buffers, under open_clip's names.

    Args:
        ema: the moving average of the trained parameters in place of their last values.

    Raises:
        UserError: the checkpoint is not valid, or has no average.
    """
    directory = Path(directory)
    try:
        store.verify(directory)
    except ValueError as error:
        raise UserError(f"not a valid checkpoint: {error}; choose another step") from None
    return student_tensors(CheckpointReader(directory), ema=ema)


def student_tensors(reader: CheckpointReader, *, ema: bool = False) -> dict[str, Tensor]:
    """What `load_student_tensors` returns, of a checkpoint that was verified."""
    if ema and not reader.names("ema"):
        raise UserError(
            f"{reader.directory} has no EMA of the weights: use the student itself, or train with student.ema_decay"
        )
    kinds = ("param", "buffer", "ema") if ema else ("param", "buffer")
    return {name: reader.tensor(kind, name) for kind in kinds for name in reader.names(kind)}
