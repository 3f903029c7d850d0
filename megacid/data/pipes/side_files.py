"""Side tables of piped tars: embeddings, labels and keep masks, joined by key while a tar is read.

They were made from indexed tars of the same names. No row is found by its number in a tar.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megacid.data.augmentation import Views
from megacid.data.captions import recorded_caption
from megacid.data.ensemble import common_views, normalized_concatenation
from megacid.data.memmap import gather_rows
from megacid.data.pairs import Choice, other_captions
from megacid.data.pipes.commands import PipedTar
from megacid.data.side_tables import BALANCE_AGAIN, EMBED_AGAIN, LabelFiles
from megacid.data.teacher_table import TeacherFiles, TeacherRows
from megacid.errors import UserError
from megacid.storage.metadata import read_meta
from megacid.storage.npy import load_npy
from megacid.storage.parquet import row_by_key
from megacid.storage.remote_path import AnyPath, any_path


class KeepFiles:
    """Masks of the samples that `tools/balance.py` kept, by the name of a tar and by key.

    A mask has no keys, but the representatives of the same tar tell which samples had an embedding; the embeddings that
    balance has read have the keys of these, in the same order.

    Args:
        embeddings: of the run, for when the folder that balance has read is not there any more.
    """

    def __init__(self, directory: str | Path, embeddings: TeacherFiles | None) -> None:
        self.directory, self.meta = Path(directory), read_meta(directory, "balance")
        recorded = Path(str(self.meta.get("source", {}).get("embeddings", "")))
        if (recorded / "meta.json").is_file():
            embeddings = TeacherFiles(recorded, read_meta(recorded, "embed"))
        if embeddings is None or embeddings.meta.get("shards_digest") != self.meta.get("shards_digest"):
            raise UserError(
                f"{directory} was made from the embeddings in {recorded}, which have the keys of its samples, and they "
                "are not there: put them back, or set data.teacher to them"
            )
        self._embeddings = embeddings

    def kept(self, name: str) -> dict[str, bool]:
        """Whether a sample of a tar is kept, by key. UserError when the tar's files are damaged or disagree."""
        path = self.directory / "keep" / f"{name}.npy"
        mask = load_npy(path, BALANCE_AGAIN)
        numbers = load_npy(self.directory / "representative" / f"{name}.npy", BALANCE_AGAIN)
        keys = self._embeddings.read(name).keys
        valid = mask.dtype == np.bool_ and mask.ndim == 1 and numbers.shape == mask.shape
        if not valid or int((numbers >= 0).sum()) != len(keys):
            raise UserError(
                f"{path} is {mask.dtype} {mask.shape}, expected a mask with the {len(keys)} samples of "
                f"{self._embeddings.directory} that representative/{name}.npy has: {BALANCE_AGAIN}"
            )
        return dict(zip(keys, mask[numbers >= 0].tolist()))


@dataclass(frozen=True)
class SideFiles:
    """The side tables of a run, by the name of a tar.

    Raises:
        UserError: on creation, if they are of other tars, captions or views than the run or each other.
    """

    teachers: tuple[TeacherFiles, ...]
    labels: LabelFiles | None
    keep: KeepFiles | None

    @classmethod
    def open(
        cls,
        tars: Sequence[PipedTar],
        caption: str,
        teachers: Sequence[str],
        labels: str | None,
        labels_per_sample: int,
        keep: str | None,
    ) -> SideFiles:
        """Open the outputs of embed, cluster and balance for these tars; captions are those of the run."""
        if not (teachers or labels or keep):
            return cls((), None, None)
        unnamed = next((tar for tar in tars if tar.name is None), None)
        if unnamed is not None:
            raise UserError(
                f"command {unnamed.number} of data.shards names no .tar, or several, expected one, by whose name "
                "embeddings and labels are found: write a command with the name of its tar, such as pipe:aws s3 cp "
                "s3://bucket/00000.tar -"
            )
        names = [tar.name for tar in tars if tar.name is not None]
        for path in (*teachers, labels, keep):
            if path is not None and not isinstance(any_path(path), Path):
                raise UserError(
                    f"{path} is a URL, and data.shards are commands, whose side tables are read from a disk: copy it "
                    "to a disk and name that directory"
                )
        opened = tuple(TeacherFiles(Path(path), read_meta(path, "embed")) for path in teachers)
        for teacher in opened:
            if (recorded := recorded_caption(teacher.meta)) != caption:
                raise UserError(
                    f"{teacher.directory} was made from the captions in {recorded!r}, this run reads them from "
                    f'{caption!r}: set data.caption to "{recorded}", or run tools/embed.py with --caption {caption}'
                )
            teacher.check_names(names)
        label_files = None
        if labels is not None:
            _check_files(Path(labels) / "labels", ".parquet", names, "cluster")
            label_files = LabelFiles(Path(labels), read_meta(labels, "cluster"), names[0], labels_per_sample)
        keep_files = None
        if keep is not None:
            _check_files(Path(keep) / "keep", ".npy", names, "balance")
            keep_files = KeepFiles(keep, opened[0] if opened else None)
        sides = cls(opened, label_files, keep_files)
        sides._check_same_shards()
        if opened and len({table.has_text for table in opened}) > 1:
            raise UserError(
                f"only some of {', '.join(str(table.directory) for table in opened)} have embeddings of captions "
                f"(text_emb/), expected all or none: {EMBED_AGAIN}"
            )
        common_views({table.directory: table.views for table in opened} or {"": None})
        return sides

    def _check_same_shards(self) -> None:
        stages = [stage for stage in (*self.teachers, self.labels, self.keep) if stage is not None]
        for stage in stages[1:]:
            if stage.meta.get("shards_digest") != stages[0].meta.get("shards_digest"):
                raise UserError(
                    f"{stage.directory} was made from other shards (digest {str(stage.meta.get('shards_digest'))[:12]})"
                    f" than {stages[0].directory} (digest {str(stages[0].meta.get('shards_digest'))[:12]}): make them "
                    "from the same shards"
                )

    @property
    def dim(self) -> int:
        """Width of all teachers together."""
        return sum(table.dim for table in self.teachers)

    @property
    def has_text(self) -> bool:
        """Whether captions were embedded."""
        return bool(self.teachers) and self.teachers[0].has_text

    @property
    def views(self) -> Views | None:
        """Random crops of each image that the teachers have embedded."""
        return self.teachers[0].views if self.teachers else None

    @property
    def digest(self) -> str:
        """sha256 of the meta.json of every stage."""
        metas = [stage.meta for stage in (*self.teachers, self.labels, self.keep) if stage is not None]
        return hashlib.sha256(json.dumps(metas, sort_keys=True).encode()).hexdigest()

    def teacher_dtype(self, tars: Sequence[PipedTar]) -> np.dtype:
        """float16, or float32 if the embeddings of the first tar are wider. Ranks exchange embeddings in it."""
        wide = any(table.read(str(tars[0].name)).image.dtype != np.float16 for table in self.teachers)
        return np.dtype(np.float32 if wide else np.float16)

    def of(self, tar: PipedTar) -> TarSides:
        """The rows of a tar. Raises UserError when a file is damaged."""
        return TarSides(self, str(tar.name) if tar.name is not None else "")


