"""What a user can put right, and how a tool says so."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can put right. The message names the value found, what was wanted, and the remedy."""


def run_tool(main: Callable[[], int | None]) -> int:
    """Run a tool's `main`: UserError becomes one line on stderr and exit code 2."""
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; what was complete is kept, run the same command to go on", file=sys.stderr)
        return 130


def nearest(key: str, known: list[str]) -> str:
    """For messages: the likeliest of the known names, or all of them."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known are {', '.join(sorted(known))}"
