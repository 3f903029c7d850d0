"""The types of the run file's fields, with their ranges."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_LOWEST_TEMPERATURE = 0.001
_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")


def expanded_path(path: str) -> str:
    """`path` with a leading ~ or ~user replaced by the home directory. ValueError for a variable, or no path."""
    if not path.strip() or "\0" in path:
        raise ValueError("a path of at least one character, without NUL")
    expanded = os.path.expanduser(path)
    if "$" in path or expanded.startswith("~"):
        reason = "variables are not expanded" if "$" in path else "there is no such user"
        raise ValueError(f"a path, and {reason}: write the whole path")
    return expanded


def _local_path(path: str) -> str:
    if "://" in path:
        raise ValueError("a path on a disk, not a URL")
    return expanded_path(path)


def _directory_name(name: Any) -> Any:
    if isinstance(name, str) and (
        name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable() or len(name.encode()) > 200
    ):
        raise ValueError('the name of one directory, at most 200 bytes without "/": name its parent in run.dir')
    return name


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples


def _shards(path: str) -> str:
    """As `expanded_path`, but a command is as it is: the shell expands its variables."""
    if not path.startswith("pipe:"):
        return expanded_path(path)
    if "\0" in path or not all(part.startswith("pipe:") for part in path.split("::")):
        raise ValueError("pipe:COMMAND in every part, since tars that are indexed and commands cannot be mixed")
    return path


def _indexed(path: str) -> str:
    if any(part.startswith("pipe:") for part in path.split("::")):
        raise ValueError("tars that are indexed: commands (pipe:) are not mixed with other sources")
    return expanded_path(path)


def _joined(value: Any) -> Any:
    """A list of paths as one text, which the shards' reader splits."""
    return "::".join(value) if isinstance(value, list) and value and all(isinstance(v, str) for v in value) else value


def _one_or_several_paths(value: Any) -> Any:
    paths = value if isinstance(value, list | tuple) else [value]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise ValueError("a path, or a list of paths")
    expanded = tuple(map(expanded_path, paths))
    return expanded if expanded[1:] else expanded[0]


def _one_or_several_temperatures(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    are_numbers = bool(values) and all(type(v) in (int, float) for v in values)
    if not are_numbers or not all(v >= _LOWEST_TEMPERATURE for v in values):
        remedy = ": raise it" if are_numbers else ""
        raise ValueError(f"a number >= {_LOWEST_TEMPERATURE}, or a list of one for each of several teachers{remedy}")
    temperatures = tuple(map(float, values))
    return temperatures if temperatures[1:] else temperatures[0]


def _each_once(value: Any) -> Any:
    known = get_args(TrackerName)
    if not isinstance(value, list | tuple) or any(value.count(name) > 1 or name not in known for name in value):
        raise ValueError(f"a list of {', '.join(map(repr, known))}, each at most once".replace("'", '"'))
    return tuple(value)


def named_blocks(value: Any) -> Any:
    """A block whose keys are names: they become parts of dotted keys, tags and paths."""
    if not isinstance(value, dict) or not value or not all(_NAME.fullmatch(name) for name in value):
        raise ValueError('a block {"NAME": {...}, ...} with names of at most 40 letters, digits, "_" and "-"')
    return value


# A validator's ValueError ends the message `"KEY" is VALUE, expected ...`.
DirectoryName = Annotated[str, BeforeValidator(_directory_name)]
FilePath = Annotated[str, AfterValidator(expanded_path)]
LocalPath = Annotated[str, AfterValidator(_local_path)]
Shards = Annotated[str, BeforeValidator(_joined), AfterValidator(_shards)]
IndexedShards = Annotated[str, BeforeValidator(_joined), AfterValidator(_indexed)]
OneOrSeveralPaths = Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several_paths)]
_Temperature = Annotated[float, Field(ge=_LOWEST_TEMPERATURE)]
OneOrSeveralTemperatures = Annotated[
    _Temperature | tuple[_Temperature, ...], BeforeValidator(_one_or_several_temperatures)
]
Steps = Annotated[int, Field(gt=0, le=10**12)]
Seconds = Annotated[float, Field(gt=0, le=10_000_000)]
Width = Annotated[int, Field(gt=0, le=65_536)]
Count = Annotated[int, Field(gt=0, le=10**9)]
NotNegative = Annotated[float, Field(ge=0)]
Weight = NotNegative
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionAboveZero = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
TrackerNames = Annotated[tuple[TrackerName, ...], BeforeValidator(_each_once)]


class Section(BaseModel):
    """A block of the run file: frozen, without unknown keys, without conversions but integer to float."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def is_named(annotation: Any) -> bool:
    """Whether a field has a block of named blocks, dict[str, Model] or dict[str, Model] | None."""
    return get_origin(annotation) is dict or any(map(is_named, get_args(annotation)))


def block_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a field such as Model, Model | None or dict[str, Model]; None for a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(block_of, get_args(annotation))), None)
