"""The gallery and the figures show samples that became unreadable after they were embedded as a placeholder."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pair_data import encoded, gradient, put

from megacid.data.index import ShardIndex, load_index
from megacid.offline.balance.drawing import group_figure
from megacid.offline.balance.gallery import group_rows, image_reader
from megacid.offline.balance.groups import Groups
from megacid.offline.balance.inputs import SampleLocations
from megacid.offline.figure_style import figure_style

GROUPS = Groups(np.array([0, 0, 0, 3, 3, 3]), np.array([0, 0.1, 0.2, 0, 0.1, 0.2]))
KEEP = np.array([True, False, False] * 2)


@pytest.fixture
def locations(tmp_path: Path) -> SampleLocations:
    """Two tars of three samples."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for key in ("k0", "k1", "k2") if shard == 0 else ("k3", "k4", "k5"):
                put(tar, f"{key}.png", encoded(gradient(), "PNG"))
                put(tar, f"{key}.txt", f"text of {key}".encode())
    index = load_index(tmp_path)
    return SampleLocations(index, np.arange(6))


def overwrite(index: ShardIndex, shard: int, row: int, data: bytes) -> None:
    """Other bytes at the image of a sample; the tar keeps its size."""
    offset = int(index.table(shard).image[row, 0])
    with open(index.tar_path(shard), "r+b") as file:
        file.seek(offset)
        file.write(data)


def cut(index: ShardIndex) -> None:
    path = index.tar_path(1)
    path.write_bytes(path.read_bytes()[: int(index.table(1).image[1, 0]) + 10])


def remove(index: ShardIndex) -> None:
    index.tar_path(1).unlink()


def swap(index: ShardIndex) -> None:
    """Another tar of the same size, whose members are at other offsets."""
    path = index.tar_path(1)
    size = path.stat().st_size
    with tarfile.open(path, "w") as tar:
        put(tar, "other.txt", b"x" * 3000)
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])


# What happens to the tars after they were embedded, and the rows that can no longer be read.
DAMAGE: dict[str, tuple[Callable[[ShardIndex], object], list[int]]] = {
    "one image": (lambda index: overwrite(index, 0, 1, b"<html>"), [1]),
    "the kept image": (lambda index: overwrite(index, 1, 0, bytes(20)), [3]),
    "tar cut": (cut, [4, 5]),
    "tar gone": (remove, [3, 4, 5]),
    "other members": (swap, [3, 4, 5]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_samples_that_became_unreadable_are_placeholders_and_one_warning(
    locations: SampleLocations, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, bad = DAMAGE[case]
    spoil(locations.index)
    with image_reader(locations) as show:
        shown = [show(row) for row in range(6)]
        shown += [show(row) for row in range(6)]  # an image is counted once, however often it is drawn
    assert [row for row, (image, _, _) in enumerate(shown[:6]) if image.size != (40, 24)] == bad
    keys = ["k0", "k1", "k2", "k3", "k4", "k5"]
    assert [key for _, key, _ in shown] == keys * 2
    assert all(caption == f"text of {key}" for row, (_, key, caption) in enumerate(shown[:6]) if row not in bad)
    (record,) = caplog.records
    message = record.getMessage()
    first = keys[bad[0]]
    assert message.startswith(f"{len(bad)} samples") and f" {int(bad[0] > 2):05d}/{first}: " in message
    assert f"tools/index_shards.py --verify {locations.index.root}" in message


def test_gallery_and_figures_of_unreadable_samples_are_drawn(
    locations: SampleLocations, caplog: pytest.LogCaptureFixture
) -> None:
    remove(locations.index)
    overwrite(locations.index, 0, 0, b"GIF89a")
    groups = GROUPS.perceptual(1, 9, 9)
    with image_reader(locations) as show, figure_style():
        body = group_rows(groups, KEEP, show)
        figure = group_figure(groups, KEEP, show)
    assert body.count("data:image/jpeg;base64,") == 6 and "k4" in body
    assert len(figure.axes[0].images) == 6
    assert [record.getMessage()[:9] for record in caplog.records] == ["4 samples"]


def test_readable_samples_give_no_warning(locations: SampleLocations, caplog: pytest.LogCaptureFixture) -> None:
    with image_reader(locations) as show:
        assert show(4)[0].size == (40, 24)
    assert not caplog.records
