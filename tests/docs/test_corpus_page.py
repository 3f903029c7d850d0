"""docs/corpus.md says what docs/corpus/*.json and the code of tools/prepare_icons.py say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from doc_blocks import ROOT
from icon_package import write_fonts
from offline_data import run
from test_pages import docs_tool

import icon_report
import icon_sets
from corpus_page import percent
from icon_packages import FREE_LICENCES
from megacid.errors import UserError

PAGE = ROOT / "docs" / "corpus.md"
FACTS = ROOT / "docs" / "corpus"


def test_tables_are_those_of_the_committed_facts() -> None:
    page = PAGE.read_text()
    assert page == docs_tool.corpus_page(page, FACTS), "run: python tools/docs.py --corpus data/icons"
    for kind in ("iconify", "fonts"):
        facts = json.loads((FACTS / f"{kind}.json").read_text())
        assert f"{facts['pairs']:,}" in page and percent(facts["redundancy"]["share_in_families"]) in page
        assert f"{facts['evaluation_sets']['concepts-test']['classes']:,} / " in page
        assert (ROOT / "docs" / "images" / f"corpus-{kind}.png").is_file()


def test_the_committed_facts_are_of_the_splits_and_licences_in_the_code() -> None:
    for kind, held_out in icon_sets.HELD_OUT.items():
        facts = json.loads((FACTS / f"{kind}.json").read_text())
        assert set(facts["licences"]) <= set(FREE_LICENCES)
        assert sum(entry["pairs"] for entry in facts["licences"].values()) == facts["pairs"]
        for split in icon_sets.SPLITS[1:]:
            assert set(facts["splits"][split]["pairs_per_system"]) == set(getattr(held_out, split).split())


def test_numbers_of_the_text_are_those_of_the_code() -> None:
    text = PAGE.read_text().partition("<!-- corpus tables")[0]
    licences = re.search(r"its licence is one of ([^.]*(?:\.\d[^.]*)*)\. Sets", text)
    assert licences is not None and tuple(licences[1].split(", ")) == FREE_LICENCES
    assert f"up to {icon_sets.TEST_PICTURES} pictures per class" in text
    assert f"At most {icon_sets.RETRIEVAL_PAIRS:,} pairs" in text
    assert f"at least {icon_report.NEAR}; {icon_report.QUERIES:,} pairs of each split" in text


def test_a_new_corpus_changes_page_facts_and_picture(tmp_path: Path) -> None:
    wheel = write_fonts(tmp_path / "qtawesome-9.9-py3-none-any.whl")
    options = ("--size", 16, "--workers", 1)
    run("prepare_icons", "--package", wheel, "--out", tmp_path / "icons", *options)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "docs" / "corpus.md").write_text(PAGE.read_text())
    for path in docs_tool.from_corpus(tmp_path / "icons", tmp_path):
        assert path.is_file()
    page = (tmp_path / "docs" / "corpus.md").read_text()
    assert "| | `qtawesome` 9.9 |" in page and "| pairs | 12 |" in page and "mystery (none)" in page
    facts = tmp_path / "docs" / "corpus" / "fonts.json"
    measured = json.loads(facts.read_text())
    assert 0 < measured["run"]["cpu_seconds"] < 9876
    measured["run"]["cpu_seconds"] = 9876.5
    facts.write_text(json.dumps(measured))
    (tmp_path / "icons" / "meta.json").unlink()
    run("prepare_icons", "--package", wheel, "--out", tmp_path / "icons", *options)  # continued: not the whole time
    docs_tool.from_corpus(tmp_path / "icons", tmp_path)
    assert json.loads(facts.read_text()) == measured
    facts.unlink()
    docs_tool.from_corpus(tmp_path / "icons", tmp_path)
    assert "| CPU time | not measured |" in (tmp_path / "docs" / "corpus.md").read_text()
    with pytest.raises(UserError, match=r"tools/prepare_icons\.py"):
        docs_tool.from_corpus(tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("other", [("--check",), ("--demo", "runs/demo")])
def test_the_page_generator_does_one_thing_per_call(other: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"--corpus: not allowed with argument {other[0]}"):
        docs_tool.main([*other, "--corpus", "nowhere"])
