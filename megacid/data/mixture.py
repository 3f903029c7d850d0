"""Which source gives which sample of the stream: a pure function of the weights and the position.

The sources are the leaves of a binary tree, built as Huffman's is. Of the first n samples of a node its left child gets
n * (weight of the child) / (weight of the node), rounded to the nearest integer, and the right child gets the others.
So the samples of every source before any position are counted without a table or a state, and no error accumulates: a
source is always less than two samples away from its share, with two sources at most half a sample. With weights that
are integers without a common factor the pattern repeats after as many samples as their sum, so that every window of
that length has exactly the shares.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

_LARGEST_PERIOD = 2**31  # products of two numbers below it fit into int64
_ROUNDED_PERIOD = 10**9


class _Node(NamedTuple):
    """A source, or the two nodes that share its samples."""

    weight: int
    source: int  # the smallest one of the node
    children: tuple[_Node, _Node] | None = None

    def left_of(self, count: np.ndarray) -> np.ndarray:
        """int64: how many of the first `count` samples the left child gets."""
        assert self.children is not None
        periods, rest = np.divmod(count, self.weight)
        part = self.children[0].weight
        return periods * part + (2 * rest * part + self.weight) // (2 * self.weight)


class Mixture:
    """Divides the positions of the stream among sources.

    Args:
        weights: of the sources, above 0; they need not sum to 1. Weights without integers of the same ratio whose sum
            is below 2^31 are rounded to billionths of their sum.

    Attributes:
        weights: integers of the same ratio.
        period: their sum; every stretch of so many positions has `weights` samples of the sources.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"got weights {weights}, expected at least one, each above 0")
        exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is 1/10, not the nearest binary fraction
        unit = math.lcm(*(weight.denominator for weight in exact))
        integers = [int(weight * unit) for weight in exact]
        if sum(integers) // math.gcd(*integers) >= _LARGEST_PERIOD:
            total = sum(integers)
            integers = [round(Fraction(integer, total) * _ROUNDED_PERIOD) for integer in integers]
        self.weights = [integer // math.gcd(*integers) for integer in integers]
        self.period = sum(self.weights)
        nodes = [_Node(weight, source) for source, weight in enumerate(self.weights) if weight]
        heapq.heapify(nodes)
        while len(nodes) > 1:
            light, heavy = heapq.heappop(nodes), heapq.heappop(nodes)
            first = min(light.source, heavy.source)
            heapq.heappush(nodes, _Node(light.weight + heavy.weight, first, (heavy, light)))
        self._root = nodes[0]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, position in the stream of that source) of positions, int64 [m] each."""
        sources, places = np.empty_like(positions), np.empty_like(positions)
        left = [(self._root, np.arange(len(positions)), positions)]
        while left:
            node, at, place = left.pop()
            if node.children is None:
                sources[at], places[at] = node.source, place
                continue
            before = node.left_of(place)
            is_left = node.left_of(place + 1) > before
            first, second = node.children
            left.append((first, at[is_left], before[is_left]))
            left.append((second, at[~is_left], (place - before)[~is_left]))
        return sources, places

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` samples each source gives."""
        counts = [0] * len(self.weights)
        left = [(self._root, np.array([position], np.int64))]
        while left:
            node, count = left.pop()
            if node.children is None:
                counts[node.source] = int(count[0])
                continue
            first = node.left_of(count)
            left += [(node.children[0], first), (node.children[1], count - first)]
        return counts

    def at_most(self, source: int, length: int) -> int:
        """A bound on the samples of a source in any `length` positions that follow each other."""
        return min(length, -(-length * self.weights[source] // self.period) + 3)
