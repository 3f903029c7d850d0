"""One pass over the headers of a tar: which members make up which sample, and what had to be left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megacid.data.tar_headers import Member, TarDamage, is_safe, members

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


@dataclass
class Run:
    """Neighbouring members of one key: a sample, where they are enough for one."""

    key: str
    found: dict[Kind, tuple[int, int]] = field(default_factory=dict)  # offset and size of what is read
    spans: list[tuple[int, int]] = field(default_factory=list)  # bytes of each member, known or not, with its headers
    at_damage: bool = False


def runs(path: Path, scan: Scan) -> Iterator[Run]:
    """The runs of a tar in order; what is passed over is counted in `scan`.

    Raises OSError when it cannot be opened or read, TarDamage where it is damaged, after the run that was cut.
    """
    run: Run | None = None
    with open(path, "rb") as file:
        try:
            stop = 0
            for member in members(file, os.fstat(file.fileno()).st_size):
                start, stop = stop, member.stop
                if (split := _accept(member, scan)) is None:
                    continue
                kind = _KIND_OF_EXTENSION.get(split[1].lower())
                if run is None or run.key != split[0] or kind in run.found:
                    if run is not None:
                        yield run
                    run = Run(split[0])
                run.spans.append((start, stop))
                if kind is not None:
                    run.found[kind] = (member.offset, member.size)
        except (TarDamage, OSError):
            if run is not None:
                run.at_damage = True
                yield run
            raise
    if run is not None:
        yield run


def scan_tar(path: Path) -> Scan:
    """Walk the headers of a tar and group its members into samples. Raises OSError when it cannot be opened."""
    scan = Scan()
    with open(path, "rb"):
        pass
    try:
        for run in runs(path, scan):
            scan.add(run.key, run.found, at_damage=run.at_damage)
    except (TarDamage, OSError) as error:
        scan.damage = str(error)
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
