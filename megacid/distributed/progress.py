"""Progress bars of all tools: a bar on a terminal, plain lines at intervals where stderr is a file or a pipe."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

LINE_INTERVAL_S = 30.0
_LINE = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


class _Lines:
    """Turns what tqdm writes, a carriage return and a bar, into lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(
    desc: str, unit: str, total: int | None = None, *, enabled: bool = True, smoothing: float = 0.3
) -> tqdm:
    """A tqdm bar on stderr; without a terminal, a line every LINE_INTERVAL_S seconds and one at the end.

    Args:
        total: Units to do; None: set later, by `reset`.
        enabled: False on ranks that report nothing.
        smoothing: Of the rate: 0 is the average, 1 the last interval.
    """
    options = {"desc": desc, "unit": unit, "total": total, "smoothing": smoothing, "unit_scale": True}
    if not enabled or sys.stderr.isatty():
        return tqdm(disable=not enabled, **options)
    # A tiny delay omits the line at 0 %; miniters=0 checks the time at every update.
    return tqdm(
        file=_Lines(sys.stderr), bar_format=_LINE, mininterval=LINE_INTERVAL_S, miniters=0, delay=1e-9, **options
    )
