"""Reads and writes meta.json, which marks a stage directory as complete and says how it was made."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from megacid.errors import UserError
from megacid.storage.atomic import JSON_BYTES, read_bounded, write_json_atomic
from megacid.storage.remote_path import AnyPath, RemotePath, any_path

_EARLIER_FIELDS = {"balance": "across"}  # by tool: a field that only earlier versions wrote, in another layout


@functools.cache
def versions() -> Mapping[str, str]:
    """Versions of the installed packages that results depend on, read once per process."""
    installed = {}
    names = "megacid torch deepspeed open_clip_torch webdataset triton numpy faiss-cpu faiss-gpu-cuvs pillow simplejpeg"
    for name in names.split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def machine() -> dict[str, Any]:
    """The machine of a measurement: {"cpu", "cores", "system"}."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": (names or [platform.processor()])[0], "cores": os.cpu_count(), "system": platform.platform()}


def write_meta(directory: str | Path, made_by: str, source: dict[str, Any], **facts: Any) -> None:
    """Write `directory/meta.json`. Call it last, since the file marks the stage as complete."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json_atomic(
        Path(directory) / "meta.json",
        {"made_by": made_by, "source": source, **facts, "versions": versions(), "date": now},
    )


def read_meta(directory: str | AnyPath, expect: str | None = None) -> dict[str, Any]:
    """Read `directory/meta.json`; UserError when it is missing, unreadable or made by another tool than `expect`."""
    directory = any_path(directory)
    tool = f"tools/{expect}.py" if expect else "its tool"
    if isinstance(directory, Path) and not directory.is_dir():
        raise UserError(
            f"there is no directory {directory}, expected the output of {tool}: run {tool} first, or correct the path"
        )
    try:
        meta = json.loads(_meta_bytes(directory, tool))
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no meta.json, so the stage that writes it did not finish: run {tool} again with the same "
            "arguments"
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{directory / 'meta.json'} is not JSON ({error}): run {tool} again") from None
    if not isinstance(meta, dict):
        raise UserError(
            f"{directory / 'meta.json'} holds {type(meta).__name__}, expected a block {{...}}: run {tool} again"
        )
    if expect is not None and meta.get("made_by") != expect:
        raise UserError(
            f"{directory} was made by {meta.get('made_by')!r}, expected one made by {expect!r}: correct the path"
        )
    if _EARLIER_FIELDS.get(expect or "") in meta:
        raise UserError(f"{directory} was written by an earlier version of megacid: delete it and run {tool} again")
    return dict(meta)


def _meta_bytes(directory: AnyPath, tool: str) -> bytes:
    if isinstance(directory, RemotePath):
        return (directory / "meta.json").read(f"run {tool} first and copy its whole output there, or correct the URL")
    return read_bounded(directory / "meta.json", JSON_BYTES)


def size_field(meta: dict[str, Any], directory: AnyPath, name: str, remedy: str) -> int:
    """A size in `directory`'s meta.json. Raises UserError unless it is an integer from 1 to 2^31 - 1."""
    value = meta.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise UserError(f"{directory}/meta.json has {name} {str(value)[:40]!r}, expected an integer above 0: {remedy}")
    return value
