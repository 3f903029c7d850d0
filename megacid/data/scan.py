"""One pass over the headers of a tar: which members make up which sample, and what had to be left out."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
Kind = Literal["image", "text", "json", "cls"]
COLUMN: dict[Kind, int] = {"image": 0, "text": 2, "json": 4, "cls": 6}
_KIND_OF_EXTENSION: dict[str, Kind] = {
    **dict.fromkeys(IMAGE_EXTENSIONS, "image"),
    "txt": "text",
    "json": "json",
    "cls": "cls",
}


@dataclass
class Scan:
    """What one pass over a tar finds."""

    keys: list[str] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> names
    damage: str | None = None

    def drop(self, reason: str, name: str) -> None:
        self.dropped.setdefault(reason, []).append(name)


def scan_tar(path: Path) -> Scan:
    """Walk the headers of a tar and group its members into samples."""
    scan = Scan()
    seen: set[str] = set()
    current: tuple[str, dict[Kind, tuple[int, int]]] | None = None

    def flush() -> None:
        nonlocal current
        if current is None:
            return
        (key, found), current = current, None
        if key in seen:
            scan.drop("duplicate key", key)
        elif "image" not in found:
            scan.drop("sample without an image", key)
        elif "text" not in found and "cls" not in found:
            scan.drop("sample without a text", key)
        else:
            seen.add(key)
            scan.keys.append(key)
            scan.members.append([v for kind in COLUMN for v in found.get(kind, (-1, -1))])

    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if (split := _accept(member, scan)) is None:
                        continue
                    key, extension = split
                    kind = _KIND_OF_EXTENSION.get(extension.lower())
                    if current is None or current[0] != key or (kind is not None and kind in current[1]):
                        flush()
                        current = (key, {})
                    if kind is not None:
                        current[1][kind] = (member.offset_data, member.size)
                scan.damage = _missing_end(file, tar.offset)
            # After damage in a header nothing tells whether the last sample is whole; its payload did pass
            # the reader's own check.
            flush()
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            scan.damage = str(error) or type(error).__name__
            if current is not None:
                scan.drop("sample at the cut", current[0])
    return scan


def _accept(member: tarfile.TarInfo, scan: Scan) -> tuple[str, str] | None:
    """(key, extension) of a usable member, None for one to pass over. Nothing is ever extracted, so a bad name
    cannot do harm; it is a sign of a tar that was not made for this, and is counted.
    """
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        scan.drop("not a regular file", member.name)
        return None
    directory, _, base = member.name.rpartition("/")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        scan.drop("unsafe name", member.name)
        return None
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return None
    return (f"{directory}/{stem}" if directory else stem), extension


def _missing_end(file: BinaryIO, offset: int) -> str | None:
    """tarfile takes a header cut short for the end of the archive; a real end is a block of zeros."""
    file.seek(offset)
    block = file.read(512)
    return None if len(block) == 512 and not any(block) else f"no end-of-archive mark at byte {offset}"
