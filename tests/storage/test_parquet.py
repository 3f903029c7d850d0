from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megacid.errors import UserError
from megacid.storage.parquet import join_by_key, key_column, label_column, parquet_shape, read_parquet

AGAIN = "run tools/cluster.py again"


def test_a_join_finds_rows_in_any_order_and_marks_missing_keys() -> None:
    assert join_by_key(["c", "x", "a"], ["a", "b", "c"], "f", AGAIN).tolist() == [2, -1, 0]
    same = join_by_key(["a", "b"], ["a", "b"], "f", AGAIN)
    assert same.tolist() == [0, 1] and same.dtype == np.int64
    assert join_by_key([], ["a"], "f", AGAIN).tolist() == [] == join_by_key([], [], "f", AGAIN).tolist()
    assert join_by_key(["a"], [], "f", AGAIN).tolist() == [-1]


def test_a_join_names_the_first_missing_key_when_all_are_required() -> None:
    with pytest.raises(UserError, match=f"^f has no row for 2 of 3 samples, the first one is x: {AGAIN}$"):
        join_by_key(["a", "x", "y"], ["a", "b"], "f", AGAIN, require_all=True)
    assert join_by_key(["b", "a"], ["a", "b"], "f", AGAIN, require_all=True).tolist() == [1, 0]


def test_a_key_with_two_rows_is_refused_even_where_nobody_asks_for_it() -> None:
    with pytest.raises(UserError, match=f"^f has more than one row for the key b, expected unique keys: {AGAIN}$"):
        join_by_key(["a"], ["a", "b", "b"], "f", AGAIN)


def test_columns_of_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"key": ["a", "b"], "label": [1, -1], "other": [0.0, 1.0]}), path)
    table = read_parquet(path, AGAIN, ["key", "label"])
    assert table.column_names == ["key", "label"] and parquet_shape(path, AGAIN) == (2, 3)
    assert key_column(table, "key", path, AGAIN) == ["a", "b"]
    labels = label_column(table, "label", ["a", "b"], 2, path, AGAIN)
    assert labels.tolist() == [1, -1] and labels.dtype == np.int64
    with pytest.raises(UserError, match=f"^{path} has label 1 for sample a, expected -1 .. 0 .*: {AGAIN}$"):
        label_column(table, "label", ["a", "b"], 1, path, AGAIN)
    with pytest.raises(UserError, match=f"^{path} has the column label of type int64, expected strings: {AGAIN}$"):
        key_column(table, "label", path, AGAIN)
    with pytest.raises(UserError, match=f"^{path} .*score.*: {AGAIN}$"):
        read_parquet(path, AGAIN, ["key", "score"])


def test_every_truncation_of_a_parquet_file_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"key": [str(i) for i in range(100)]}), path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        for read in (read_parquet, parquet_shape):
            with pytest.raises(UserError) as caught:
                read(path, AGAIN)
            assert str(caught.value).startswith(f"{path} cannot be read (") and str(caught.value).endswith(f": {AGAIN}")
            assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        read_parquet(path, AGAIN)


def test_keys_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")]
    )
    with pytest.raises(UserError, match=f"cannot be read .*: {AGAIN}"):
        key_column(pa.table({"key": column}), "key", tmp_path / "t.parquet", AGAIN)
