"""Small icon packages in the layouts of @iconify/json and qtawesome, drawn here."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from PIL import ImageFont

SHAPES = {
    "bell": '<path d="M4 16h12L12 4H8z"/>',
    "camera": '<rect x="2" y="5" width="16" height="10"/>',
    "home": '<path d="M2 10L10 2l8 8v8H2z"/>',
    "heart": '<path d="M10 18L2 8l4-5l4 3l4-3l4 5z"/>',
    "star": '<path d="M10 1l3 7h6l-5 4l2 7l-6-4l-6 4l2-7l-5-4h6z"/>',
}
FONT_NAMES = ("home", "bell", "star")


def icon_set(prefix: str, licence: str | None, icons: dict[str, str], **more: Any) -> dict[str, Any]:
    info: dict[str, Any] = {
        "name": prefix.title(),
        "author": {"name": f"Author of {prefix}", "url": "https://a.example"},
    }
    if licence:
        info["license"] = {"title": licence, "spdx": licence}
    bodies = {name: {"body": body} for name, body in icons.items()}
    return {"prefix": prefix, "info": info, "icons": bodies, "width": 20, "height": 20, **more}


def outlined(body: str) -> str:
    return f'<g fill="none" stroke="currentColor">{body}</g>'


def redrawn(scale: float, *names: str) -> dict[str, str]:
    """The shapes as another design system draws them."""
    return {name: f'<g transform="scale({scale})">{SHAPES[name]}</g>' for name in names}


def iconify_sets() -> dict[str, dict[str, Any]]:
    """Sets for training, validation and test, one without a licence, one of a licence that is not free.

    Of `tabler`, one SVG is broken, one is blank, one name is no caption, and two icons are the same drawing, as two of
    `bi` are. The heart of `bi` is also in `tabler`.
    """
    train = {name: outlined(body) for name, body in SHAPES.items()}
    train |= {f"{name}-filled": body for name, body in SHAPES.items()}
    train |= {"broken": "<path d=", "blank": "<g/>", "null": SHAPES["bell"], "house": train["home"]}
    train |= {"traffic-light": SHAPES["camera"]}
    test, validation, other = redrawn(0.9, *SHAPES), redrawn(0.8, "home", "star"), redrawn(0.7, "home", "bell")
    test |= {"heart": SHAPES["heart"], "bell-fill": outlined(test["bell"]), "sparkle": test["star"]}
    wide = {name: {"body": SHAPES[name], "width": 40, "left": -10} for name in ("home", "bell")}
    return {
        "bi": icon_set("bi", "MIT", test),
        "iconoir": icon_set("iconoir", "CC0-1.0", {"home": validation["home"], "cog": validation["star"]}),
        "pixelarticons": icon_set("pixelarticons", "ISC", {"house": other["home"], "bell-2": other["bell"]}),
        "secret": icon_set("secret", None, SHAPES),
        "shared": icon_set("shared", "GPL-3.0", {"home": SHAPES["home"]}),
        "tabler": icon_set("tabler", "MIT", train, suffixes={"": "Outline", "filled": "Filled"}),
        "temaki": icon_set("temaki", "CC0-1.0", {}) | {"icons": wide},
    }


def write_iconify(path: Path, sets: dict[str, dict[str, Any]] | None = None) -> Path:
    """The archive as npm serves it, or the folder it unpacks to when `path` has no suffix."""
    sets = iconify_sets() if sets is None else sets
    files = {f"json/{prefix}.json": stored for prefix, stored in sets.items()}
    files |= {"collections.json": {prefix: stored["info"] for prefix, stored in sets.items()}}
    files |= {"package.json": {"name": "@iconify/json", "version": "1.2.3"}}
    if not path.suffix:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(json.dumps(content, indent=1))
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content, indent=1).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_fonts(path: Path) -> Path:
    """A wheel with three icon fonts; a glyph of one is missing, another font is not known."""
    font = ImageFont.load_default(20)
    assert isinstance(font, ImageFont.FreeTypeFont)

    def charmap(letters: str, style: str = "") -> dict[str, str]:
        return {f"{name}{style}": hex(ord(letter)) for name, letter in zip(FONT_NAMES, letters)}

    charmaps = {
        "phosphor-{}1.0": charmap("ABC") | charmap("abc", "-fill"),
        "remixicon-{}2.0": charmap("DEF", "-fill"),
        "codicon-{}0.1": charmap("GHI") | {"nothing": "0x4e00"},
        "mystery-{}0.1": charmap("XYZ"),
    }
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("qtawesome-9.9.dist-info/METADATA", "Metadata-Version: 2.1\nName: QtAwesome\nVersion: 9.9\n")
        for name, names in charmaps.items():
            wheel.writestr(f"qtawesome/fonts/{name.format('')}.ttf", font.font_bytes)
            wheel.writestr(f"qtawesome/fonts/{name.format('charmap-')}.json", json.dumps(names))
    return path
