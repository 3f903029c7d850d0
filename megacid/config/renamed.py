"""Keys of the run file that have another name now: an old key is an error that names the new key and value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Renamed(NamedTuple):
    key: str
    values: Mapping[Any, Any] = MappingProxyType({})  # old value -> new value; others stay as they are


RENAMED = {
    "megacid.classifier.mode": Renamed("megacid.classifier.weight_grad", {"row": "stored", "slab": "recomputed"}),
}


def rename_message(key: str, value: Any) -> str | None:
    """What to write instead of an old key; None if `key` (full path) never was one."""
    if key not in RENAMED:
        return None
    return f'"{key}" was renamed: write "{RENAMED[key].key}": {json.dumps(_new_value(key, value))} instead'


def with_new_keys(flat_settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version saved (full path -> value), under today's keys."""
    return {RENAMED[key].key if key in RENAMED else key: _new_value(key, value) for key, value in flat_settings.items()}


def _new_value(key: str, value: Any) -> Any:
    values = RENAMED[key].values if key in RENAMED else {}
    return values.get(value, value) if isinstance(value, (str, int, float, bool)) else value
