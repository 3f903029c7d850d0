"""Safe .npy I/O: treats files as untrusted input and reports a full disk on write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megacid.errors import UserError
from megacid.storage.atomic import writing


def load_npy(path: Path, remedy: str) -> np.ndarray:
    """A read-only memory map of a .npy file.

    Mapping finds a header that promises more than the file has before anything is allocated. Nothing is unpickled.
    Raises UserError, ending with `remedy`, for anything but a plain array.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python: RecursionError, MemoryError, SyntaxError, ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not a readable .npy array ({reason}): {remedy}") from None
    if not isinstance(array, np.ndarray):  # a zip archive, whatever its name
        array.close()
        raise UserError(f"{path} is not a readable .npy array (it is an .npz archive): {remedy}")
    return array


def write_npy(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """Write what np.save would, from consecutive blocks of rows. Raises OSError when not all could be written.

    np.save uses C's buffered output, which may lose the last bytes on a full disk without an error.
    """
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    for block in blocks:
        file.write(np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8).data)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, atomic and durable. Raises UserError when the disk is full."""
    with writing(path) as temporary, open(temporary, "wb") as file:
        write_npy(file, array.dtype, array.shape, [array])


def read_array(path: Path, shape: tuple[int | None, ...], kind: str) -> np.ndarray | None:
    """A memory map of a .npy file; None when it is missing, truncated, or of another shape or dtype kind.

    shape: expected sizes; None stands for any size. kind: expected `dtype.kind`.
    """
    try:
        array = load_npy(path, "it is made again")
    except UserError:
        return None
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape))
    return array if fits and array.dtype.kind == kind else None
