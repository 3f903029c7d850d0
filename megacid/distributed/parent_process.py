"""Parent-death signals: a process that must not outlive the one that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def set_parent_death_signal(number: int) -> None:
    """Let the kernel send signal `number` to this process when the thread that started it ends. Linux only."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def start_child_process(parent: int) -> None:
    """Called first in a forked process, with the id of its parent: the kernel kills the process with its parent.

    Resets the signal handlers: the process must neither run those of its parent nor print at Ctrl-C.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the line above
        os._exit(1)
