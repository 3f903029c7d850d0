"""One pass over the headers of a tar: which members make up which sample, and what had to be left out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megacid.data.tar import Member, TarDamage, is_safe, members

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
    _seen: set[str] = field(default_factory=set)
    _kinds: set[Kind] = field(default_factory=set)  # that samples of this tar have

    def drop(self, reason: str, name: str) -> None:
        # Escaped: a name with bytes that are no UTF-8 could not be logged or stored.
        self.dropped.setdefault(reason, []).append(name if is_safe(name) else repr(name)[1:-1])

    def add(self, key: str, found: dict[Kind, tuple[int, int]], *, at_damage: bool = False) -> None:
        """Use a sample, or drop it and say why."""
        if key in self._seen:
            self.drop("duplicate key", key)
        elif at_damage and not (self._kinds and self._kinds <= found.keys()):
            # Nothing tells what else it had; what the other samples have is the best measure.
            self.drop("sample at the cut", key)
        elif "image" not in found:
            self.drop("sample without an image", key)
        elif "text" not in found and "cls" not in found:
            self.drop("sample without a text", key)
        else:
            self._seen.add(key)
            self._kinds |= found.keys()
            self.keys.append(key)
            self.members.append([v for kind in COLUMN for v in found.get(kind, (-1, -1))])


def scan_tar(path: Path) -> Scan:
    """Walk the headers of a tar and group its members into samples. Raises OSError when it cannot be opened."""
    scan = Scan()
    key: str | None = None
    found: dict[Kind, tuple[int, int]] = {}
    with open(path, "rb") as file:
        try:
            for member in members(file, os.fstat(file.fileno()).st_size):
                if (split := _accept(member, scan)) is None:
                    continue
                kind = _KIND_OF_EXTENSION.get(split[1].lower())
                if key != split[0] or kind in found:
                    if key is not None:
                        scan.add(key, found)
                    key, found = split[0], {}
                if kind is not None:
                    found[kind] = (member.offset, member.size)
        except (TarDamage, OSError) as error:
            scan.damage = str(error)
        if key is not None:
            scan.add(key, found, at_damage=scan.damage is not None)
    return scan


def _accept(member: Member, scan: Scan) -> tuple[str, str] | None:
    """(key, extension) of a usable member; None for one to pass over, counted where it is a sign of something odd."""
    if member.directory:
        return None
    if not member.regular:
        scan.drop("not a regular file", member.name)
        return None
    if not is_safe(member.name):
        scan.drop("unsafe name", member.name)
        return None
    directory, _, base = member.name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return None
    return (f"{directory}/{stem}" if directory else stem), extension
