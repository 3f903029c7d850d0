"""The tars that a setting or an option names: directories, tars, globs and brace patterns, joined by `::`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from megacid.errors import UserError

_MAX_TARS = 1_000_000
_URL = re.compile(r"pipe:|file:|[a-z][a-z0-9+.-]*://?", re.IGNORECASE)
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


@dataclass(frozen=True)
class ShardPaths:
    """The tars that were named.

    Attributes:
        tars: sorted by name, which is unique.
        source: what was given, with absolute paths.
        directory: the directory when all tars of one are meant; None otherwise.
    """

    tars: list[Path]
    source: str
    directory: Path | None

    @property
    def root(self) -> Path:
        """The directory, or the one above all tars."""
        return self.directory or Path(os.path.commonpath([tar.absolute().parent for tar in self.tars]))

    @property
    def folders(self) -> list[Path]:
        """The directories of the tars; an empty one, too, when it was named alone."""
        return [self.directory] if self.directory else list(dict.fromkeys(tar.parent for tar in self.tars))

    def __str__(self) -> str:
        """For messages."""
        text = str(self.directory or self.source)
        return text if len(text) <= 200 else f"{text[:200]} ..."


def find_shards(spec: str | Path) -> ShardPaths:
    """The tars of one or more directories, .tar files, globs or brace patterns.

    Raises:
        UserError: one does not exist or is remote, or two tars have the same name.
    """
    parts = _split(str(spec))
    if len(parts) == 1 and os.path.isdir(parts[0]):
        directory = Path(parts[0])
        return ShardPaths(tars_of(directory), str(directory.resolve()), directory)
    by_name: dict[str, Path] = {}
    for tar in (tar for part in parts for tar in _tars_of_part(part)):
        if (other := by_name.setdefault(tar.name, tar)) is not tar:
            raise UserError(
                f"{other} and {tar} have the same name, expected unique ones, which samples are known by: rename one "
                "of them, or name it once"
            )
    tars = [by_name[name] for name in sorted(by_name)]
    return ShardPaths(tars, "::".join(os.path.abspath(part) for part in parts), None)


def tars_of(directory: Path) -> list[Path]:
    """The tars of a directory, sorted. UserError for one that is not a file: less data would be used without notice."""
    tars = sorted(path for path in directory.iterdir() if path.name.endswith(".tar") and path.name[0] != ".")
    for path in tars:
        if not path.is_file():
            kind = "a broken link" if path.is_symlink() and not path.exists() else "not a regular file"
            raise UserError(f"{path} is {kind}, expected a tar: restore it, or move it out of {directory}")
    return tars


def _split(text: str) -> list[str]:
    """The parts between `::`, with ~ expanded. UserError for what is not a local path."""
    if "\0" in text:
        raise UserError(f"shards is {text[:80]!r}, expected a path without zero characters: correct it")
    parts = [text] if os.path.exists(text) else [part for part in text.split("::") if part]
    if not parts:
        raise UserError(f"shards is {text[:80]!r}, expected a directory with .tar files: name it")
    for part in parts:
        if os.path.exists(part):
            continue
        if _URL.match(part):
            if part.lower().startswith("file:"):
                raise UserError(f"shards is {part[:200]!r}, a URL of local files: write the path alone")
            raise UserError(
                f"shards is {part[:200]!r}: remote shards are not read yet; copy them to a disk (such as with aws s3 "
                "sync, gsutil rsync or wget) or mount them, and give that directory"
            )
        if "$" in part:
            raise UserError(f"shards is {part[:200]!r}, and variables are not expanded: write the whole path")
    return [part if os.path.exists(part) else os.path.expanduser(part) for part in parts]


def _tars_of_part(part: str) -> Iterator[Path]:
    """The tars of a directory, a file, a glob or a brace pattern. UserError when one is missing."""
    names, missing = [part] if os.path.exists(part) else _expand_braces(part), []
    for name in names:
        paths = [Path(name)] if os.path.exists(name) else _matches(name)
        if not paths:
            missing.append(name)
        for path in paths:
            tars = tars_of(path) if path.is_dir() else [path]
            if not tars or not path.exists() or not tars[0].name.endswith(".tar"):
                raise UserError(f"{path} is neither a .tar file nor a directory with some: rename it, or leave it out")
            yield from tars
    if len(names) == 1 and missing:
        what = "matches no .tar file" if glob.has_magic(part) else "does not exist"
        raise UserError(f"shards {part[:200]} {what}: correct it, or make one with img2dataset or tools/synthesize.py")
    if missing:
        raise UserError(
            f"{len(missing):,} of the {len(names):,} shards of {part[:200]} do not exist, the first is {missing[0]}: "
            "correct the numbers, or fetch them"
        )


def _matches(pattern: str) -> list[Path]:
    """What a glob matches, without other files than tars."""
    paths = (Path(name) for name in sorted(glob.glob(pattern, recursive=True)))
    return [path for path in paths if (path.is_dir() and tars_of(path)) or path.name.endswith(".tar")]


def _expand_braces(part: str) -> list[str]:
    ranges = [abs(int(stop[:19]) - int(start[:19])) for start, stop in _RANGE.findall(part)]
    try:
        names = [] if max(ranges, default=0) >= _MAX_TARS else list(islice(braceexpand(part), _MAX_TARS + 1))
    except ValueError:
        raise UserError(
            f"shards is {part[:200]}, whose braces do not match: write for example {{00000..00099}}.tar"
        ) from None
    if not 0 < len(names) <= _MAX_TARS:
        raise UserError(f"shards {part[:200]} names more than {_MAX_TARS:,} tars: correct the numbers")
    return names
