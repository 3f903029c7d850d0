"""A cache of the most recently used values, such as open files."""

from __future__ import annotations

import contextlib
import resource
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class LRUCache(Generic[V]):
    """Keeps the `size` most recently used values and calls `release` on evicted ones. A pickled copy starts empty."""

    def __init__(self, size: int, release: Callable[[V], object] | None = None) -> None:
        self._size, self._release = size, release
        self._items: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of `key`, created by `make` when it is not in the cache."""
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key]
        value = self._items[key] = make()
        while len(self._items) > self._size:
            _, old = self._items.popitem(last=False)
            if self._release:
                self._release(old)
        return value

    def drop(self, unwanted: Callable[[V], bool]) -> None:
        """Release the values for which `unwanted` is true."""
        for key in [key for key, value in self._items.items() if unwanted(value)]:
            value = self._items.pop(key)
            if self._release:
                self._release(value)

    def clear(self) -> None:
        """Release all values."""
        while self._items:
            _, old = self._items.popitem()
            if self._release:
                self._release(old)

    def __getstate__(self) -> dict[str, Any]:
        return {"_size": self._size, "_release": self._release, "_items": OrderedDict()}


def open_file_budget(count: int, caches: int = 1) -> int:
    """How many of `count` files a cache may keep open: at most a quarter of the process's limit, which is raised.

    caches: number of caches of about this size that share the quarter.
    """
    count *= caches
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 4 * count:
        target = 4 * count if hard == resource.RLIM_INFINITY else min(4 * count, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, target), hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    budget = count if soft == resource.RLIM_INFINITY else min(count, soft // 4)
    return max(1, budget // caches)
