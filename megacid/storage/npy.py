"""Safe .npy I/O: treats files as untrusted input and reports a full disk on write."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np

from megacid.errors import UserError, one_line
from megacid.storage.atomic import writing

NPZ_BYTES = 1 << 34  # of one array of an .npz archive, which is read into memory


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


def parse_npy(data: bytes, what: str, remedy: str) -> np.ndarray:
    """The array of a .npy file that is in memory.

    Raises UserError, which names `what` and ends with `remedy`, when it is none, is pickled, or is not as large as its
    header says.
    """
    file = io.BytesIO(data)
    try:
        _checked_header(file, "the array", len(data))
        file.seek(0)
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except Exception as error:  # as in load_npy
        raise UserError(f"{what} cannot be read ({one_line(error) or type(error).__name__}): {remedy}") from None


class NpzHeader(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


def npz_headers(path: Path, remedy: str) -> dict[str, NpzHeader]:
    """Shape and dtype of every array of an .npz archive, without reading the arrays.

    Raises UserError, ending with `remedy`, when it is no such archive, or an array is pickled, is larger than NPZ_BYTES
    or is not as large as its header says.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {name.removesuffix(".npy"): _checked_member(archive, name) for name in names}
    except Exception as error:  # as in load_npy, and the errors of damaged archives
        raise _unreadable_npz(path, error, remedy) from None


def load_npz(path: Path, name: str, remedy: str) -> np.ndarray:
    """One array of an .npz archive, in memory. Raises UserError as `npz_headers`, also when its checksum is wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            _checked_member(archive, f"{name}.npy")
            with archive.open(f"{name}.npy") as file:
                return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except Exception as error:
        raise _unreadable_npz(path, error, remedy) from None


def _checked_member(archive: zipfile.ZipFile, name: str) -> NpzHeader:
    with archive.open(name) as file:
        return _checked_header(file, name, archive.getinfo(name).file_size)


def _checked_header(file: IO[bytes], name: str, file_size: int) -> NpzHeader:
    header = _read_header(file)
    size, stored = math.prod(header.shape) * header.dtype.itemsize, file_size - file.tell()
    if header.dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects")
    if size != stored or size > NPZ_BYTES:
        raise ValueError(
            f"{name} of shape {header.shape} needs {size} bytes, has {stored}, at most {NPZ_BYTES} allowed"
        )
    return header


def _read_header(file: IO[bytes]) -> NpzHeader:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return NpzHeader(shape, dtype)


def _unreadable_npz(path: Path, error: Exception, remedy: str) -> UserError:
    return UserError(f"{path} is not a readable .npz archive ({one_line(error)}): {remedy}")


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
    write_blocks(path, array.dtype, array.shape, [array])


def write_blocks(path: Path, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """`write_array` of an array that is given as consecutive blocks of rows."""
    with writing(path) as temporary, open(temporary, "wb") as file:
        write_npy(file, dtype, shape, blocks)


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
