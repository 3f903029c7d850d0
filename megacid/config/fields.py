"""What the fields of the run file are made of: types with their ranges, and conditions under which a key counts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Needs:
    """Annotates a field, or a section, that has no effect unless a condition on other settings holds.

    Args:
        condition: for messages and documentation, such as "loss.cluster > 0".
        holds: the same as a function of the "megacid" block.
    """

    def __init__(self, condition: str, holds: Callable[[Any], bool]) -> None:
        self.condition, self.holds = condition, holds


def expanded_path(path: str) -> str:
    """`path` with a leading ~ or ~user replaced by the home directory. ValueError for a variable, left as it is."""
    expanded = os.path.expanduser(path)
    if "$" in path or expanded.startswith("~"):
        reason = "variables are not expanded" if "$" in path else "there is no such user"
        raise ValueError(f"a path, and {reason}: write the whole path")
    return expanded


def _directory_name(name: Any) -> Any:
    if isinstance(name, str) and (
        name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable() or len(name.encode()) > 200
    ):
        raise ValueError('the name of one directory, at most 200 bytes without "/": name its parent in run.dir')
    return name


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples


# A validator's ValueError ends the message `"KEY" is VALUE, expected ...`.
DirectoryName = Annotated[str, BeforeValidator(_directory_name)]
FilePath = Annotated[str, AfterValidator(expanded_path)]
Steps = Annotated[int, Field(gt=0, le=10**12)]
Seconds = Annotated[float, Field(gt=0, le=10_000_000)]
Width = Annotated[int, Field(gt=0, le=65_536)]
Count = Annotated[int, Field(gt=0, le=10**9)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionAboveZero = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A block of the run file: frozen, without unknown keys, without conversions but integer to float."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
