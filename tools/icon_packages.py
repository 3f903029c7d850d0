"""Icon sets of two packages: the npm package @iconify/json (SVG) and the wheel qtawesome (icon fonts).

Files are read from a path: the archive as the registry serves it, or the folder that it unpacks to.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megacid.errors import UserError, one_line

FREE_LICENCES = ("Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "MPL-2.0", "OFL-1.1")
FREE_LICENCES += ("Unlicense",)
_LAYOUT = "expected @iconify/json (collections.json, json/*.json) or qtawesome (fonts/*.ttf with charmaps)"
_AGAIN = "download the package again"

_MATERIAL = ("Material Design Icons", "Pictogrammers", "Apache-2.0", "https://github.com/Templarian/MaterialDesign")
_AWESOME = ("Font Awesome", "Fonticons", "OFL-1.1", "https://fontawesome.com")
# File name up to the version -> prefix, title, author, licence, URL. qtawesome's README names the licences.
FONTS = {
    "codicon": ("msc", "Codicons", "Microsoft", "CC-BY-4.0", "https://github.com/microsoft/vscode-codicons"),
    "elusiveicons": ("el", "Elusive Icons", "Team Redux", "OFL-1.1", "http://elusiveicons.com"),
    "fontawesome5-brands": ("fa5-brands", *_AWESOME),
    "fontawesome5-regular": ("fa5-regular", *_AWESOME),
    "fontawesome5-solid": ("fa5-solid", *_AWESOME),
    "fontawesome6-brands": ("fa6-brands", *_AWESOME),
    "fontawesome6-regular": ("fa6-regular", *_AWESOME),
    "fontawesome6-solid": ("fa6-solid", *_AWESOME),
    "materialdesignicons5": ("mdi5", *_MATERIAL),
    "materialdesignicons6": ("mdi6", *_MATERIAL),
    "phosphor": ("ph", "Phosphor", "Phosphor Icons", "MIT", "https://github.com/phosphor-icons/phosphor-home"),
    "remixicon": ("ri", "Remix Icon", "Remix Design", "Apache-2.0", "https://github.com/Remix-Design/RemixIcon"),
}


class Icon(NamedTuple):
    """An icon of a set. drawing: an SVG document, or the character of the set's font."""

    prefix: str
    name: str
    drawing: str


@dataclass
class IconSet:
    """The icons of a set, by name, and who made them under which licence (SPDX, None: it states none)."""

    prefix: str
    title: str
    author: str
    licence: str | None
    url: str
    drawings: dict[str, str]
    suffixes: list[str] = field(default_factory=list)  # of names, as the set declares its styles
    prefixes: list[str] = field(default_factory=list)
    font: bytes | None = None

    @property
    def is_free(self) -> bool:
        return self.licence in FREE_LICENCES


@dataclass
class IconPackage:
    """kind: iconify or fonts; version: of the package; sets: by prefix, sorted."""

    kind: str
    version: str
    sets: dict[str, IconSet]

    def digest(self) -> str:
        """sha256 of the sets with their icons, whether they came from an archive or a folder."""
        digest = hashlib.sha256()
        for icons in self.sets.values():
            digest.update(f"{icons.prefix}\0{icons.licence}\0{icons.suffixes}\0{icons.prefixes}\n".encode())
            digest.update(icons.font or b"")
            for name, drawing in icons.drawings.items():
                digest.update(f"{name}\0{drawing}\n".encode())
        return digest.hexdigest()


