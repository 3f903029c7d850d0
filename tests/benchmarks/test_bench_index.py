"""The index suite writes tars of both forms, and measures only an index that has all their samples."""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path

import pytest

from benchmarks import index
from megacid.errors import UserError

SMALL = argparse.Namespace(
    **{"suite": "index", "tars": 2, "samples": 5, "image_bytes": 600, "workers": 2, "rounds": 2},
    **{"device": "cpu", "threads": 1, "clock": "wall"},
)


def test_every_form_is_measured_and_the_index_has_a_limit() -> None:
    report = index.run(SMALL)
    names = ["sha256", "scan", "index", "index, 2 processes"]
    assert [(row["form"], row["what"]) for row in report["results"]] == [
        (form, name) for form in ("webdataset", "plain") for name in names
    ]
    assert all(len(row["us_per_sample"]) == 2 and min(row["us_per_sample"]) > 0 for row in report["results"])
    assert len(index.check(report)) == 4


def test_only_the_tars_of_webdataset_have_pax_headers(tmp_path: Path) -> None:
    for form, has in (("webdataset", True), ("plain", False)):
        with tarfile.open(index.write_tars(tmp_path / form, form, SMALL) / "00000.tar") as tar:
            assert all(bool(member.pax_headers) is has for member in tar)


def test_an_index_that_lacks_samples_has_no_time(tmp_path: Path) -> None:
    folder = index.write_tars(tmp_path / "tars", "plain", SMALL)
    with pytest.raises(UserError, match="has 10 samples, expected 11"):
        index.index(folder, 11, 1)
