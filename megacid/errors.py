"""UserError (an error that the user can fix), command-line error reporting, and the exit codes.

0    finished                           2    UserError: one line on stderr says what to fix
65   too many non-finite steps          66   too many damaged samples
70   the ranks have different settings, data or weights
74   several checkpoints in a row could not be written
75   a rank stalled, or another rank has ended: run the same command again
130  stopped by Ctrl-C                  143  stopped by SIGTERM or SIGUSR1: run the same command again to continue
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Callable

EXIT_USER, EXIT_NOT_FINITE, EXIT_DATA = 2, 65, 66
EXIT_DISAGREE, EXIT_NOT_SAVED, EXIT_AGAIN, EXIT_INTERRUPTED, EXIT_STOPPED = 70, 74, 75, 130, 143


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
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("error: interrupted; complete output is kept, run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED


# Without tab and newline. The characters beyond C1 reorder a line, end it, or cannot be encoded.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with control characters as escapes, such as ESC as \\x1b: keys and captions may hold any."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class LogFormatter(logging.Formatter):
    """Formats log records with control characters, also the newlines of a message, as escapes."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  of the base class
        record.message = record.message.replace("\n", "\\n")
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def nearest(key: str, known: list[str]) -> str:
    """For messages: the known name that is closest to `key`, or all of them."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known are {', '.join(sorted(known))}"


def one_line(error: Exception, limit: int = 300) -> str:
    """The message of another library's exception on one line, truncated."""
    return " ".join(str(error).split())[:limit]
