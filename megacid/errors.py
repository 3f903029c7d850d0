"""What a user can put right, how a tool says so, and the exit codes of every program here.

0    finished                          2    the user can put it right (one line says how)
65   too many non-finite steps         66   too many damaged samples
70   the ranks hold different things   74   several checkpoints in a row could not be written
75   a rank stalled, or another rank is gone: start the same command again
130  Ctrl-C                            143  stopped by SIGTERM or SIGUSR1, what is needed to go on is saved
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable

EXIT_USER, EXIT_NOT_FINITE, EXIT_DATA = 2, 65, 66
EXIT_DISAGREE, EXIT_NOT_SAVED, EXIT_AGAIN, EXIT_STOPPED = 70, 74, 75, 143


class UserError(ValueError):
    """Something the user can put right. The message names the value found, what was wanted, and the remedy.

    on_every_rank: all ranks raise it together, so that one of them says it for all.
    """

    on_every_rank = False


def run_tool(main: Callable[[], int | None]) -> int:
    """Run a tool's `main`: UserError becomes one line on stderr and exit code 2."""
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("error: interrupted; what was complete is kept, run the same command to go on", file=sys.stderr)
        return 130


def nearest(key: str, known: list[str]) -> str:
    """For messages: the likeliest of the known names, or all of them."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known are {', '.join(sorted(known))}"


def one_line(error: Exception, limit: int = 300) -> str:
    """The message of another library's exception on one line, truncated."""
    return " ".join(str(error).split())[:limit]
