import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacid.data.order import KeyedPermutation, SampleOrder
from megacid.errors import UserError


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_keyed_permutation_maps_the_range_onto_itself(n: int, key: int) -> None:
    image = KeyedPermutation(n, key)(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


def test_keyed_permutation_is_the_same_for_scalars_arrays_and_large_n() -> None:
    permutation = KeyedPermutation(2_000_000_011, 5)
    points = np.array([0, 1, 999_999_999, 2_000_000_010])
    image = permutation(points)
    assert [permutation(int(p)) for p in points] == image.tolist()
    assert len(set(image.tolist())) == 4 and image.max() < 2_000_000_011
    with pytest.raises(IndexError):
        permutation(2_000_000_011)


def test_keyed_permutation_really_shuffles() -> None:
    image = KeyedPermutation(10_000, 1)(np.arange(10_000))
    assert (image == np.arange(10_000)).sum() < 12  # fixed points of a random permutation: Poisson(1)
    assert abs(np.corrcoef(image, np.arange(10_000))[0, 1]) < 0.04
    assert (image == KeyedPermutation(10_000, 2)(np.arange(10_000))).sum() < 12


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(lambda s: sum(s) > 0),
    block=st.integers(1, 30),
    seed=st.integers(0, 100),
)
def test_every_epoch_meets_every_sample_once(sizes: list[int], block: int, seed: int) -> None:
    order = SampleOrder(sizes, seed=seed, block_shards=block)
    n = sum(sizes)
    epoch, shard, row = order.locate_many(np.arange(3 * n))
    everything = sorted((s, r) for s, size in enumerate(sizes) for r in range(size))
    for e in range(3):
        here = slice(e * n, (e + 1) * n)
        assert (epoch[here] == e).all()
        assert sorted(zip(shard[here].tolist(), row[here].tolist())) == everything


def test_position_is_a_pure_function_whatever_was_asked_before() -> None:
    sizes = [7, 0, 30, 12, 5]
    whole = np.stack(SampleOrder(sizes, seed=3, block_shards=2).locate_many(np.arange(200)))
    order = SampleOrder(sizes, seed=3, block_shards=2)
    asked = np.random.default_rng(0).permutation(200)
    assert np.array_equal(np.stack(order.locate_many(asked)), whole[:, asked])
    assert order.locate(131) == tuple(whole[:, 131].tolist())


def test_epochs_and_seeds_differ() -> None:
    order = SampleOrder([50, 50, 50], seed=0, block_shards=2)
    _, shard, row = order.locate_many(np.arange(300))
    ids = shard * 50 + row
    assert (ids[:150] != ids[150:]).mean() > 0.9
    _, shard, row = SampleOrder([50, 50, 50], seed=1, block_shards=2).locate_many(np.arange(150))
    assert (shard * 50 + row != ids[:150]).mean() > 0.9


def test_a_block_reads_few_shards_and_mixes_them() -> None:
    order = SampleOrder([100] * 12, seed=0, block_shards=4)
    _, shard, _ = order.locate_many(np.arange(400))
    assert len(np.unique(shard)) == 4
    assert len(np.unique(shard[:30])) == 4


def test_no_sample_at_all_is_a_user_error() -> None:
    with pytest.raises(UserError, match="0 usable samples"):
        SampleOrder([0, 0], seed=0)
