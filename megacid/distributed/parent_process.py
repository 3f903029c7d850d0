"""Parent-death signals: a process that must not outlive the one that started it."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_PR_SET_PDEATHSIG = 1


def set_parent_death_signal(number: int) -> None:
    """Let the kernel send signal `number` to this process when the thread that started it ends. Linux only."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
