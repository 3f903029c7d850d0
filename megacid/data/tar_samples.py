"""Grouping of the members of a tar into samples, in one pass over its headers."""

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
class TarScan:
    """The samples of one tar, and what was skipped.

    Attributes:
        keys: the key of every sample, in tar order.
        members: for every sample the 8 columns of `ShardTable.members`.
        dropped: names of the skipped members and samples by reason.
        damage: the reason why the tar could not be read to its end; None for an intact tar.
    """

    keys: list[str] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    damage: str | None = None
    _seen: set[str] = field(default_factory=set)
    _kinds: set[Kind] = field(default_factory=set)  # of the samples so far

    def drop(self, reason: str, name: str) -> None:
        """Record a skipped member or sample."""
        # Escaped: a name that is not UTF-8 could not be logged or stored.
        self.dropped.setdefault(reason, []).append(name if is_safe(name) else repr(name)[1:-1])

    def add(self, group: MemberGroup) -> None:
        """Use a group as a sample, or drop it with a reason."""
        if group.key in self._seen:
            self.drop("duplicate key", group.key)
        elif group.at_damage and not (self._kinds and self._kinds <= group.members.keys()):
            # More members may have followed: keep it only when it has the kinds of the other samples.
            self.drop("sample at the cut", group.key)
        elif "image" not in group.members:
            self.drop("sample without an image", group.key)
        elif "text" not in group.members and "cls" not in group.members:
            self.drop("sample without a text", group.key)
        else:
            self._seen.add(group.key)
            self._kinds |= group.members.keys()
            self.keys.append(group.key)
            self.members.append([v for kind in COLUMN for v in group.members.get(kind, (-1, -1))])


@dataclass
class MemberGroup:
    """Neighbouring members with one key; a sample when it has an image and a text or class."""

    key: str
    members: dict[Kind, tuple[int, int]] = field(default_factory=dict)  # offset and size of the kinds that are read
    spans: list[tuple[int, int]] = field(default_factory=list)  # first byte and end of all members, with their headers
    at_damage: bool = False


def member_groups(path: Path, scan: TarScan) -> Iterator[MemberGroup]:
    """The groups of a tar in order; skipped members are recorded in `scan`.

    Raises:
        OSError: the tar cannot be opened or read.
        TarDamage: the tar is damaged; raised after the group that was cut.
    """
    group: MemberGroup | None = None
    with open(path, "rb") as file:
        try:
            stop = 0
            for member in members(file, os.fstat(file.fileno()).st_size):
                start, stop = stop, member.stop
                if (split := _accept(member, scan)) is None:
                    continue
                kind = _KIND_OF_EXTENSION.get(split[1].lower())
                if group is None or group.key != split[0] or kind in group.members:
                    if group is not None:
                        yield group
                    group = MemberGroup(split[0])
                group.spans.append((start, stop))
                if kind is not None:
                    group.members[kind] = (member.offset, member.size)
        except (TarDamage, OSError):
            if group is not None:
                group.at_damage = True
                yield group
            raise
    if group is not None:
        yield group


def scan_tar(path: Path) -> TarScan:
    """Read the headers of a tar and group its members into samples. Raises OSError when it cannot be opened."""
    scan = TarScan()
    with open(path, "rb"):
        pass
    try:
        for group in member_groups(path, scan):
            scan.add(group)
    except (TarDamage, OSError) as error:
        scan.damage = str(error)
    return scan


def _accept(member: Member, scan: TarScan) -> tuple[str, str] | None:
    """(key, extension) of a usable member; None for one to skip, which is recorded when it is suspicious."""
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
