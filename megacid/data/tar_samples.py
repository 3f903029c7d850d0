"""Grouping of the members of a tar into samples, in one pass over its headers."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from megacid.data.captions import BAD_JSON, BLANK, NO_FIELD, NOT_A_TEXT, TOO_MANY, CaptionError, CaptionSource, is_blank
from megacid.data.decode import FORMATS, OTHER_EXTENSIONS, decode_text
from megacid.data.tar_bytes import TarBytes
from megacid.data.tar_headers import Member, TarDamage, is_safe, members
from megacid.errors import UserError

IMAGE_EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)
Kind = Literal["image", "text", "json", "cls"]
COLUMN: dict[Kind, int] = {"image": 0, "text": 2, "json": 4, "cls": 6}
_KIND_OF_EXTENSION: dict[str, Kind] = {**dict.fromkeys(IMAGE_EXTENSIONS, "image"), "json": "json", "cls": "cls"}
TXT = CaptionSource()
_ABSENT = -1, -1  # offset and size
_KEEP_BLANK = ", or keep them with tools/index_shards.py --keep-blank-captions"  # not those of a list
# The reasons for which a sample is lost, with the rule that it breaks and the remedy.
LOST = {
    "key with a dot": "a key ends at the first dot of the file name, as in webdataset, so a1.b.jpg is member b.jpg of "
    "sample a1: replace the other dots, such as a1_b.jpg",
    "members not adjacent": "the members of a sample must follow each other in the tar, as in webdataset: write the "
    "tar again in the order of its names, such as with tar --sort=name",
    "sample without an image": f"a sample needs an image in a member named .{', .'.join(IMAGE_EXTENSIONS)}, of the "
    "same name and folder: add or rename it",
    **{
        f"sample without an image but with a .{extension}, which is not decoded": "convert these files to JPEG, PNG or "
        "WebP, and write them as members named .jpg, .png or .webp"
        for extension in OTHER_EXTENSIONS
    },
    "sample without a text": "a sample needs a caption in a .txt member of the same name and folder, or a class in a "
    ".cls member for tools/eval.py: add it, or name where the captions are with --caption (data.caption in a run "
    "file), such as json:caption",
    BLANK: "empty captions, and missing values written as text, such as nan, None or null, are left out: "
    f"correct them{_KEEP_BLANK}",
    NOT_A_TEXT: "the field must hold one text, or with .* a list of texts: name another field, or the element of a "
    "list, such as json:captions.0, or all of them, json:captions.*",
    TOO_MANY: "name one of them, such as json:captions.0, or write fewer",
    NO_FIELD: "every .json needs the field that --caption (data.caption in a run file) names: correct its name",
    BAD_JSON: "the .json with the caption is damaged, or larger than 1 MiB: write it again",
    "duplicate key": "keys must be unique in a tar: rename the members",
    "sample at the cut": "the tar ends inside the sample: fetch it again",
}
# Reasons that lose no sample.
_APART, _OTHER = "member apart from its sample", "member of no sample"
# Files that are given for a tar: first bytes, name, remedy.
_OTHER_FORMATS = (
    (b"\x1f\x8b", "gzip-compressed", "decompress it with gzip -dc"),
    (b"BZh", "bzip2-compressed", "decompress it with bzip2 -dc"),
    (b"\xfd7zXZ\0", "xz-compressed", "decompress it with xz -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "decompress it with zstd -dc"),
    (b"\x04\x22\x4d\x18", "lz4-compressed", "decompress it with lz4 -dc"),
    (b"PK\x03\x04", "a zip archive", "unpack it and write its files into a tar"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and write its files into a tar"),
    (b"PAR1", "a parquet file", "write its images and captions into tars, such as with img2dataset"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the tar itself with git lfs pull"),
)


def remedy(reason: str, caption: CaptionSource) -> str:
    """The rule that a lost sample breaks, and what to do."""
    rule = LOST[reason].replace(".txt", f".{caption.ending}")
    if caption.several:
        rule = rule.removesuffix(_KEEP_BLANK)
    return rule.replace("tools/index_shards.py ", f"tools/index_shards.py {caption.option}")


@dataclass
class TarScan:
    """The samples of one tar, and what was skipped.

    Attributes:
        keep_blank: whether blank captions are used.
        keys: the key of every sample, in tar order.
        members: for every sample the 8 columns of `ShardTable.members`.
        dropped: names of the skipped members and samples by reason.
        bytes: size of the tar.
        sha256: of the whole tar, if it was hashed.
        blank: number of blank captions.
        damage: the reason why the tar could not be read to its end; None for an intact tar.
    """

    caption: CaptionSource = TXT
    keep_blank: bool = False
    keys: list[str] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    bytes: int = 0
    sha256: str | None = None
    blank: int = 0
    damage: str | None = None
    _seen: set[str] = field(default_factory=set)
    _kinds: set[Kind] = field(default_factory=set)  # of the samples so far
    _incomplete: dict[str, set[Kind]] = field(default_factory=dict)  # kinds of groups that are no sample, by key
    _not_decoded: dict[str, str] = field(default_factory=dict)  # extension of their other images, by key

    def drop(self, reason: str, name: str) -> None:
        """Record a skipped member or sample."""
        # Escaped: a name that is not UTF-8 could not be logged or stored.
        self.dropped.setdefault(reason, []).append(name if is_safe(name) else repr(name)[1:-1])

    def add(self, group: MemberGroup, tar: TarBytes) -> None:
        """Use a group as a sample, or drop it with a reason. tar: where the caption is read."""
        for key in (dotted := group.dotted_keys() if group.dotted else []):
            self.drop("key with a dot", key)
        if group.key not in self._seen and (problem := self._caption_problem(group, tar)):
            del group.members["text"]
            if "cls" not in group.members:  # a class makes it a sample nevertheless
                self._seen.add(group.key)
                self.drop(problem, group.key)
                return
        complete = "image" in group.members and ("text" in group.members or "cls" in group.members)
        if group.at_damage and not (complete and self._kinds and self._kinds <= group.members.keys()):
            # More members may have followed: keep it only when it has the kinds of the other samples.
            self.drop(_APART if group.key in self._seen else "sample at the cut", group.key)
        elif not complete:
            if not group.members and not dotted:
                self.drop(_OTHER, group.key)
            elif not dotted or "image" in group.members:
                self._incomplete.setdefault(group.key, set()).update(group.members)
                if group.not_decoded:
                    self._not_decoded[group.key] = group.not_decoded
        elif group.key in self._seen:
            self.drop("duplicate key", group.key)
        else:
            self._seen.add(group.key)
            self._kinds |= group.members.keys()
            self.keys.append(group.key)
            get = group.members.get  # the order of COLUMN
            self.members.append(
                [*get("image", _ABSENT), *get("text", _ABSENT), *get("json", _ABSENT), *get("cls", _ABSENT)]
            )

    def _caption_problem(self, group: MemberGroup, tar: TarBytes) -> str | None:
        """The reason why the caption of an image cannot be used; None for a good one, and where there is none."""
        if "image" not in group.members or "text" not in group.members:
            return None
        offset, size = group.members["text"]
        if size > self.caption.max_bytes:
            return BAD_JSON if self.caption.field else None  # the reader refuses a text of that size
        try:
            texts = self.caption.extract(tar.read(offset, size))
        except CaptionError as error:
            return str(error)
        blank = is_blank(decode_text(texts[0], "replace"))
        self.blank += blank
        return BLANK if blank and not self.keep_blank else None

    def finish(self) -> None:
        """Give every incomplete group its reason, once all groups are known."""
        for key, kinds in self._incomplete.items():
            if "image" not in kinds:
                other = f" but with a .{ext}, which is not decoded" if (ext := self._not_decoded.get(key)) else ""
                self.drop(_APART if key in self._seen else f"sample without an image{other}", key)
            elif kinds & {"text", "cls"} and key not in self._seen:
                self.drop("members not adjacent", key)
            else:
                self.drop("sample without a text", key)
        self._incomplete.clear()


@dataclass(slots=True)
class MemberGroup:
    """Neighbouring members with one key; a sample when it has an image and a text or class."""

    key: str
    members: dict[Kind, tuple[int, int]] = field(default_factory=dict)  # offset and size of the kinds that are read
    spans: list[tuple[int, int]] = field(default_factory=list)  # first byte and end of all members, with their headers
    at_damage: bool = False
    image: str = ""  # extension of the image
    not_decoded: str = ""  # extension of an image in another format
    dotted: dict[str, set[Kind]] = field(default_factory=dict)  # kinds of the members named KEY.NAME.EXT, by NAME

    def dotted_keys(self) -> list[str]:
        """The names that look like samples of their own with a dot in their key.

        An extra image of a complete sample, such as a.seg.png, is none; with a caption a.seg.txt it is.
        """
        if "image" in self.members:
            names = [name for name, kinds in self.dotted.items() if "image" in kinds and len(kinds) > 1]
        else:
            names = [name for name, kinds in self.dotted.items() if "image" in kinds] or list(self.dotted)
        return [f"{self.key}.{name}" for name in names]


def member_groups(tar: TarBytes, scan: TarScan) -> Iterator[MemberGroup]:
    """The groups of a tar in order; skipped members are recorded in `scan`.

    Raises:
        OSError: the tar cannot be read.
        TarDamage: the tar is damaged; raised after the group that was cut.
    """
    group: MemberGroup | None = None
    kinds = _kinds(scan.caption)
    stop = 0
    try:
        for member in members(tar):
            start, stop = stop, member.stop
            if (split := _accept(member, scan)) is None:
                continue
            key, rest = split
            ending = rest.lower()
            kind = kinds.get(ending)
            if group is not None and group.key == key and kind == "image" and group.image not in ("", ending):
                # Of several images the one whose extension comes first in the list is used.
                if IMAGE_EXTENSIONS.index(ending) < IMAGE_EXTENSIONS.index(group.image):
                    del group.members["image"]
                else:
                    kind = None
            if group is None or group.key != key or kind in group.members:
                if group is not None:
                    yield group
                group = MemberGroup(key)
            group.spans.append((start, stop))
            if kind is not None:
                group.members[kind] = (member.offset, member.size)
                if kind == "image":
                    group.image = ending
                elif kind == "json" and scan.caption.field:
                    group.members["text"] = group.members["json"]
            elif ending in OTHER_EXTENSIONS:
                group.not_decoded = ending
            else:
                name, dot, extension = rest.rpartition(".")
                if dot and (dotted := kinds.get(extension.lower(), "json")) != "json":
                    group.dotted.setdefault(name, set()).add(dotted)
    except (TarDamage, OSError):
        if group is not None:
            group.at_damage = True
            yield group
        raise
    if group is not None:
        yield group


def _kinds(caption: CaptionSource) -> dict[str, Kind]:
    """The kind of a member by its ending."""
    if _KIND_OF_EXTENSION.get(caption.ending, "json") != "json":
        raise UserError(
            f"caption is {caption.spec!r}, which is the ending of images, expected one of members with text: correct it"
        )
    return {caption.ending: "text", **_KIND_OF_EXTENSION}


def scan_tar(path: Path, caption: CaptionSource = TXT, *, keep_blank: bool = False, hashed: bool = False) -> TarScan:
    """Read the headers and captions of a tar and group its members into samples.

    hashed: read the whole tar, once, and set `sha256`; otherwise only headers and captions are read.

    Raises:
        OSError: it cannot be opened; with `hashed`, it cannot be read.
        UserError: the caption source names images; with `hashed`, the tar was written to meanwhile.
    """
    scan = TarScan(caption, keep_blank)
    with TarBytes(path, hashed=hashed) as tar:
        scan.bytes = tar.size
        try:
            for group in member_groups(tar, scan):
                scan.add(group, tar)
        except (TarDamage, OSError) as error:
            scan.damage = str(error)
        scan.finish()
        scan.sha256 = tar.sha256() if hashed else None
        if hashed and scan.sha256 is None:
            raise UserError(
                f"{path} was written to while it was read, expected a complete tar: run the same command again when "
                "nothing writes to it"
            )
    return scan


def other_format(path: Path) -> tuple[str, str] | None:
    """(what the file is, remedy) when it is of a known kind that is no plain tar; None otherwise."""
    with open(path, "rb") as file:
        return known_format(file.read(32))


def known_format(head: bytes) -> tuple[str, str] | None:
    """`other_format` of a file that begins with these bytes."""
    return next(((name, remedy) for magic, name, remedy in _OTHER_FORMATS if head.startswith(magic)), None)


def extensions(path: Path, limit: int = 1000) -> list[str]:
    """The endings of the first `limit` members of a tar, the most frequent first."""
    counts: Counter[str] = Counter()
    with contextlib.suppress(TarDamage, OSError), TarBytes(path) as tar:
        for member in islice(members(tar), limit):
            if not member.directory and is_safe(member.name):
                counts[os.path.splitext(member.name)[1] or "no ending"] += 1
    return [ending for ending, _ in counts.most_common(8)]


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
    stem, _, extension = base.partition(".")
    if not stem or stem == base:
        return None
    return (f"{directory}/{stem}" if directory else stem), extension