def read_package(path: Path) -> IconPackage:
    """Read all sets of a package. Raises UserError when it is missing, cut, or of another layout."""
    package = IconPackage("", "", {})
    files: dict[str, bytes] = {}
    for name, data in _files(path):
        if re.search(r"(^|/)json/[^/]+\.json$", name):
            icons = _iconify_set(path, name, data)
            package.sets[icons.prefix] = icons
        else:
            files[name.rpartition("/")[2]] = data
    if "collections.json" in files:
        package.kind, package.version = "iconify", _version(files)
        listed = _json(path, "collections.json", files["collections.json"])
        if missing := sorted(set(listed) - set(package.sets)):
            raise UserError(
                f"{path} lacks {len(missing)} of the {len(listed)} sets that its collections.json lists, the first one "
                f"is json/{missing[0]}.json: {_AGAIN}"
            )
    elif fonts := sorted(name for name in files if name.endswith(".ttf")):
        package.kind, package.version = "fonts", _version(files)
        package.sets = {icons.prefix: icons for icons in (_font_set(path, name, files) for name in fonts)}
    else:
        raise UserError(f"{path} has neither collections.json nor fonts, {_LAYOUT}: correct the path")
    package.sets = dict(sorted(package.sets.items()))
    return package


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of a package that are read."""
    if not path.exists():
        raise UserError(f"{path} does not exist, expected an icon package: download it as docs/corpus.md says")
    try:
        if path.is_dir():
            for name in (*path.glob("*.json"), *path.glob("json/*.json"), *path.glob("fonts/*.[jt][st]*")):
                yield str(name.relative_to(path)), name.read_bytes()
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                for name in wheel.namelist():
                    if _is_read(name):
                        yield name, wheel.read(name)
        else:
            with tarfile.open(path, "r:gz") as archive:
                for member in archive:
                    if member.isfile() and _is_read(member.name):
                        yield member.name, archive.extractfile(member).read()  # type: ignore[union-attr]
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}), {_LAYOUT}: {_AGAIN}") from None


def _is_read(name: str) -> bool:
    return name.endswith((".json", ".ttf", ".dist-info/METADATA"))


def _version(files: Mapping[str, bytes]) -> str:
    """The version that package.json, or METADATA of a wheel, states."""
    text = files.get("METADATA", b"").decode(errors="replace") or files.get("package.json", b"").decode(
        errors="replace"
    )
    match = re.search(r'^(?:Version: |\s*"version":\s*")([^"\s]+)', text, re.MULTILINE)
    return match[1] if match else "unknown"


def _json(path: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {name} is not JSON ({one_line(error)}): {_AGAIN}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name} holds {type(value).__name__}, expected a block {{...}}: {_AGAIN}")
    return value


def _iconify_set(path: Path, name: str, data: bytes) -> IconSet:
    """A set in IconifyJSON's format; its aliases, which draw the same icons again, are not read."""
    stored = _json(path, name, data)
    try:
        info = stored.get("info") or {}
        licence, author = info.get("license") or {}, info.get("author") or {}
        frame = {key: stored.get(key, value) for key, value in (("left", 0), ("top", 0), ("width", 16), ("height", 16))}
        return IconSet(
            prefix=str(stored["prefix"]),
            title=str(info.get("name", stored["prefix"])),
            author=str(author.get("name", "unknown")),
            licence=licence.get("spdx"),
            url=str(author.get("url") or licence.get("url") or ""),
            drawings={str(key): _svg({**frame, **icon}) for key, icon in sorted(stored["icons"].items())},
            suffixes=sorted(filter(None, stored.get("suffixes") or {})),
            prefixes=sorted(filter(None, stored.get("prefixes") or {})),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path}: {name} is not in IconifyJSON's format ({what}), {_LAYOUT}: {_AGAIN}") from None


def _svg(icon: Mapping[str, Any]) -> str:
    """An SVG document of the icon's body, in the middle of a square."""
    left, top, width, height = (float(icon[key]) for key in ("left", "top", "width", "height"))
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{side:g}" '
        f'height="{side:g}" viewBox="{box}">{icon["body"]}</svg>'
    )


def _font_set(path: Path, font: str, files: Mapping[str, bytes]) -> IconSet:
    """The glyphs that the charmap (a JSON file, name -> code point in hexadecimal) of a font file names."""
    kind, _, version = font.removesuffix(".ttf").replace("-webfont", "").rpartition("-")
    charmap = f"{font.removesuffix(f'-{version}.ttf')}-charmap-{version}.json"
    if kind not in FONTS:
        return IconSet(kind, kind, "unknown", None, "", {})  # its licence is not known
    if charmap not in files:
        raise UserError(f"{path} has {font} without {charmap}, {_LAYOUT}: {_AGAIN}")
    prefix, title, author, licence, url = FONTS[kind]
    try:
        names = {name: chr(int(code, 16)) for name, code in sorted(_json(path, charmap, files[charmap]).items())}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {charmap} has no hexadecimal code points ({one_line(error)}): {_AGAIN}") from None
    return IconSet(prefix, title, author, licence, url, names, font=files[font])
