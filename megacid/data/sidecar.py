"""Side tables of the shards: teacher embeddings, cluster labels, and which samples to keep.

Each is opened shard by shard when it is needed and joined BY KEY inside the shard: a global dictionary of 400 M
keys would cost gigabytes in every worker, and the order of rows in another file is not the order of the tar.
Shapes: m requested rows, d embedding width, l labels per sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from megacid.checkpoint.store import read_meta
from megacid.data.cache import SmallCache
from megacid.data.decode import BadSample
from megacid.data.index import ShardIndex
from megacid.errors import UserError

_OPEN_SHARDS = 64


def _checked_meta(directory: str | Path, index: ShardIndex, made_by: str) -> dict[str, Any]:
    """meta.json of a stage, after checking that the stage was made from these shards."""
    meta = read_meta(directory, expect=made_by)
    if meta.get("shards_digest") != index.digest:
        raise UserError(
            f"{directory} was made from other shards (digest {str(meta.get('shards_digest'))[:12]}) than {index.root} "
            f"(digest {index.digest[:12]}): run tools/{made_by}.py again for these shards"
        )
    return meta


def _load_npy(path: Path, *, mmap: bool) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing although the stage is complete: run the tool that made {path.parents[1]} again"
        ) from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is not a readable .npy array ({error}): run the tool that made {path.parents[1]} again"
        ) from None


def _read_parquet(path: Path, columns: list[str] | None = None) -> Any:
    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing although the stage is complete: run the tool that made {path.parents[1]} again"
        ) from None
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors derive from these
        raise UserError(
            f"{path} is not a readable parquet file ({error}): run the tool that made {path.parents[1]} again"
        ) from None


def _match(wanted: list[str], present: list[str], where: Path) -> np.ndarray:
    """int64 [len(wanted)]: row of each wanted key in `present`, -1 where there is none."""
    if wanted == present:
        return np.arange(len(wanted))
    row_of = {key: row for row, key in enumerate(present)}
    if len(row_of) != len(present):
        raise UserError(
            f"{where} names {len(present) - len(row_of)} keys twice, but keys must be unique in a shard: make it again"
        )
    return np.array([row_of.get(key, -1) for key in wanted], np.int64)


class _TeacherShard(NamedTuple):
    row_of: np.ndarray  # int64 [n]: row in the partition of each sample of the tar, -1 for none
    image: np.ndarray  # float16 [rows, d], memory-mapped
    text: np.ndarray | None


class TeacherTable:
    """Teacher embeddings of `tools/embed.py`: float16, L2-normalised.

    `.dim` is their width d; `.has_text` says whether texts were embedded.
    """

    def __init__(self, directory: str | Path, index: ShardIndex) -> None:
        self.directory, self.index = Path(directory), index
        self.meta = _checked_meta(directory, index, "embed")
        self.dim = int(self.meta["dim"])
        self.has_text = (self.directory / "text_emb").is_dir()
        # Numbers are padded to different widths by different writers of this layout, so files are found by number.
        self._image_files = _by_number(self.directory / "img_emb", "img_emb_*.npy")
        self._text_files = _by_number(self.directory / "text_emb", "text_emb_*.npy")
        self._metadata_files = _by_number(self.directory / "metadata", "metadata_*.parquet")
        self._partitions: dict[str, int] = self.meta["partitions"]
        missing = [name for name in index.names if self._partitions.get(name) not in self._image_files]
        if missing:
            raise UserError(
                f"{directory} has no embeddings of {len(missing)} shards ({', '.join(missing[:5])}): "
                "run tools/embed.py again"
            )
        self._shards: SmallCache[_TeacherShard] = SmallCache(_OPEN_SHARDS)

    def _open(self, shard: int) -> _TeacherShard:
        number = self._partitions[self.index.names[shard]]
        image = _load_npy(self._image_files[number], mmap=True)
        text = _load_npy(self._text_files[number], mmap=True) if self.has_text else None
        metadata = self._metadata_files.get(number, self.directory / "metadata" / f"metadata_{number:05d}.parquet")
        keys = _read_parquet(metadata, ["image_path"])["image_path"].to_pylist()
        for name, array in (("img_emb", image), ("text_emb", text)):
            if array is not None and array.shape != (len(keys), self.dim):
                raise UserError(
                    f"{name} of partition {number} in {self.directory} has shape {array.shape}, "
                    f"but {(len(keys), self.dim)} fits its metadata: "
                    "run tools/embed.py again"
                )
        return _TeacherShard(_match(self.index.table(shard).keys, keys, metadata), image, text)

    def has(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """bool [m]: which rows of the tar have an embedding."""
        return self._shards.get(shard, lambda: self._open(shard)).row_of[rows] >= 0

    def rows(self, shard: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(image, text) embeddings of rows of the tar, float16 [m, d] each; text is None when no texts were embedded.

        Raises BadSample for a row without an embedding (`has` tells).
        """
        opened = self._shards.get(shard, lambda: self._open(shard))
        at = opened.row_of[rows]
        if (at < 0).any():
            row = int(np.asarray(rows)[at < 0][0])
            raise BadSample(
                self.index.names[shard], self.index.table(shard).keys[row], f"no teacher embedding in {self.directory}"
            )
        return np.asarray(opened.image[at]), None if opened.text is None else np.asarray(opened.text[at])


