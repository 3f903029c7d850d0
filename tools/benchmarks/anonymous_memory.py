"""The anonymous memory of this process, and its peak.

The offline stages read mapped files, whose resident pages the kernel reclaims at will: their memory limit is one on
anonymous memory.
"""

from __future__ import annotations

import threading

from benchmarks.measure import proc_bytes

_EVERY_S = 0.002


def anonymous_bytes() -> int:
    return proc_bytes("/proc/self/status", "RssAnon")


class PeakAnonymous:
    """`with PeakAnonymous() as peak:`, then `peak.bytes`: the largest RssAnon, sampled every two milliseconds."""

    def __enter__(self) -> PeakAnonymous:
        self.bytes, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
