"""Several teachers of the same shards as one: their embeddings side by side, each teacher with its own width.

Shapes: m requested rows, d widths of all teachers together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megacid.data.augmentation import Views
from megacid.data.index import ShardIndex
from megacid.data.side_tables import TeacherTable
from megacid.errors import UserError


class TeacherEnsemble:
    """Teacher tables joined by key. A row is [t_1, ..., t_K] / sqrt(K), which has length 1 like each t_k.

    Attributes:
        tables: the K teachers.
        dim: d.
        dtype: float16, or float32 if the embeddings of any teacher are.
        has_text: whether captions were embedded, by all teachers.
        views: random crops of each image that all teachers have embedded; None: the whole images.

    Raises:
        UserError: only some of the teachers have embeddings of captions, or they have other views.
    """

    def __init__(self, tables: Sequence[TeacherTable]) -> None:
        self.tables = tuple(tables)
        self.dim = sum(table.dim for table in self.tables)
        self.dtype = np.result_type(*(table.dtype for table in self.tables))
        with_text = [table for table in self.tables if table.has_text]
        without = [str(table.directory) for table in self.tables if not table.has_text]
        if with_text and without:
            raise UserError(
                f"{', '.join(without)} has no embeddings of captions (text_emb/), expected them as in "
                f"{with_text[0].directory}: run tools/embed.py again, or leave this teacher out of data.teacher"
            )
        self.has_text = bool(with_text)
        self.views = common_views({table.directory: table.views for table in self.tables})

    def has(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """bool [m]: whether rows of the tar have an embedding of every teacher."""
        return np.logical_and.reduce([table.has(shard, rows) for table in self.tables])

    def rows(
        self, shard: int, rows: np.ndarray, drawn: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(image, text) embeddings of rows of the tar, [m, d] each in `dtype`; text is None without `has_text`.

        Arguments and errors are those of `TeacherTable.rows`.
        """
        images, texts = zip(*(table.rows(shard, rows, drawn) for table in self.tables))
        return self._joined(images), self._joined(texts) if self.has_text else None

    def _joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return (np.concatenate(parts, axis=1, dtype=np.float32) * len(parts) ** -0.5).astype(self.dtype)


def common_views(views: Mapping[str | Path, Views | None]) -> Views | None:
    """The views of every teacher, by directory. Raises UserError unless they are the same."""
    (first, expected), *others = views.items()
    for directory, found in others:
        if found != expected:
            raise UserError(
                f"{directory} has {found or 'no views'}, expected those of {first}, {expected or 'no views'}: run "
                "tools/embed.py with the same --views and --seed for every teacher"
            )
    return expected


def open_teachers(directories: Sequence[str | Path], index: ShardIndex) -> TeacherTable | TeacherEnsemble:
    """The teacher of one directory, or the ensemble of several. Raises UserError as `TeacherTable` does."""
    tables = [TeacherTable(directory, index) for directory in directories]
    return tables[0] if len(tables) == 1 else TeacherEnsemble(tables)
