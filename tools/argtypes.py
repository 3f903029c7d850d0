"""Argument types and the parser of the tools: an argument mistake is one line on stderr and exit code 2."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import checkout  # noqa: F401  import paths of a plain checkout
from megacid.errors import UserError

LARGEST_INT = 2**31 - 1
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class ToolParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors; the description keeps its line breaks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ').replace(': is ', ' is ', 1)}; see --help")


def integer(least: int = 0, most: int = LARGEST_INT) -> Callable[[str], int]:
    """The type of an option that takes whole numbers of [least, most]."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            limit = f"{least:,} or more" if most == LARGEST_INT and value < least else f"{least:,} to {most:,}"
            raise argparse.ArgumentTypeError(f"is {text[:40]}, expected a whole number, {limit}")
        return value

    return convert


def real(least: float = 0.0, most: float = math.inf, *, without: tuple[float, ...] = ()) -> Callable[[str], float]:
    """The type of an option that takes finite numbers of [least, most], bounds in `without` excluded."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most) or value in without:
            low = f"above {least:g}" if least in without else f"{least:g} or more"
            high = "" if most == math.inf else f" and {'below' if most in without else 'at most'} {most:g}"
            raise argparse.ArgumentTypeError(f"is {text[:40]}, expected a finite number, {low}{high}")
        return value

    return convert


def local_path(text: str) -> Path:
    """The type of an option that takes a path on a disk."""
    if _URL.match(text):
        raise argparse.ArgumentTypeError(
            f"is {text[:200]}, a URL, expected a path on a disk: name one, and copy its files from or to the store"
        )
    return Path(text)


natural, positive, seed_number = integer(0), integer(1), integer(0, 2**63 - 1)
share = real(0, 1)
share_of_all = real(0, 1, without=(0,))  # above 0 and up to 1
