"""Sampling: positives always, right size, pure, uniform, independent of the rank layout."""

from __future__ import annotations

import pytest
import torch

from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.sampling import hash_ids, sample_dims, sample_rows, sample_size
from megacid.config import UserError


def test_positives_are_always_in_and_rows_are_sorted_unique_local() -> None:
    for step in range(20):
        target = torch.randint(-1, 1000, (40,), generator=torch.Generator().manual_seed(step))
        start, stop = 300, 700
        rows = sample_rows(target, start, stop, 60, seed=1, step=step)
        assert len(rows) == 60 and torch.equal(rows, torch.unique(rows))
        assert int(rows[0]) >= 0 and int(rows[-1]) < stop - start
        mine = target[(target >= start) & (target < stop)] - start
        assert torch.isin(mine, rows).all()


def test_a_batch_of_only_positives_fits_exactly() -> None:
    target = torch.arange(10, 20)
    assert sample_rows(target, 0, 100, sample_size(100, 0.01, 10), seed=0, step=0).tolist() == list(range(10, 20))


def test_size_is_the_share_but_never_fewer_than_the_batch_nor_more_than_the_classes() -> None:
    assert sample_size(1000, 0.1, 16) == 100
    assert sample_size(1000, 0.1, 160) == 160
    assert sample_size(100, 0.5, 400) == 100
    assert sample_size(1000, 1.0, 4) == 1000
    assert sample_size(3, 0.01, 0) == 1


def test_the_draw_is_a_pure_function_of_seed_and_step() -> None:
    target = torch.tensor([5, 9])

    def draw(seed: int, step: int) -> list[int]:
        torch.manual_seed(seed + step + 99)  # the global generator must not matter
        return sample_rows(target, 0, 500, 50, seed=seed, step=step).tolist()

    assert draw(1, 7) == draw(1, 7)
    assert draw(1, 7) != draw(1, 8)
    assert draw(1, 7) != draw(2, 7)


def test_global_ids_decide_and_not_the_layout() -> None:
    """The classes drawn in a range are the top of one global order: shards of 2 ranks agree with a single shard."""
    none = torch.tensor([-1])
    whole = hash_ids(torch.arange(400), seed=3, step=4)
    for start, stop in ((0, 200), (200, 400), (133, 266)):
        rows = sample_rows(none, start, stop, 30, seed=3, step=4) + start
        assert set(rows.tolist()) == set((whole[start:stop].topk(30).indices + start).tolist())


def test_negatives_are_uniform_over_classes_and_steps() -> None:
    hits = torch.zeros(200)
    for step in range(400):
        hits[sample_rows(torch.tensor([-1]), 0, 200, 50, seed=0, step=step)] += 1
    # 400 draws of probability 1/4: mean 100, standard deviation 8.7.
    assert float(hits.mean()) == 100 and float(hits.min()) > 60 and float(hits.max()) < 140
    assert 7 < float(hits.std()) < 10.5


def test_hashes_are_non_negative_and_distinct_for_neighbours() -> None:
    keys = hash_ids(torch.arange(100_000), seed=0, step=0)
    assert int(keys.min()) >= 0 and len(keys.unique()) == 100_000
    ordered = keys.double() / 2**62
    assert abs(float(ordered.mean()) - 0.5) < 0.005


def test_feature_dimensions_follow_rate_and_step() -> None:
    a, b = (sample_dims(64, 0.5, seed=0, step=s, device=torch.device("cpu")) for s in (1, 2))
    assert len(a) == 32 and torch.equal(a, a.unique()) and not torch.equal(a, b)


def test_micro_batches_of_a_step_share_negatives_and_steps_do_not() -> None:
    head = PartialFC(400, 4, sample_rate=0.2)
    drawn = []
    for step, label in ((3, 7), (3, 11), (4, 7)):
        head.set_step(step)
        head.zero_grad()
        head(torch.randn(1, 4), torch.tensor([label])).backward()
        drawn.append(set(head.row_grad()[0].tolist()))
        assert label in drawn[-1] and len(drawn[-1]) == 80
    assert len(drawn[0] & drawn[1]) >= 79
    assert len(drawn[0] & drawn[2]) < 50


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"sample_rate": 0.0}, "sample_rate is 0.0"),
        ({"feature_rate": 1.5}, "feature_rate is 1.5"),
        ({"impl": "triton"}, "available are 'auto', 'torch'"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_senseless_options_are_refused(kwargs: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        PartialFC(10, 4, **kwargs)
