"""One-line messages for values of a run file that a pydantic model refuses."""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megacid.config.fields import block_of, is_named
from megacid.config.renamed import rename_message
from megacid.errors import UserError, nearest

_LARGEST_NUMBER = 3.4e38  # of fp32
_DEEPEST = 30  # levels of blocks and lists
_LONGEST_KEY, _LONGEST_TEXT = 100, 4096  # the second is Linux's longest path
_TYPES = {
    "int_type": "an integer", "float_type": "a number", "string_type": "text", "bool_type": "true or false",
    "list_type": "a list", "path_type": "a path", "string_unicode": "text without lone surrogates",
    "json_invalid": "text without lone surrogates", "tuple_type": "a list of 2 numbers",
    "too_long": "a list of 2 numbers", "too_short": "a list of 2 numbers", "model_type": "a block {...}",
    "model_attributes_type": "a block {...}", "dict_type": "a block {...}",
}  # fmt: skip
_LIMITS = {
    "greater_than": ("> {gt}", "raise it"), "greater_than_equal": (">= {ge}", "raise it"),
    "less_than": ("< {lt}", "lower it"), "less_than_equal": ("<= {le}", "lower it"),
}  # fmt: skip


def unknown_key(key: str, known: list[str]) -> str:
    """The message for a key that a block does not have. key: dotted; known: keys of the block."""
    near = nearest(key.rpartition(".")[2], known)
    if key.startswith("megacid."):
        return f'unknown key "{key}": {near}'
    return f'DeepSpeed key "{key}" is unknown, or not supported by this trainer: {near}'


def user_error(error: ValidationError, model: type[BaseModel], path: str = "") -> UserError:
    """The first of pydantic's errors as one line, unknown keys before the others.

    Args:
        model: the model that was to be built.
        path: dotted key of its block; "" for the run file.
    """
    details = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    kind, value, names = details["type"], details["input"], [str(name) for name in details["loc"]]
    key = ".".join([path, *names] if path else names)
    if kind == "extra_forbidden":
        blocks = iter(names[:-1])
        for name in blocks:
            annotation = model.model_fields[name].annotation
            model = _block(annotation)
            if is_named(annotation):
                next(blocks)  # the name
        known = [field.alias or name for name, field in model.model_fields.items()]
        return UserError(rename_message(key, value) or unknown_key(key, known))
    if kind == "missing":
        return UserError(f'"{key}" is missing, it has no default: add it to the run file')
    if kind == "value_error" and isinstance(details["ctx"]["error"], UserError):
        return details["ctx"]["error"]
    if value == "auto":
        return UserError(f'"{key}" is "auto", which this trainer does not resolve: write the value')
    message = f'"{key}" is {json.dumps(value, default=str)[:200]}, expected {_expected(details)}'
    if key == "zero_optimization" and value in (True, 2, 3):
        message += f': write {{"stage": {int(value)}}}'
    return UserError(message)


def _block(annotation: Any) -> type[BaseModel]:
    """The model in an annotation such as Model | None."""
    model = block_of(annotation)
    assert model is not None
    return model


def _expected(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind in _LIMITS:
        limit, remedy = _LIMITS[kind]
        return f"{limit.format(**{name: f'{bound:.15g}' for name, bound in context.items()})}: {remedy}"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", '"')
    if kind == "value_error":
        return str(context["error"])
    quoted = kind in ("int_type", "float_type") and _is_quoted_number(details["input"])
    return f"{_TYPES.get(kind, details['msg'])}{': remove the quotes' if quoted else ''}"


def _is_quoted_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and isinstance(json.loads(value), int | float)
    except (ValueError, RecursionError):
        return False


def check_tree(tree: dict[str, Any]) -> None:
    """Raise UserError for what JSON readers accept and no run file needs.

    These are NaN, infinity, integers beyond 64 bits, deep nesting, and keys and texts that no message can show.
    """
    left: list[tuple[str, Any, int]] = [("", tree, 0)]
    while left:
        where, value, depth = left.pop()
        if depth > _DEEPEST:
            raise UserError(f'"{where[:60]}..." is more than {_DEEPEST} blocks and lists deep: remove brackets')
        if isinstance(value, dict):
            for key, inner in value.items():
                if not key.isprintable() or len(key) > _LONGEST_KEY:
                    shown, expected = json.dumps(key[:_LONGEST_KEY]), f"at most {_LONGEST_KEY} printable ones"
                    raise UserError(f"the key {shown} has {len(key)} characters, expected {expected}: correct it")
                left.append((f"{where}.{key}" if where else key, inner, depth + 1))
        elif isinstance(value, list):
            left += [(f"{where}.{number}", inner, depth + 1) for number, inner in enumerate(value)]
        elif isinstance(value, str) and len(value) > _LONGEST_TEXT:
            raise UserError(f'"{where}" is a text of {len(value)} characters, expected at most {_LONGEST_TEXT}')
        elif isinstance(value, float) and not abs(value) <= _LARGEST_NUMBER:
            expected = "a number that fp32 can hold" if math.isfinite(value) else "a finite number"
            raise UserError(f'"{where}" is {value:.3g}, expected {expected}')
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f'"{where}" is an integer of {value.bit_length()} bits, expected one below 2^63')
