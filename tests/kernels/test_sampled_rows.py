"""The rows of a sampled step from the Triton kernels: those of PyTorch's operators, which sort.

Without a GPU in Triton's interpreter, see `interpreter.py`.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import assert_holds_in_the_interpreter, on_devices

from megacid.classifier.row_selection import MergedRows, SortedRows
from megacid.classifier.sampling import Draw
from megacid.distributed.parallel import shard_range
from megacid_kernels.fused import INTERPRET

if not INTERPRET:

    def test_every_comparison_holds_in_the_interpreter() -> None:
        assert_holds_in_the_interpreter(__file__)


@on_devices
@pytest.mark.parametrize(
    ("classes", "rate"), [(1, 0.5), (7, 0.3), (100, 0.1), (1001, 0.37), (50, 0.001), (997, 0.5), (300, 0.99)]
)
@pytest.mark.parametrize("world", [1, 3])
def test_merged_rows_are_the_sorted_ones(classes: int, rate: float, world: int, device: str) -> None:
    """On shards before, around and behind the offset of the draw; with repeated labels, without a label, and out of
    range. 700 labels take several programs."""
    g = torch.Generator().manual_seed(classes)
    for step, rank in ((step, rank) for step in range(3) for rank in range(min(world, classes))):
        draw, shard = Draw.of_step(classes, rate, seed=3, step=step), shard_range(classes, rank, min(world, classes))
        alone = MergedRows(torch.empty(0, dtype=torch.int64, device=device), draw, *shard)
        assert len(alone.choose([0], None).rows) == len(draw.classes(*shard))
        for count in (1, 20, 700):
            labels = torch.randint(-3, classes + 3, (count,), generator=g).sort().values
            want, got = (
                make(labels.to(where), draw, *shard) for make, where in ((SortedRows, "cpu"), (MergedRows, device))
            )
            numbers = [int(number) for number in want.numbers]
            edges = torch.searchsorted(labels, torch.tensor(shard))
            between = [one.labels_before.cpu()[edges].diff() for one in (want, got)]
            assert torch.equal(*between), "other distinct labels in the shard"
            for length in (None, shard[1] - shard[0]):
                rows = want.choose(numbers, length)
                same = got.choose([int(number) for number in got.numbers], length)
                for name, expected, value in zip(rows._fields, rows, same):
                    assert (expected is None) == (value is None), name
                    assert expected is None or torch.equal(expected, value.cpu()), f"{name}, step {step}, {shard}"


@on_devices
def test_ids_beyond_32_bits_are_drawn_and_merged(device: str) -> None:
    """Three billion classes, a shard of a million behind 2^31: products of positions and strata need 64 bits."""
    draw = Draw.of_step(3_000_000_000, 1e-3, seed=1, step=2)
    shard = 2_400_000_000, 2_401_000_000
    labels = torch.randint(*shard, (200,), generator=torch.Generator().manual_seed(0)).sort().values
    want = SortedRows(labels, draw, *shard)
    got = MergedRows(labels.to(device), draw, *shard)
    rows = want.choose([int(want.numbers[0])], None)
    same = got.choose([int(got.numbers[0])], None)
    assert 1000 < len(rows.rows) < 1400 and int(rows.positive.sum()) == 200
    assert torch.equal(rows.rows, same.rows.cpu()) and torch.equal(rows.positive, same.positive.cpu())
