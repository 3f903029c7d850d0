"""UserError (an error that the user can fix), command-line error reporting, and the exit codes.

0    finished                           2    UserError: one line on stderr says what to fix
65   too many non-finite steps          66   too many damaged samples
70   the ranks have different settings, data or weights
74   several checkpoints in a row could not be written
75   a rank stalled, or another rank has ended: run the same command again
130  Ctrl-C                             143  stopped by SIGTERM or SIGUSR1: run the same command again to continue
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable

EXIT_USER, EXIT_NOT_FINITE, EXIT_DATA = 2, 65, 66
EXIT_DISAGREE, EXIT_NOT_SAVED, EXIT_AGAIN, EXIT_STOPPED = 70, 74, 75, 143


class UserError(ValueError):
    """An error that the user can fix. The message has the value, what was expected, and the remedy.

    on_every_rank: whether all ranks raise it with the same message, which one of them then prints.
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
        print("error: interrupted; complete output is kept, run the same command again to continue", file=sys.stderr)
        return 130


def nearest(key: str, known: list[str]) -> str:
    """For messages: the known name that is closest to `key`, or all of them."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known are {', '.join(sorted(known))}"


def one_line(error: Exception, limit: int = 300) -> str:
    """The message of another library's exception on one line, truncated."""
    return " ".join(str(error).split())[:limit]
