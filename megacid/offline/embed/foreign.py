"""Embedding folders of other tools: clip-retrieval's, and DataComp's with an .npz and a .parquet per shard.

    img_emb/img_emb_0.npy, text_emb/text_emb_0.npy, metadata/metadata_0.parquet      clip-retrieval
    00000000.npz (l14_img, l14_txt), 00000000.parquet                                DataComp

All files are untrusted: nothing is unpickled, and no array is larger than its table has rows.

Legend: n rows of all parts, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacid.data.lru import LRUCache
from megacid.data.memmap import take_rows
from megacid.errors import UserError
from megacid.offline.embed.partitions import SampleInfo
from megacid.storage.npy import NpzHeader, load_npy, load_npz, npz_headers
from megacid.storage.parquet import key_column, parquet_shape, read_parquet

Modality = Literal["img", "txt"]
KEY_COLUMNS = ("key", "image_path", "uid")  # the first one that a table has identifies its samples
_CAPTIONS = ("caption", "text")
_REMEDY = "repair it, or write the folder again"
_OPEN = 4  # arrays of each kind, and tables, in memory at once
_DIGEST_BYTES = 1 << 16  # of every file that identify it, with its size


class _Part(NamedTuple):
    """The files of some samples, in one order. arrays: names inside of the .npz `image`, which is also `text`."""

    name: str
    image: Path
    text: Path
    metadata: Path
    arrays: tuple[str, str] | None = None


@dataclass(frozen=True)
class ForeignFolder:
    """A folder whose files agree in their numbers of rows, widths and types; values are not checked.

    Attributes:
        key: The column that identifies the samples.
        starts: int64 [parts + 1], first row of each part.
        dtype: Of the embeddings.
    """

    path: Path
    parts: list[_Part]
    key: str
    starts: np.ndarray
    dim: int
    dtype: np.dtype
    _arrays: LRUCache[np.ndarray]
    _tables: LRUCache[pa.Table]

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    def digest(self) -> str:
        """sha256 of the names, sizes and beginnings of all files."""
        digest = hashlib.sha256()
        for path in sorted({path for part in self.parts for path in part[1:4]}):
            digest.update(f"{path.relative_to(self.path)} {path.stat().st_size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_DIGEST_BYTES))
        return digest.hexdigest()

    def keys(self, part: int) -> list[str]:
        """The keys of one part, in row order. UserError for one that is null."""
        path = self.parts[part].metadata
        keys: list[str | None] = list(key_column(read_parquet(path, _REMEDY, [self.key]), self.key, path, _REMEDY))
        if None in keys:
            raise UserError(f"{path} has no {self.key} in row {keys.index(None)}, expected one per sample: {_REMEDY}")
        return [key for key in keys if key is not None]

    def take(self, modality: Modality, rows: np.ndarray) -> np.ndarray:
        """Embeddings of some rows (int64 [m], any order), [m, D] in the dtype of the files."""
        return take_rows(_Arrays(self, modality), self.starts, rows)

    def samples(self, rows: np.ndarray, keys: list[str]) -> list[SampleInfo]:
        """Key, caption, uid and url of some rows, as far as the tables have them. keys: those in the shards."""
        part = np.searchsorted(self.starts, rows, side="right") - 1
        out: list[SampleInfo] = [SampleInfo(key, "") for key in keys]
        for number in np.unique(part).tolist():
            places = np.flatnonzero(part == number)
            table = self._tables.get(number, lambda number=number: self._table(number))  # type: ignore[misc]
            columns = table.take(pa.array(rows[places] - self.starts[number])).to_pydict()
            none = [None] * len(places)
            captions = next((columns[name] for name in _CAPTIONS if name in columns), none)
            more = (columns.get("uid", none), columns.get("url", none))
            for place, caption, uid, url in zip(places.tolist(), captions, *more):
                out[place] = SampleInfo(keys[place], _text(caption) or "", _text(uid), _text(url))
        return out

    def _table(self, part: int) -> pa.Table:
        path = self.parts[part].metadata
        present = pq.read_schema(path).names
        return read_parquet(path, _REMEDY, [name for name in (*_CAPTIONS, "uid", "url") if name in present])

    def array(self, modality: Modality, part: int) -> np.ndarray:
        """The embeddings of one part, [rows, D]: a memory map, or the array of an .npz, of which a few are cached."""
        files = self.parts[part]
        path, which = (files.image, 0) if modality == "img" else (files.text, 1)
        if files.arrays is None:
            return self._arrays.get((modality, part), lambda: load_npy(path, _REMEDY))
        name = files.arrays[which]
        return self._arrays.get((modality, part), lambda: load_npz(path, name, _REMEDY))

    def name(self, modality: Modality, row: int) -> str:
        """The file and place of a row, for error messages."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        files = self.parts[part]
        return f"row {row - int(self.starts[part])} of {files.image if modality == 'img' else files.text} ({modality})"


