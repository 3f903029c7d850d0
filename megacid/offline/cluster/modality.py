"""The rows that are clustered: image embeddings, text embeddings, or the normalised mean of both.

Legend: B rows of a block, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from megacid.errors import UserError
from megacid.offline.rows import LENGTH_TOLERANCE, EmbeddingRows

Features = Literal["image", "text", "mean"]
_CHUNK = 1024  # rows whose mean is computed at once, in fp32


class MeanRows(EmbeddingRows):
    """The mean of the image and the text embedding of each sample, normalised, float16.

    A row is NaN where one of the two does not have length 1, so that it is found as an invalid row.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self._text = EmbeddingRows(directory, "text")
        if not np.array_equal(self._text.starts, self.starts):
            raise UserError(
                f"{directory} has {self._text.num_rows} text embeddings, expected {self.num_rows}, in each partition "
                "as many as images: run tools/embed.py again"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        return _normalised_mean(super().read(start, stop), self._text.read(start, stop))

    def take(self, rows: np.ndarray) -> np.ndarray:
        return _normalised_mean(super().take(rows), self._text.take(rows))

    def name(self, row: int) -> str:
        return f"{super().name(row)}, or the same row of {self._text.name(row).split(' of ', 1)[1]},"


def _normalised_mean(image_BD: np.ndarray, text_BD: np.ndarray) -> np.ndarray:
    out = np.empty(image_BD.shape, np.float16)
    for low in range(0, len(out), _CHUNK):
        image, text = (np.asarray(x_BD[low : low + _CHUNK], np.float32) for x_BD in (image_BD, text_BD))
        total = image + text
        length = np.sqrt(np.einsum("bd,bd->b", total, total))
        for part in (image, text):
            error = np.abs(np.sqrt(np.einsum("bd,bd->b", part, part)) - 1)
            length[~(error < LENGTH_TOLERANCE)] = np.nan
        # Embeddings that cancel have no mean: the row is 0.
        out[low : low + _CHUNK] = total / np.where(length == 0, 1, length)[:, None]
    return out


def embedding_rows(directory: str | Path, features: str) -> EmbeddingRows:
    """The rows of an embedding folder that are clustered.

    Raises:
        UserError: As EmbeddingRows; or unknown features, or the folder has no text embeddings and they are needed.
    """
    if features not in get_args(Features):
        raise UserError(
            f"features is {features!r}, expected one of {', '.join(get_args(Features))}: correct --features"
        )
    if features == "image":
        return EmbeddingRows(directory)
    if not (folder := Path(directory) / "text_emb").is_dir():
        raise UserError(
            f"--features is {features}, but {folder} does not exist: embed the captions with tools/embed.py, or give "
            "--features image"
        )
    return EmbeddingRows(directory, "text") if features == "text" else MeanRows(directory)
