"""Which source gives which sample: shares that are exact over a window, and positions that count up per source."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacid.data.mixture import Mixture

weights = st.lists(st.integers(1, 60), min_size=1, max_size=7)


def counted(sources: np.ndarray, source: int) -> np.ndarray:
    """int64 [m + 1]: samples of a source before each position."""
    return np.concatenate([[0], np.cumsum(sources == source)])


@settings(max_examples=60, deadline=None)
@given(weights=weights)
def test_every_window_of_the_sum_of_the_weights_has_exactly_the_shares(weights: list[int]) -> None:
    mixture = Mixture(weights)
    assert [Fraction(a, b) for a, b in zip(mixture.weights, weights)] == [Fraction(mixture.period, sum(weights))] * len(
        weights
    )
    sources, _ = mixture.locate(np.arange(3 * mixture.period))
    for source, weight in enumerate(mixture.weights):
        before = counted(sources, source)
        assert (before[mixture.period :] - before[: -mixture.period] == weight).all()


@settings(max_examples=60, deadline=None)
@given(weights=weights)
def test_no_source_is_ever_two_samples_away_from_its_share(weights: list[int]) -> None:
    mixture = Mixture(weights)
    positions = np.arange(mixture.period + 1)
    sources, _ = mixture.locate(positions[:-1])
    bound = 0.5 if len(weights) == 2 else 2
    for source, weight in enumerate(mixture.weights):
        assert np.abs(counted(sources, source) - positions * weight / mixture.period).max() <= bound


@settings(max_examples=60, deadline=None)
@given(weights=weights, start=st.integers(0, 10**13))
def test_the_positions_of_a_source_follow_each_other_wherever_one_begins(weights: list[int], start: int) -> None:
    mixture = Mixture(weights)
    sources, places = mixture.locate(start + np.arange(200))
    before, after = mixture.counts(start), mixture.counts(start + 200)
    assert sum(before) == start and sum(after) == start + 200
    for source, (first, stop) in enumerate(zip(before, after)):
        assert places[sources == source].tolist() == list(range(first, stop))
    one_by_one = [mixture.locate(np.array([start + number])) for number in (0, 57, 199)]
    assert [(int(s[0]), int(p[0])) for s, p in one_by_one] == [(sources[n], places[n]) for n in (0, 57, 199)]


def test_decimal_weights_are_taken_as_they_are_written() -> None:
    assert Mixture([0.1, 0.2, 0.7]).weights == [1, 2, 7]
    assert Mixture([414_550_000, 12_000_000]).weights == [8291, 240]
    assert Mixture([1e-6, 1]).weights == [1, 10**6]


def test_weights_with_many_digits_are_rounded_to_billionths() -> None:
    mixture = Mixture([0.123456789012345, 0.876543210987655])
    assert mixture.weights == [123456789, 876543211] and mixture.period == 10**9
    assert Mixture([1e-12, 1]).weights == [0, 1] and Mixture([1e-12, 1]).counts(10**15) == [0, 10**15]
    # The largest products stay within 64 bits.
    large = Mixture([2**31 - 3, 1])
    for start in (0, 2**31 - 10, 10**17):
        assert large.counts(start)[1] == round(Fraction(start, 2**31 - 2))


def test_one_source_gives_every_sample() -> None:
    sources, places = Mixture([0.3]).locate(np.arange(5, 9))
    assert sources.tolist() == [0] * 4 and places.tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1]])
def test_weights_must_be_above_zero(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="expected at least one, each above 0"):
        Mixture(weights)
