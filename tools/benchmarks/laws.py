"""Laws of a cost in the sizes that it grows with, fitted to measurements at several of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def fit(terms: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """The coefficients >= 0 of `terms` with the least sum of squared errors.

    No cost falls with size, but noise may make a small term seem to.

    Args:
        terms: [m, T] terms of the law at each measurement, T <= 4; a constant is a term of ones.
        values: [m] what was measured.
    """
    term_MT, value_M = np.asarray(terms, np.float64), np.asarray(values, np.float64)
    scale_T = np.abs(term_MT).max(axis=0)
    scale_T[scale_T == 0] = 1.0
    scaled_MT, count = term_MT / scale_T, term_MT.shape[1]
    best, least = np.zeros(count), float((value_M**2).sum())
    # With few terms, all choices of those that are not 0 can be tried.
    for chosen in (list(each) for size in range(1, count + 1) for each in itertools.combinations(range(count), size)):
        part, _, rank, _ = np.linalg.lstsq(scaled_MT[:, chosen], value_M, rcond=None)
        error = float(((scaled_MT[:, chosen] @ part - value_M) ** 2).sum())
        if rank == len(chosen) and (part >= 0).all() and error < least * (1 - 1e-9):
            best, least = np.zeros(count), error
            best[chosen] = part
    return [float(each) for each in best / scale_T]
