"""The anonymous memory of this process, and its peak.

The offline stages read mapped files, whose resident pages the kernel reclaims at will: their memory limit is one on
anonymous memory.
"""

from __future__ import annotations

import os
import threading
import time

from megacid.errors import UserError

_EVERY_S, _SAMPLES = 0.002, 1000  # of a long stage: sampling must not take a share of its time on a busy machine


def anonymous_bytes() -> int:
    """Resident memory without mapped files and shared memory."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"there is no /proc/self/statm ({error.strerror}): measure on Linux") from None
    try:
        resident, shared = os.pread(file, 200, 0).split()[1:3]
    finally:
        os.close(file)
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class PeakAnonymous:
    """`with PeakAnonymous() as peak:`, then `peak.bytes`: the largest anonymous memory, sampled every two milliseconds,
    and in a block of more than two seconds every thousandth of its time so far."""

    def __enter__(self) -> PeakAnonymous:
        self.bytes, self._stop, self._began = anonymous_bytes(), threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(max(_EVERY_S, (time.monotonic() - self._began) / _SAMPLES)):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
