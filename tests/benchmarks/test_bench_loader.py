"""The loader suite reads the same samples with every provider, and prints no time for an epoch that is not whole."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import loader
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
