"""Progress of tools and training: a bar on a terminal, plain lines at intervals where stderr is a file or a pipe."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_INTERVAL_S = 30.0
_REDRAW_S = 0.1


class _Terminal:
    """The bars of this process on its terminal, below what it logs and prints; rich draws them."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._stderr = sys.stderr
        console = Console(stderr=True, soft_wrap=True)
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}")
        # No thread redraws, since data workers are forked. stdout joins in only where it is the terminal, too.
        self.progress: Progress = Progress(
            *columns, console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty()
        )
        self.progress.start()
        console.show_cursor(True)  # nothing would show it again after a kill
        self._redirect_logging(self._stderr, sys.stderr)
        self.open = 0

    def _redirect_logging(self, before: TextIO, after: TextIO) -> None:
        """Let the log handlers write through rich, which prints above the bars."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(after)

    def close(self) -> None:
        self._redirect_logging(sys.stderr, self._stderr)
        self.progress.stop()


_terminal: _Terminal | None = None


class ProgressBar:
    """Counts units of work on stderr. A context manager; see `progress_bar`."""

    def __init__(self, desc: str, unit: str, total: int | None, initial: int, enabled: bool) -> None:
        global _terminal
        self.desc, self.unit, self.total, self._enabled = desc, unit, total, enabled
        self.n = self._initial = initial
        self._shown_n = initial
        self._began = self._shown = time.monotonic()
        self._drawn: _Terminal | None = None
        if enabled and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._drawn = _terminal = _terminal or _Terminal()
            self._drawn.open += 1
            self._task = self._drawn.progress.add_task(desc, total=total, completed=initial, status="")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def elapsed(self) -> float:
        """Seconds since the start or the last `reset`."""
        return time.monotonic() - self._began

    def reset(self, total: int) -> None:
        """Start again at 0 with another number of units."""
        self.total, self.n, self._initial, self._began = total, 0, 0, time.monotonic()

    def update(self, units: int = 1) -> None:
        """Add to the units done."""
        self.n += units
        if time.monotonic() - self._shown >= (LINE_INTERVAL_S if self._drawn is None else _REDRAW_S):
            self._show()

    def close(self) -> None:
        """Show the last state. May be called again."""
        global _terminal
        if self._drawn is not None or self.n != self._shown_n:
            self._show()
        self._enabled = False
        if self._drawn is not None:
            self._drawn.open -= 1
            if self._drawn.open == 0:
                self._drawn.close()
                _terminal = None
            self._drawn = None

    def _show(self) -> None:
        if not self._enabled:
            return
        self._shown, self._shown_n = time.monotonic(), self.n
        if self._drawn is None:
            with contextlib.suppress(OSError):  # a closed pipe ends no work
                print(f"{self.desc}: {self._status()}", file=sys.stderr, flush=True)
            return
        self._drawn.progress.update(
            self._task, description=self.desc, total=self.total, completed=self.n, status=self._status()
        )
        self._drawn.progress.refresh()

    def _status(self) -> str:
        elapsed = self.elapsed
        rate = (self.n - self._initial) / max(elapsed, 1e-9)
        speed = f"{_short(rate)}{self.unit}/s"
        if not self.total:
            return f"{_short(self.n)} [{_clock(elapsed)}, {speed}]"
        left = _clock((self.total - self.n) / rate) if rate > 0 else "?"
        share = f"{100 * self.n / self.total:3.0f}%"
        return f"{share}| {_short(self.n)}/{_short(self.total)} [{_clock(elapsed)}<{left}, {speed}]"


def progress_bar(
    desc: str, unit: str, total: int | None = None, *, initial: int = 0, enabled: bool = True
) -> ProgressBar:
    """A bar on stderr; without a terminal, a line every LINE_INTERVAL_S seconds and one at the end.

    Args:
        total: Units to do; None: set later, by `reset`.
        initial: Units that an earlier start has done.
        enabled: False on ranks that report nothing.
    """
    return ProgressBar(desc, unit, total, initial, enabled)


def _short(number: float) -> str:
    """Three digits with a decimal prefix, such as 1.00k."""
    power = 0
    while abs(number) >= 999.5 and power < 4:
        number, power = number / 1000, power + 1
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}{['', 'k', 'M', 'G', 'T'][power]}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes:02d}:{rest:02d}"
