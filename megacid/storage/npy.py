"""Arrays in .npy files: read as if somebody who means harm had written them, written so that a full disk is noticed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megacid.errors import UserError
from megacid.storage.atomic import writing


def load_npy(path: Path, remedy: str) -> np.ndarray:
    """A read-only memory map of a .npy file, of whatever shape and type it says.

    Mapped even where all of it is read, so that a header that promises more than the file holds is found before anything
    is allocated. Nothing is ever unpickled. UserError, which ends with `remedy`, for everything that is no plain array.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (
        Exception
    ) as error:  # a header is parsed as Python: RecursionError, MemoryError, TokenError, SyntaxError, ...
        said = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not a readable .npy array ({said}): {remedy}") from None
    if not isinstance(array, np.ndarray):  # a zip archive, whatever its name
        array.close()
        raise UserError(f"{path} is not a readable .npy array (it is an .npz archive): {remedy}")
    return array


def write_npy(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """The bytes of np.save, blocks of rows one after the other. Raises OSError when not all could be written.

    np.save hands the array to C's buffered output, whose last bytes may be lost to a full disk without an error.
    """
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    for block in blocks:
        file.write(np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8).data)


def write_array(path: Path, array: np.ndarray) -> None:
    """A .npy without pickles, atomic and durable."""
    with writing(path) as temporary, open(temporary, "wb") as file:
        write_npy(file, array.dtype, array.shape, [array])


def read_array(path: Path, shape: tuple[int | None, ...], kind: str) -> np.ndarray | None:
    """A memory map of the array; None when the file is missing, cut off, or not of that shape (None: any) and dtype kind."""
    try:
        array = load_npy(path, "it is made again")
    except UserError:
        return None
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape))
    return array if fits and array.dtype.kind == kind else None
