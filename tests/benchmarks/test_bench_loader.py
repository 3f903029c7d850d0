"""The loader suites read the same samples with every provider, and print no time for an epoch that is not whole."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import loader, loader_tables, mixing
from megacid.errors import UserError

SMALL = argparse.Namespace(suite="loader", samples=8, normalize=False, device="cpu", threads=1, clock="cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BATCH": 4, "SHARDS": 2, "SIDES": (64,), "WORKERS": (2,), "ROUNDS": 1}.items():
        monkeypatch.setattr(loader, name, value)


def test_all_providers_are_measured_and_only_simplejpeg_has_a_limit(small: None) -> None:
    report = loader.run(SMALL)
    rows = {row["provider"]: row for row in report["results"]}
    names = ["webdataset", "megacid, pillow", "megacid, simplejpeg", "megacid, simplejpeg_scaled"]
    assert list(rows) == names
    assert all(row["samples_per_s"][0] > 0 for row in rows.values())
    assert rows["webdataset"]["over_webdataset"] == [1.0]
    expected = [row["over_webdataset"][0] for name, row in rows.items() if "simplejpeg" in name]
    assert [limit.value for limit in loader.check(report)] == expected


def test_webdataset_and_our_loader_read_the_same_pictures(small: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = loader.write_tars(tmp_path / "tars", 64, 8)
    theirs = torch.cat([image for image, _ in loader.webdataset_batches(folder, 8, 0)])
    ours = torch.cat([image for image, _ in loader.our_batches("pillow", folder, 8, 0, normalize=True)])
    assert ours.dtype == theirs.dtype == torch.float32
    # Crops and order are drawn otherwise, so only coarse pictures can be compared.
    coarse = [F.adaptive_avg_pool2d(images, 4).flatten(1) for images in (theirs, ours)]
    assert sorted(torch.cdist(*coarse).argmin(dim=1).tolist()) == list(range(8))


def test_an_epoch_that_is_not_whole_has_no_time(small: None) -> None:
    batch: Any = (torch.zeros(4, 3, 224, 224), torch.zeros(4, 77))
    with pytest.raises(UserError, match="an epoch has 4 samples, expected 8"):
        loader.read_all(lambda: iter([batch]), 8)
    with pytest.raises(UserError, match="--samples is 12, --device cpu and --clock cpu, expected a multiple of 8"):
        loader.run(argparse.Namespace(**{**vars(SMALL), "samples": 12}))


def test_the_loader_is_measured_on_many_tars_with_side_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"RANKS": 2, "MICRO_BATCH": 4, "WORKERS": 1, "SHORT": 1, "LONG": 2, "BLOCKS": {1: 0.3, 20: 0.4}}
    for name, value in small.items():
        monkeypatch.setattr(loader_tables, name, value)
    args = {"suite": "loader-tables", "tars": 20, "samples": 10, "rounds": 1}
    report = loader_tables.run(argparse.Namespace(**{**vars(SMALL), **args}))
    assert [row["block_shards"] for row in report["results"]] == [1, 20]
    assert [(limit.bound, limit.at_least) for limit in loader_tables.check(report)] == [(0.3, False), (0.4, False)]


def test_a_larger_block_mixes_more_tars_over_a_longer_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SAMPLES": 50, "GLOBAL_BATCH": 100, "BUFFER": 25, "INITIAL": 5}.items():
        monkeypatch.setattr(mixing, name, value)
    tars, distance = mixing.our_order(8, 4)
    assert tars == 8 and distance == pytest.approx(8 * 50 / 3 / 100, rel=0.1)  # a third of the block
    tars, distance = mixing.webdataset_order(2, 8)
    assert tars == pytest.approx(6, abs=1) and distance == pytest.approx(25 * 2 * mixing.WORKERS / 100, rel=0.2)
