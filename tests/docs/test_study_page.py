"""docs/study.md has the numbers of docs/study/*.json and no others."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from doc_blocks import ROOT
from test_pages import docs_tool

from megacid.errors import UserError

PAGE, RESULTS = ROOT / "docs" / "study.md", ROOT / "docs" / "study"
STUDIES = ROOT / "configs" / "study"
MARKERS = "<!-- icons tables: written by tools/docs.py -->\n<!-- end of icons tables -->\n"
PARTS = f"# Study\n\n{{text}}\n\n{MARKERS}"


def unknown_numbers(page: str) -> set[str]:
    """Decimal numbers of the text that the tables do not have."""
    tables = re.compile(r"<!-- (\w+) tables.*?<!-- end of \1 tables -->", re.DOTALL)
    decimals = re.compile(r"\d+\.\d+")
    known = {number for match in tables.finditer(page) for number in decimals.findall(match[0])}
    return set(decimals.findall(tables.sub("", page))) - known


def drawn_study(out: Path) -> Path:
    """Results of one arm with two seeds, as tools/study.py leaves them."""
    (out / "results").mkdir(parents=True)
    for seed, acc1 in ((0, 0.1), (1, 0.2)):
        for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
            result = {
                "digest": "d", "arm": "plain", "seed": seed, "rate": rate, "date": "2026-01-02", "seconds": {},
                "metrics": {"validation": {"acc1": acc1 if rate == 2e-3 else 0.0}}, "machine": {"cpu": "a", "cores": 2},
                "versions": {},
            }  # fmt: skip
            (out / "results" / f"plain-{rate}-{seed}.json").write_text(json.dumps(result))
    return out


def test_the_tables_come_from_the_results_and_the_text_has_no_other_number(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "study.md"
    page.parent.mkdir()
    page.write_text(PARTS.format(text="Plain CLIP reaches 15.00 %, the method 16.27 %."))
    icons = docs_tool.load_study(STUDIES / "icons.json")
    files = docs_tool.from_study(icons, drawn_study(tmp_path / "out"), tmp_path)
    assert len(files) == 11 and all(path.is_file() for path in files)
    assert "| `plain` | 0.002 | 0.0005, 0.001, 0.002, 0.004, 0.008 | 2 | 15.00 ± 63.53 |" in page.read_text()
    assert unknown_numbers(page.read_text()) == {"16.27"}
    assert docs_tool.study_page(page.read_text(), icons, tmp_path / "docs" / "study" / "icons") == page.read_text()


def test_a_study_without_a_page_is_refused(tmp_path: Path) -> None:
    icons = docs_tool.load_study(STUDIES / "icons.json")
    with pytest.raises(UserError, match=r"study\.md is missing"):
        docs_tool.from_study(icons, drawn_study(tmp_path / "out"), tmp_path)
    shutil.rmtree(tmp_path / "out" / "results")
    with pytest.raises(UserError, match="has no results"):
        docs_tool.from_study(icons, tmp_path / "out", tmp_path)


@pytest.mark.skipif(not PAGE.is_file(), reason="there is no study yet")
def test_the_page_has_the_numbers_of_the_committed_results() -> None:
    page, names = PAGE.read_text(), [folder.name for folder in RESULTS.iterdir()]
    assert names
    for name in names:
        file = docs_tool.load_study(STUDIES / f"{name}.json")
        assert page == docs_tool.study_page(page, file, RESULTS / name), f"run tools/docs.py --study for {name}"
    assert not unknown_numbers(page)
