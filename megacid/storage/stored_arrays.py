"""Where the data of a .npy file are and what its sha256 is, recorded in the parquet table with the keys of its rows.

A reader of the table then does not open the file, which may be in an object store.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from megacid.errors import UserError
from megacid.storage.atomic import file_sha256

_FIELD = b"megacid.arrays"  # of the metadata of the table's schema


class StoredArray(NamedTuple):
    """An array in a .npy file.

    Attributes:
        start: first byte of the data.
        bytes, sha256: of the file; "": not known.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, array: np.ndarray) -> StoredArray:
        """The array that `write_array` has written to `path`. Raises OSError."""
        size = path.stat().st_size
        return cls(array.shape, array.dtype.str, size - array.nbytes, size, file_sha256(path))

    @property
    def fits(self) -> bool:
        """Whether the file is as large as its data."""
        return self.start > 0 and self.start + math.prod(self.shape) * np.dtype(self.dtype).itemsize == self.bytes


def record_arrays(table: pa.Table, arrays: Mapping[str, StoredArray]) -> pa.Table:
    """The table with a record of `arrays`, by name."""
    record = json.dumps({name: array._asdict() for name, array in arrays.items()})
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _FIELD: record})


def recorded_arrays(table: pa.Table, source: object, remedy: str) -> dict[str, StoredArray]:
    """The arrays that a table records, by name; none if an earlier version of megacid wrote it.

    Args:
        source: the file of the table, for messages.

    Raises:
        UserError: the record is damaged; the message ends with `remedy`.
    """
    record = (table.schema.metadata or {}).get(_FIELD)
    if record is None:
        return {}
    try:
        arrays = {name: StoredArray(**fields) for name, fields in json.loads(record).items()}
        arrays = {name: array._replace(shape=tuple(map(int, array.shape))) for name, array in arrays.items()}
        if all(len(array.sha256) == 64 and array.fits for array in arrays.values()):
            return arrays
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{source} has a damaged record of its arrays ({str(record)[:80]}): {remedy}")
