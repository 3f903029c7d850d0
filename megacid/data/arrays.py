"""Arrays from files that somebody else wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megacid.errors import UserError


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
