"""docs/study.md has the numbers of docs/study/*.json and no others."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest
from doc_blocks import ROOT
from PIL import Image
from test_pages import docs_tool

from megacid.errors import UserError
from study_report import METRICS

PAGE, RESULTS = ROOT / "docs" / "study.md", ROOT / "docs" / "study"
STUDIES = ROOT / "configs" / "study"
MARKERS = "<!-- icons tables: written by tools/docs.py -->\n<!-- end of icons tables -->\n"
PARTS = f"# Study\n\n{{text}}\n\n{MARKERS}"


def unknown_numbers(page: str) -> set[str]:
    """Decimal numbers of the text, apart from commands, that the tables do not have."""
    commands = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    tables = re.compile(r"<!-- ([\w -]+) tables:.*?<!-- end of \1 tables -->", re.DOTALL)
    decimals = re.compile(r"\d+\.\d+")
    known = {number for match in tables.finditer(page) for number in decimals.findall(match[0])}
    return set(decimals.findall(commands.sub("", tables.sub("", page)))) - known


def drawn_study(out: Path, arms: Iterable[str] = docs_tool.README_ARMS) -> Path:
    """Results of arms with two seeds each, as tools/study.py leaves them."""
    (out / "results").mkdir(parents=True)
    for arm, seed, rate in product(arms, (0, 1), (1e-3, 2e-3, 4e-3)):
        scores = dict.fromkeys(METRICS, (0.1, 0.2)[seed] if rate == 2e-3 else 0.0)
        result = {
            "digest": "d", "arm": arm, "seed": seed, "rate": rate, "date": "2026-01-02", "seconds": {},
            "metrics": {"validation": scores, "test": scores}, "machine": {"cpu": "a", "cores": 2}, "versions": {},
        }  # fmt: skip
        (out / "results" / f"{arm}-{rate}-{seed}.json").write_text(json.dumps(result))
    return out


def pages(root: Path, text: str = "") -> tuple[Path, Path]:
    """docs/study.md and README.md of a checkout, without tables."""
    page, readme = root / "docs" / "study.md", root / "README.md"
    page.parent.mkdir()
    page.write_text(PARTS.format(text=text))
    readme.write_text("# megacid\n\n<!-- study table: written by tools/docs.py -->\n<!-- end of study table -->\n")
    return page, readme


def test_the_tables_come_from_the_results_and_the_text_has_no_other_number(tmp_path: Path) -> None:
    text = "Plain CLIP reaches 15.00 %, the method 16.27 %. ![weights](images/study-icons-fig4_weights.png)"
    page, readme = pages(tmp_path, text)
    icons = docs_tool.load_study(STUDIES / "icons.json")
    out = drawn_study(tmp_path / "out")
    (out / "figures").mkdir()
    for name in ("fig4_weights", "not_on_the_page"):
        Image.new("RGB", (2000, 500)).save(out / "figures" / f"{name}.png")
    files = docs_tool.from_study(icons, out, tmp_path)
    assert len(files) == 3 * 6 + 4 and all(path.is_file() for path in files)
    with Image.open(tmp_path / "docs" / "images" / "study-icons-fig4_weights.png") as figure:
        assert figure.size == (1000, 250)
    assert "| `plain` | 0.002 | 0.001, 0.002, 0.004 | 2 | 15.00 ± 63.53 |" in page.read_text()
    assert unknown_numbers(page.read_text()) == {"16.27"}
    assert docs_tool.study_page(page.read_text(), icons, tmp_path / "docs" / "study" / "icons") == page.read_text()
    summary = readme.read_text()
    assert summary.count("15.00 ± 63.53") == 3 * len(METRICS) and "| plain CLIP | 15.00 ± 63.53 |" in summary


def test_a_part_of_the_page_has_the_tables_and_the_picture_of_its_groups(tmp_path: Path) -> None:
    page, _ = pages(tmp_path)
    markers = "<!-- icons {0} tables: written by tools/docs.py -->\n<!-- end of icons {0} tables -->\n"
    page.write_text("# Study\n\n" + markers.format("core") + markers.format("balance losses"))
    icons = docs_tool.load_study(STUDIES / "icons.json")
    out = drawn_study(tmp_path / "out", [*docs_tool.README_ARMS, "random-20"])
    files = docs_tool.from_study(icons, out, tmp_path)
    pictures = {path.name for path in files if path.suffix == ".png"}
    assert pictures == {"study-icons-core.png", "study-icons-balance-losses.png"}
    core, others = page.read_text().split("<!-- icons balance losses")
    assert "| `mse` | `plain` |" in core and "random-20" not in core and "18 students" in core
    assert "| `random-20` | `instance-cluster` |" in others and "6 students" in others
    assert "| `instance-cluster` |" in others, "what the arms are compared with"
    assert "| `instance-cluster` | `plain` |" not in others, "a difference has one table"


def test_a_readme_table_without_all_its_arms_is_refused(tmp_path: Path) -> None:
    _, readme = pages(tmp_path)
    icons, before = docs_tool.load_study(STUDIES / "icons.json"), readme.read_text()
    with pytest.raises(UserError, match="arm mse has no results on the test sets"):
        docs_tool.from_study(icons, drawn_study(tmp_path / "out", ["plain"]), tmp_path)
    assert readme.read_text() == before


def test_a_study_without_a_page_is_refused(tmp_path: Path) -> None:
    icons = docs_tool.load_study(STUDIES / "icons.json")
    with pytest.raises(UserError, match=r"study\.md is missing"):
        docs_tool.from_study(icons, drawn_study(tmp_path / "out"), tmp_path)
    pages(tmp_path)
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
        readme = (ROOT / "README.md").read_text()
        assert readme == docs_tool.study_summary(readme, file, RESULTS / name), f"run tools/docs.py --study for {name}"
    assert not unknown_numbers(page)