class _Arrays(Sequence[np.ndarray]):
    """The arrays of one modality; each is opened when it is used."""

    def __init__(self, folder: ForeignFolder, modality: Modality) -> None:
        self._folder, self._modality = folder, modality

    def __len__(self) -> int:
        return len(self._folder.parts)

    def __getitem__(self, part: Any) -> Any:
        return self._folder.array(self._modality, part)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def open_foreign(path: Path, arrays: str | None = None) -> ForeignFolder:
    """Opens a folder and checks that its files belong together.

    Args:
        arrays: Of a folder with .npz files: take NAME_img and NAME_txt; None: the only such pair.

    Raises:
        UserError: The folder has neither layout, lacks a file, or its files do not agree; the message names one.
    """
    if (path / "img_emb").is_dir():
        parts = _clip_retrieval_parts(path)
        if arrays is not None:
            raise UserError(f"--arrays is {arrays}, but {path} has img_emb/*.npy and no .npz: leave it out")
    elif any(path.glob("*.npz")):
        parts = _datacomp_parts(path, arrays)
    else:
        raise UserError(
            f"{path} has no img_emb/ and no *.npz, expected clip-retrieval's folders (img_emb, text_emb, metadata) or "
            "DataComp's files (an .npz and a .parquet per shard): correct --adopt"
        )
    columns = _schema(parts[0].metadata)
    key = next((name for name in KEY_COLUMNS if name in columns), None)
    if key is None:
        raise UserError(
            f"{parts[0].metadata} has the columns {', '.join(columns)[:200]}, expected one of "
            f"{', '.join(KEY_COLUMNS)}: {_REMEDY}"
        )
    headers = [_check_part(part) for part in parts]
    first_image, first_text = headers[0]
    for part, (image, text) in zip(parts, headers):
        for file, header, expected in ((part.image, image, first_image), (part.text, text, first_text)):
            if (header.shape[1], header.dtype) != (expected.shape[1], expected.dtype):
                raise UserError(
                    f"{file} is {header.dtype} of width {header.shape[1]}, expected {expected.dtype} of width "
                    f"{expected.shape[1]} as in part {parts[0].name}: {_REMEDY}"
                )
    rows, dim = [image.shape[0] for image, _ in headers], first_image.shape[1]
    if not any(rows):
        raise UserError(f"{path} has no rows in its {len(parts)} parts, expected embeddings: correct --adopt")
    starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
    return ForeignFolder(path, parts, key, starts, dim, first_image.dtype, LRUCache(_OPEN), LRUCache(_OPEN))


def _clip_retrieval_parts(path: Path) -> list[_Part]:
    files: dict[str, dict[int, Path]] = {}
    for kind, ending in (("img_emb", "npy"), ("text_emb", "npy"), ("metadata", "parquet")):
        named = ((file.name[len(kind) + 1 : -len(ending) - 1], file) for file in path.glob(f"{kind}/{kind}_*.{ending}"))
        files[kind] = {int(number): file for number, file in named if number.isdecimal()}
        if not files[kind]:
            remedy = "run clip-retrieval with --enable_text" if kind == "text_emb" else "complete the folder"
            raise UserError(f"{path} has no {kind}/{kind}_*.{ending}, expected one per part: {remedy}")
    numbers = sorted(set().union(*files.values()))
    for number in numbers:
        for kind, by_number in files.items():
            if number not in by_number:
                raise UserError(f"{path / kind} lacks part {number}, which other folders have: complete the folder")
    return [_Part(str(n), files["img_emb"][n], files["text_emb"][n], files["metadata"][n]) for n in numbers]


def _datacomp_parts(path: Path, arrays: str | None) -> list[_Part]:
    parts = []
    for file in sorted(path.glob("*.npz")):
        table = file.with_suffix(".parquet")
        if not table.exists():
            raise UserError(f"{table} is missing, expected it next to {file.name}: complete the folder")
        if arrays is None:
            names = npz_headers(file, _REMEDY)
            pairs = [n.removesuffix("_img") for n in names if n.endswith("_img") and f"{n[:-4]}_txt" in names]
            if len(pairs) != 1:
                raise UserError(
                    f"{file} has the arrays {', '.join(names)[:200]}, expected one pair NAME_img and NAME_txt: "
                    + ("choose one with --arrays NAME" if pairs else "both are needed, write the folder again")
                )
            arrays = pairs[0]
        parts.append(_Part(file.stem, file, file, table, (f"{arrays}_img", f"{arrays}_txt")))
    return parts


def _schema(path: Path) -> list[str]:
    parquet_shape(path, _REMEDY)  # a UserError when it is damaged
    return list(pq.read_schema(path).names)


def _check_part(part: _Part) -> tuple[NpzHeader, NpzHeader]:
    """Shape and dtype of the image and text embeddings. UserError unless the files of the part agree."""
    rows, _ = parquet_shape(part.metadata, _REMEDY)
    if part.arrays is None:
        found = [NpzHeader(array.shape, array.dtype) for array in (load_npy(p, _REMEDY) for p in part[1:3])]
    else:
        headers = npz_headers(part.image, _REMEDY)
        missing = [name for name in part.arrays if name not in headers]
        if missing:
            raise UserError(
                f"{part.image} has the arrays {', '.join(headers)[:200]}, expected {missing[0]}: correct --arrays, or "
                "complete the folder"
            )
        found = [headers[name] for name in part.arrays]
    for path, header in zip(part[1:3], found):
        if len(header.shape) != 2 or header.dtype.kind != "f" or header.shape[0] != rows:
            raise UserError(
                f"{path} is {header.dtype} of shape {header.shape}, expected floating point and ({rows}, width) as "
                f"{part.metadata.name} has {rows} rows: {_REMEDY}"
            )
    image, text = found
    if image.shape[1] != text.shape[1] or not image.shape[1]:
        raise UserError(
            f"part {part.name} of {part.metadata.parent} has images of width {image.shape[1]} and texts of width "
            f"{text.shape[1]}, expected one width of one model: {_REMEDY}"
        )
    return image, text
