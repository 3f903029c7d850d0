"""Reads what wandb wrote offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, struct.Struct("<IHB")  # checksum, length, type: the log format of LevelDB


def _records(file: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + _HEADER.size <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _HEADER.size:  # padding at the end of a block
            at += left
            continue
        _, length, kind = _HEADER.unpack_from(data, at)
        parts += data[at + _HEADER.size : at + _HEADER.size + length]
        at += _HEADER.size + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def offline_starts(run: Path) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """(run id, settings logged, history) of each start in a run directory; the history has a dict with "_step"."""
    starts = []
    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        config: dict[str, Any] = {}
        history: list[dict[str, Any]] = []
        for record in _records(file):
            if record.HasField("run"):
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                history.append({key: json.loads(value) for key, value in items.items()})
        starts.append((file.stem.removeprefix("run-"), config, history))
    return starts


def exit_codes(run: Path) -> list[int]:
    """The exit code of each start in a run directory; wandb shows a run with another than 0 as failed."""
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    return [record.exit.exit_code for file in files for record in _records(file) if record.HasField("exit")]