class TarSides:
    """The rows of the side tables of one tar, by key."""

    def __init__(self, sides: SideFiles, name: str) -> None:
        self._sides = sides
        self._teachers: list[tuple[TeacherRows, dict[str, int]]] = []
        for table in sides.teachers:
            rows = table.read(name)
            self._teachers.append((rows, row_by_key(rows.keys, f"{table.directory}, {name}.tar", EMBED_AGAIN)))
        self._kept = sides.keep.kept(name) if sides.keep else None
        self._name = name

    @cached_property
    def _labels(self) -> tuple[dict[str, int], np.ndarray]:
        assert self._sides.labels is not None
        keys, labels = self._sides.labels.read(self._name)
        return row_by_key(keys, self._sides.labels.path(self._name), "run tools/cluster.py again"), labels

    def is_left_out(self, key: str) -> bool:
        """Whether balance did not keep a sample."""
        return self._kept is not None and self._kept.get(key) is False

    def without_embedding(self, key: str) -> AnyPath | None:
        """The directory of a teacher or a balance stage that does not know a sample; None: all do."""
        if self._kept is not None and key not in self._kept:
            assert self._sides.keep is not None
            return self._sides.keep.directory
        for table, (_, row_of) in zip(self._sides.teachers, self._teachers):
            if key not in row_of:
                return table.directory
        return None

    def other_captions(self, key: str, captions: list[str]) -> str | None:
        """Why a sample has other captions than those that a teacher has embedded; None if it has not."""
        for table, (rows, row_of) in zip(self._sides.teachers, self._teachers):
            if rows.first is not None:
                count = int(np.diff(rows.first[row_of[key] : row_of[key] + 2])[0])
                if (reason := other_captions(captions, count, table.directory)) is not None:
                    return reason
        return None

    def embeddings(self, key: str, choice: Choice, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray | None]:
        """(image, text) embeddings of a sample, [Dt] each; text is None without `has_text`.

        Raises:
            UserError: they are wider than those of the first tar.
            OSError: a file was cut.
        """
        images, texts = [], []
        for table, (rows, row_of) in zip(self._sides.teachers, self._teachers):
            row = row_of[key]
            images.append(_row(rows.image, row if table.views is None else row * table.views.count + choice.view))
            if rows.text is not None:
                texts.append(_row(rows.text, row if rows.first is None else int(rows.first[row]) + choice.caption))
            if images[-1].dtype.itemsize > dtype.itemsize:
                raise UserError(
                    f"{table.directory} has {images[-1].dtype} embeddings of {self._name}.tar, expected {dtype} as of "
                    f"the first tar: {EMBED_AGAIN}"
                )
        image = normalized_concatenation(images, dtype)[0]
        return image, normalized_concatenation(texts, dtype)[0] if self._sides.has_text else None

    def labels(self, key: str) -> np.ndarray:
        """int64 [stored]: labels of a sample, nearest first, -1 for none."""
        row_of, labels = self._labels
        row = row_of.get(key)
        return np.full(labels.shape[1], -1, np.int64) if row is None else labels[row]


def _row(array: np.ndarray, row: int) -> np.ndarray:
    return gather_rows(array, np.array([row], np.int64))


def _check_files(folder: Path, ending: str, names: Sequence[str], made_by: str) -> None:
    """Raise UserError unless the output of a stage has a file for every tar."""
    read_meta(folder.parent, made_by)
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [name for name in names if f"{name}{ending}" not in present]
    if missing:
        raise UserError(
            f"{folder} has no files of {len(missing)} of the {len(names)} tars of data.shards ({', '.join(missing[:5])}"
            f"): run tools/{made_by}.py on shards with these tars"
        )