def _by_number(folder: Path, pattern: str) -> dict[int, Path]:
    stem = pattern.partition("*")[0]
    found = {}
    for path in folder.glob(pattern) if folder.is_dir() else ():
        digits = path.name[len(stem) :].partition(".")[0]
        if digits.isdigit():
            found[int(digits)] = path
    return found


class LabelTable:
    """Cluster labels of `tools/cluster.py`. `.num_classes`; `.labels_per_sample` is l.

    labels_per_sample: use so many of the nearest clusters; None: all that were written. UserError when there are fewer.
    """

    def __init__(self, directory: str | Path, index: ShardIndex, labels_per_sample: int | None = None) -> None:
        self.directory, self.index = Path(directory), index
        self.meta = _checked_meta(directory, index, "cluster")
        self.num_classes = int(self.meta["k"])
        self._shards: SmallCache[np.ndarray] = SmallCache(_OPEN_SHARDS)
        self._wanted = labels_per_sample
        self.labels_per_sample = self._labels(0).shape[1]

    def _open(self, shard: int) -> np.ndarray:
        path = self.directory / "labels" / f"{self.index.names[shard]}.parquet"
        table = _read_parquet(path)
        names = [name for name in table.column_names if name == "label" or name.removeprefix("label_").isdigit()]
        if "key" not in table.column_names or "label" not in names:
            raise UserError(
                f"{path} has the columns {table.column_names}, but `key` and `label` are needed: "
                "run tools/cluster.py again"
            )
        names.sort(key=lambda name: int(name.removeprefix("label_")) if name != "label" else 0)
        if self._wanted is not None and len(names) < self._wanted:
            raise UserError(
                f"{path} has {len(names)} labels per sample, wanted {self._wanted}: "
                f"run tools/cluster.py with --top-labels {self._wanted}, or use fewer"
            )
        names = names[: self._wanted]
        at = _match(self.index.table(shard).keys, table["key"].to_pylist(), path)
        stored = np.stack([table[name].to_numpy().astype(np.int64) for name in names], axis=1)
        if stored.size and (stored.min() < -1 or stored.max() >= self.num_classes):
            raise UserError(
                f"{path} holds labels {stored.min()} .. {stored.max()}, "
                f"but -1 .. {self.num_classes - 1} is allowed by meta.json: "
                "run tools/cluster.py again"
            )
        labels = np.full((len(at), len(names)), -1, np.int64)
        labels[at >= 0] = stored[at[at >= 0]]
        return labels

    def _labels(self, shard: int) -> np.ndarray:
        return self._shards.get(shard, lambda: self._open(shard))

    def rows(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """int64 [m], or [m, l] when several labels per sample were written; -1 for none."""
        labels = self._labels(shard)[rows]
        return labels[:, 0] if labels.shape[1] == 1 else labels


class KeepTable:
    """Which samples the redundancy removal of `tools/balance.py` kept. `.counts`: int64 kept per shard."""

    def __init__(self, directory: str | Path, index: ShardIndex) -> None:
        self.directory, self.index = Path(directory), index
        self.meta = _checked_meta(directory, index, "balance")
        self._shards: SmallCache[np.ndarray] = SmallCache(_OPEN_SHARDS)
        self.counts = np.array([np.count_nonzero(self._mask(shard)) for shard in range(len(index.names))], np.int64)

    def _mask(self, shard: int) -> np.ndarray:
        path = self.directory / "keep" / f"{self.index.names[shard]}.npy"
        mask = _load_npy(path, mmap=False)
        if mask.dtype != np.bool_ or mask.shape != (int(self.index.sizes[shard]),):
            raise UserError(
                f"{path} is {mask.dtype} {mask.shape}, "
                f"but bool ({int(self.index.sizes[shard])},) fits the shard: run tools/balance.py again"
            )
        return mask

    def kept(self, shard: int) -> np.ndarray:
        """int64: rows of the tar that are kept, ascending."""
        return self._shards.get(shard, lambda: np.flatnonzero(self._mask(shard)))
