"""Arguments of the form LABEL=SOURCE, and the labels of what a figure compares."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megacid.errors import UserError


class Source(NamedTuple):
    """A file, directory or model; label: its name in the legend, None for one of its own."""

    label: str | None
    text: str


def source(text: str) -> Source:
    """The type of an option LABEL=SOURCE or SOURCE. A path that exists has no label, also if it has a "="."""
    label, sign, rest = text.partition("=")
    return Source(label, rest) if sign and not Path(text).exists() else Source(None, text)


def check_distinct(labels: Iterable[str]) -> None:
    """Raises UserError when two of them are equal."""
    labels = list(labels)
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two of the sources are called {label!r}, expected different names: write LABEL=SOURCE")
