"""Several teachers of the same shards as one: their embeddings side by side, each teacher with its own width.

Shapes: m rows, d width of a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megacid.data.augmentation import Views
from megacid.data.index import ShardIndex
from megacid.data.remote.cache import ShardCache
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError


class TeacherEnsemble:
    """The teachers of a run; their rows are joined by `normalized_concatenation`.

    Attributes:
        tables: the K teachers.
        dim: their widths together.
        has_text: whether captions were embedded, by all teachers.
        views: random crops of each image that all teachers have embedded; None: the whole images.

    Raises:
        UserError: only some of the teachers have embeddings of captions, or they have other views.
    """

    def __init__(self, tables: Sequence[TeacherTable]) -> None:
        self.tables = tuple(tables)
        self.dim = sum(table.dim for table in self.tables)
        with_text = [table for table in self.tables if table.has_text]
        without = [str(table.directory) for table in self.tables if not table.has_text]
        if with_text and without:
            raise UserError(
                f"{', '.join(without)} has no embeddings of captions (text_emb/), expected them as in "
                f"{with_text[0].directory}: run tools/embed.py again, or leave this teacher out of data.teacher"
            )
        self.has_text = bool(with_text)
        self.views = common_views({table.directory: table.views for table in self.tables})


def normalized_concatenation(parts: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """[t_1, ..., t_K] / sqrt(K) of the K teachers' embeddings [m, d], which has length 1 like each t_k."""
    if len(parts) == 1:
        return parts[0].astype(dtype, copy=False)
    return (np.concatenate(parts, axis=1, dtype=np.float32) * len(parts) ** -0.5).astype(dtype)


def common_views(views: Mapping[Any, Views | None]) -> Views | None:
    """The views of every teacher, by directory. Raises UserError unless they are the same."""
    (first, expected), *others = views.items()
    for directory, found in others:
        if found != expected:
            raise UserError(
                f"{directory} has {found or 'no views'}, expected those of {first}, {expected or 'no views'}: run "
                "tools/embed.py with the same --views and --seed for every teacher"
            )
    return expected


def open_teachers(
    directories: Sequence[str], index: ShardIndex, cache: ShardCache | None = None
) -> TeacherTable | TeacherEnsemble:
    """The teacher of one directory, or the ensemble of several. Arguments and errors as of `TeacherTable`."""
    tables = [TeacherTable(directory, index, cache) for directory in directories]
    return tables[0] if len(tables) == 1 else TeacherEnsemble(tables)
