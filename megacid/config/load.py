"""Loads a run file: reads JSON or Hjson, applies `--set`, refuses unknown keys, checks every value.

One file describes one run. It holds DeepSpeed's own keys and a "megacid" block:

    run = load_run("configs/digits_cpu.json", ["classifier.sample_rate=0.2"], world=2)
    run.megacid     a `MegacidConfig`, every field checked
    run.deepspeed   the dict for deepspeed.initialize, with all three batch sizes

An unknown key is an error in both parts: `schema.py` defines the keys of the block, `deepspeed.py` lists DeepSpeed's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

import hjson

from megacid.config.deepspeed import REFUSED, lint_deepspeed
from megacid.config.deepspeed_keys import KNOWN_KEYS
from megacid.config.renamed import rename_message
from megacid.config.schema import MegacidConfig, RunFile, defaults
from megacid.config.validation import check, check_numbers
from megacid.errors import UserError, nearest

_RUN_FILE_CHARACTERS = 1 << 20


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; UserError with the key, the value and what was expected."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(value, next(c for c in choices if c is not type(None)), where)
    if origin is Literal:
        if value not in choices:
            raise UserError(f'"{where}" is {value!r}, expected one of {", ".join(map(repr, choices))}')
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(choices):
            raise UserError(f'"{where}" is {value!r}, expected a list of {len(choices)} numbers')
        return tuple(_convert(v, c, where) for v, c in zip(value, choices))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f'"{where}" is {value!r} ({type(value).__name__}), expected {hint.__name__}')
    return value


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f'"{where}" is {values!r}, expected a block {{...}}')
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            renamed = rename_message(f"{where}.{key}", values[key])
            raise UserError(renamed or f'unknown key "{where}.{key}": {nearest(key, list(hints))}')
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in values:
            raise UserError(f'"{where}.{item.name}" is missing, it has no default: add it to the run file')
    return cls(**{key: _convert(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def _apply_set(tree: dict[str, Any], assignment: str) -> None:
    """Apply one `--set section.key=value` to the "megacid" block or to DeepSpeed's keys. Values are JSON, else text."""
    path, sign, text = assignment.partition("=")
    if not sign or not path:
        raise UserError(
            f"--set {assignment!r}: expected section.key=value, for example --set classifier.sample_rate=0.2"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # the type of the field decides
        value = text
    *sections, key = path.removeprefix("megacid.").split(".")
    top = sections[0] if sections else key
    known = {item.name for item in dataclasses.fields(MegacidConfig)}
    if top not in known and top not in KNOWN_KEYS and top not in REFUSED:
        raise UserError(f"--set {assignment!r}: unknown section {top!r}: {nearest(top, sorted(known | KNOWN_KEYS))}")
    node = tree.setdefault("megacid", {}) if top in known else tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {assignment!r}: {section!r} is a value, expected a block")
    node[key] = value


_PATHS = {
    "run": ["dir"],
    "data": ["shards", "features", "teacher", "labels", "keep"],
    "student": ["pretrained"],
    "classifier": ["init"],
}


def expand_path(path: str, name: str) -> str:
    """`path` with a leading ~ or ~user replaced by the home directory. UserError for a variable, which is not expanded.

    Args:
        name: of the setting or option, for the message.
    """
    expanded = os.path.expanduser(path)
    if "$" in path or expanded.startswith("~"):
        reason = "variables are not expanded" if "$" in path else "there is no such user"
        raise UserError(f"{name} is {json.dumps(path)}, expected a path, and {reason}: write the whole path")
    return expanded


def _with_expanded_paths(block: MegacidConfig) -> MegacidConfig:
    sections = {}
    for section, names in _PATHS.items():
        config = getattr(block, section)
        paths = {name: path for name in names if (path := getattr(config, name)) is not None}
        expanded = {name: expand_path(path, f'"megacid.{section}.{name}"') for name, path in paths.items()}
        sections[section] = dataclasses.replace(config, **expanded)
    return dataclasses.replace(block, **sections)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise UserError(f'key "{key}" is written twice in one block of the run file: keep one')
        seen[key] = value
    return seen


def load_run(path: str | Path, assignments: list[str] | None = None, *, world: int) -> RunFile:
    """Read, override and check a run file.

    Args:
        assignments: `section.key=value` texts, applied in order.
        world: number of ranks; completes the batch sizes.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value is invalid.
    """
    path = Path(path)
    try:
        with open(path) as file:
            text = file.read(_RUN_FILE_CHARACTERS + 1)
        if len(text) > _RUN_FILE_CHARACTERS:
            raise UserError(f"the run file {path} has more than {_RUN_FILE_CHARACTERS} characters: correct its path")
        tree = hjson.loads(text, object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise UserError(f"cannot read the run file {path} ({error.strerror}): correct --deepspeed_config") from None
    except UserError:
        raise
    except OverflowError:  # hjson rounds a float to look for an integer
        raise UserError(f"the run file {path} has a number that no float can hold, such as 1e400: correct it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the run file {path} is neither JSON nor Hjson: {str(error)[:300]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"the run file {path} holds {type(tree).__name__}, expected a block {{...}}")
    for assignment in assignments or []:
        _apply_set(tree, assignment)
    check_numbers(tree)
    block = tree.pop("megacid", None)
    if block is None:
        raise UserError(
            f'the run file {path} has no "megacid" block, expected one next to DeepSpeed\'s keys: see configs/'
        )
    megacid: MegacidConfig = _build(MegacidConfig, block, "megacid")
    check(megacid, defaults())
    megacid = _with_expanded_paths(megacid)
    run = RunFile(path, megacid, lint_deepspeed(tree, world))
    if megacid.classifier.weight_grad == "recomputed" and run.accumulation > 1:
        raise UserError(
            f'"megacid.classifier.weight_grad" is "recomputed" with {run.accumulation} micro-batches per step, '
            'expected 1: a recomputed gradient cannot be accumulated; set it to "stored", or raise the micro-batch'
        )
    return run
