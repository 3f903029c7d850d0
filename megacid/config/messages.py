"""One-line messages for values of a run file that a pydantic model refuses."""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megacid.config.renamed import rename_message
from megacid.errors import UserError, nearest

_LARGEST_NUMBER = 3.4e38  # of fp32
_TYPES = {
    "int_type": "int", "float_type": "float", "string_type": "str", "bool_type": "bool", "string_unicode": "Unicode",
    "list_type": "a list",
}  # fmt: skip
_LIMITS = {
    "greater_than": ("> {gt}", "raise it"), "greater_than_equal": (">= {ge}", "raise it"),
    "less_than": ("< {lt}", "lower it"), "less_than_equal": ("<= {le}", "lower it"),
}  # fmt: skip


def user_error(error: ValidationError, model: type[BaseModel], path: str) -> UserError:
    """The first of pydantic's errors as one line, unknown keys before the others.

    Args:
        model: the model that was to be built.
        path: dotted key of its block.
    """
    details = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    key = ".".join([path, *map(str, details["loc"])])
    if details["type"] == "extra_forbidden":
        for name in details["loc"][:-1]:
            model = model.model_fields[str(name)].annotation  # type: ignore[assignment]
        near = nearest(str(details["loc"][-1]), list(model.model_fields))
        return UserError(rename_message(key, details["input"]) or f'unknown key "{key}": {near}')
    if details["type"] == "missing":
        return UserError(f'"{key}" is missing, it has no default: add it to the run file')
    if details["type"] == "value_error" and isinstance(details["ctx"]["error"], UserError):
        return details["ctx"]["error"]
    return UserError(f'"{key}" is {_shown(details)}, expected {_expected(details)}')


def _shown(details: ErrorDetails) -> str:
    value = details["input"]
    kind = f" ({type(value).__name__})" if details["type"] in _TYPES else ""
    return f"{repr(value)[:200]}{kind}"


def _expected(details: ErrorDetails) -> str:
    kind, context, value = details["type"], details.get("ctx", {}), details["input"]
    if kind in _LIMITS:
        limit, remedy = _LIMITS[kind]
        return f"{limit.format(**{name: f'{bound:.15g}' for name, bound in context.items()})}: {remedy}"
    if kind in _TYPES:
        return f"{_TYPES[kind]}{': remove the quotes' if _is_quoted_number(value) else ''}"
    if kind == "literal_error":
        return f"one of {context['expected'].replace(' or ', ', ')}"
    if kind in ("model_type", "dict_type"):
        return "a block {...}"
    if kind in ("tuple_type", "too_long", "too_short"):
        return "a list of 2 numbers"
    return str(context["error"]) if kind == "value_error" else details["msg"]


def _is_quoted_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and isinstance(json.loads(value), int | float)
    except (ValueError, RecursionError):
        return False


def check_numbers(tree: dict[str, Any]) -> None:
    """Raise UserError for NaN, infinity and integers beyond 64 bits, which the JSON reader accepts."""
    left: list[tuple[str, Any]] = [("", tree)]
    while left:
        where, value = left.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{where}.{key}" if where else str(key), inner) for key, inner in items]
        elif isinstance(value, float) and not abs(value) <= _LARGEST_NUMBER:
            expected = "a number that fp32 can hold" if math.isfinite(value) else "a finite number"
            raise UserError(f'"{where}" is {value:.3g}, expected {expected}')
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f'"{where}" is an integer of {value.bit_length()} bits, expected one below 2^63')
