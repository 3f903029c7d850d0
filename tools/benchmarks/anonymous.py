"""Anonymous memory of this process, and its peak.

The stages read mapped files, whose resident pages the kernel takes back when it wants; a bound on memory is one on the rest.
"""

from __future__ import annotations

import threading

from benchmarks.measure import proc_bytes

_EVERY_S = 0.002


def anonymous_bytes() -> int:
    return proc_bytes("/proc/self/status", "RssAnon")


class PeakOfAnonymous:
    """`with PeakOfAnonymous() as peak:` then `peak.bytes`: the largest RssAnon, looked at every two milliseconds."""

    def __enter__(self) -> PeakOfAnonymous:
        self.bytes, self._done = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_S):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
