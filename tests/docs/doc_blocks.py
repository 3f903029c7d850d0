"""Fenced code blocks of the project's Markdown files, with the comments that mark them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
_FENCE = re.compile(r"^```(\w*)\s*$")
_MARK = re.compile(r"^<!-- (needs|file|ranks): (.*?) -->$")


@dataclass
class Block:
    """marks: the comment directly above the fence, `needs`, `file` or `ranks` -> its text."""

    page: Path
    line: int
    language: str
    text: str
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        end = next(i for i in range(number + 1, len(lines)) if lines[i] == "```")
        mark = _MARK.match(lines[number - 1]) if number else None
        marks = {mark[1]: mark[2]} if mark else {}
        if fence[1] == language:
            found.append(Block(page, number + 2, language, "\n".join(lines[number + 1 : end]) + "\n", marks))
        number = end + 1
    return found
