"""Parquet tables with one row per sample: reading files that may be damaged, and joins by key.

Shapes: n rows of a table, m requested keys.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacid.errors import UserError, one_line
from megacid.storage.remote_path import AnyPath, RemotePath

_ERRORS = (OSError, ValueError, KeyError, pa.ArrowException)


def read_parquet(path: AnyPath, remedy: str, columns: list[str] | None = None) -> pa.Table:
    """The columns `columns` (None: all of them) of a parquet file.

    Raises:
        UserError: the file is missing or damaged, or lacks a column; the message ends with `remedy`.
    """
    if isinstance(path, Path) and not path.exists():
        raise UserError(f"{path} is missing although the stage is complete: {remedy}")
    source = pa.BufferReader(path.read(remedy)) if isinstance(path, RemotePath) else path
    try:
        table = pq.read_table(source, columns=columns)
    except _ERRORS as error:
        raise _unreadable(path, error, remedy) from None
    missing = [name for name in columns or () if name not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}: {remedy}")
    return table


def parquet_shape(path: Path, remedy: str) -> tuple[int, int]:
    """(rows, columns) of a parquet file from its footer at the end of the file, which is missing when it was cut.

    Raises:
        UserError: the file is missing or its footer is damaged.
    """
    try:
        footer = pq.read_metadata(path)
    except _ERRORS as error:
        raise _unreadable(path, error, remedy) from None
    return footer.num_rows, footer.num_columns


def _unreadable(path: AnyPath, error: Exception, remedy: str) -> UserError:
    return UserError(f"{path} cannot be read ({one_line(error)}): {remedy}")


def key_column(table: pa.Table, column: str, path: AnyPath, remedy: str) -> list[str]:
    """A column of keys.

    Raises:
        UserError: the column is missing or does not hold strings, so that no key would ever match.
    """
    kind = table.schema.field(column).type if column in table.column_names else None
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path} has the column {column} of type {kind}, expected strings: {remedy}")
    try:
        return list(table[column].to_pylist())
    except ValueError as error:  # not UTF-8
        raise _unreadable(path, error, remedy) from None


def count_column(table: pa.Table, column: str, path: AnyPath, remedy: str) -> np.ndarray:
    """int64 [n]: a column of counts, each 1 or more. UserError for other values."""
    values = table[column]
    counts = values.to_numpy() if pa.types.is_integer(values.type) and not values.null_count else np.zeros(1, np.int64)
    if counts.size and not 1 <= counts.min() <= counts.max() < 2**31:
        raise UserError(f"{path} has the column {column} with values other than counts of 1 or more: {remedy}")
    return counts.astype(np.int64)


def label_column(
    table: pa.Table, column: str, keys: list[str], num_classes: int, path: AnyPath, remedy: str
) -> np.ndarray:
    """int64 [n]: a column of labels, -1 (none) to num_classes - 1. `keys`: of the rows, for error messages.

    Raises:
        UserError: a value is not an integer in that range; the message names its sample.
    """
    values = table[column]
    if not pa.types.is_integer(values.type) or values.null_count:
        problem = f"{values.null_count} nulls" if values.null_count else f"{values.type}"
        row = next((i for i, value in enumerate(values.to_pylist()) if not isinstance(value, int)), 0)
        sample = f", first for sample {keys[row]}" if keys else ""
        raise UserError(f"{path} has the column {column} with {problem}{sample}, expected integers: {remedy}")
    labels = values.to_numpy()
    outside = (labels < -1) | (labels >= num_classes)
    if outside.any():
        row = int(outside.argmax())
        raise UserError(
            f"{path} has {column} {labels[row]} for sample {keys[row]}, expected -1 .. {num_classes - 1} according to "
            f"meta.json: {remedy}"
        )
    return labels.astype(np.int64)


def row_by_key(present: list[str], source: AnyPath | str, remedy: str) -> dict[str, int]:
    """The row of every key. UserError when `present`, which was read from `source`, holds a key twice."""
    row_of = {key: row for row, key in enumerate(present)}
    if len(row_of) != len(present):
        twice = next(key for row, key in enumerate(present) if row_of[key] != row)
        raise UserError(f"{source} has more than one row for the key {twice}, expected unique keys: {remedy}")
    return row_of


def join_by_key(
    requested: list[str], present: list[str], source: AnyPath | str, remedy: str, *, require_all: bool = False
) -> np.ndarray:
    """int64 [m]: row of each requested key in `present`, -1 where it is not there. Either list may be in any order.

    Args:
        source: the file that `present` was read from, for error messages.
        require_all: raise instead of returning -1.

    Raises:
        UserError: `present` holds a key twice, or (require_all) lacks a requested key.
    """
    row_of = row_by_key(present, source, remedy)
    if requested == present:
        return np.arange(len(present))
    rows = np.array([row_of.get(key, -1) for key in requested], np.int64)
    missing = np.flatnonzero(rows < 0)
    if require_all and missing.size:
        raise UserError(
            f"{source} has no row for {missing.size} of {len(requested)} samples, the first one is "
            f"{requested[missing[0]]}: {remedy}"
        )
    return rows
