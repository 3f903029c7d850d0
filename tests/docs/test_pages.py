"""Pages that repeat something of the code say what the code says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from doc_blocks import PAGES, ROOT
from PIL import Image
from test_import_direction import LEAVES, ROOMS

from megacid import errors

DOCS = ROOT / "docs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs_tool = load("docs")


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    lines = page.partition(f"\n{heading}\n")[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_configuration_page_is_generated_from_the_schema() -> None:
    page = (DOCS / "configuration.md").read_text()
    assert page == docs_tool.configuration_page(page), "run: python tools/docs.py"


def test_a_new_field_makes_the_configuration_page_stale() -> None:
    from megacid.config.schema import MegacidConfig
    from megacid.config.sections import RunConfig

    class ChangedRun(RunConfig):
        log_every: int = 11
        """Steps between log lines and tensorboard points."""

    class Changed(MegacidConfig):
        run: ChangedRun

    page = (DOCS / "configuration.md").read_text()
    stale = docs_tool.configuration_page(page, Changed)
    assert page != stale and "| `run.log_every` | integer | `11` |" in stale


def test_every_setting_is_on_the_configuration_page() -> None:
    from megacid.config.schema import defaults

    page = (DOCS / "configuration.md").read_text()
    for section, fields in defaults().items():
        for name in fields:
            assert f"`{section}.{name}`" in page


def test_pages_name_settings_that_exist() -> None:
    from megacid.config.schema import defaults

    known = {section: {*fields} for section, fields in defaults().items()}
    known["run"] |= {"name", "total_steps"}
    known["student"] |= {"model"}
    checked = 0
    for page in PAGES:
        for section, key in re.findall(r"`(?:--set )?(\w+)\.(\w+)[`=:]", page.read_text()):
            if section in known and key not in ("json", "py"):
                assert key in known[section], f"{page.name} names {section}.{key}"
                checked += 1
    assert checked > 80


def test_architecture_page_shows_who_may_import_whom() -> None:
    table = rows((DOCS / "architecture.md").read_text(), "## Rooms")
    shown = {room.strip("`"): set(re.findall(r"`(\w+)`", imports)) for room, _, imports in table}
    assert shown == {room: below for room, below in ROOMS.items() if room not in {*LEAVES, "megacid"}}


def test_reliability_page_names_every_exit_code() -> None:
    table = rows((DOCS / "reliability.md").read_text(), "## Exit codes")
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(row[0]) for row in table} == codes | {0, 130}


def test_metrics_page_names_tags_that_exist() -> None:
    page = (DOCS / "how-to" / "metrics.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "megacid").rglob("*.py"))
    tags = re.findall(r"`((?:train|classifier|classes)/[\w/]+)`", page)
    assert len(tags) > 25
    for tag in tags:
        assert re.search(rf"[\"/]{tag.split('/')[-1]}\"", source), tag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_a_page_names_exist_and_select_something(page: Path) -> None:
    for path, _, double, single in re.findall(r"(tests/[\w/]+\.py)( -k (?:\"([^\"]+)\"|(\w+)))?", page.read_text()):
        assert (ROOT / path).is_file(), f"{path} does not exist"
        names = " ".join(re.findall(r"def (test_\w+)", (ROOT / path).read_text()))
        for word in re.findall(r"\w+", double or single):
            assert word in ("or", "and", "not") or word in names, f"{path} has no test {word!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_page_of_the_site_is_in_the_navigation(page: Path) -> None:
    if DOCS in page.parents:
        assert f": {page.relative_to(DOCS)}" in (ROOT / "mkdocs.yml").read_text()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 9_000


def fake_demo(root: Path) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    demo = root / "runs" / "demo"
    (demo / "figures").mkdir(parents=True)
    for name in docs_tool.FIGURES:
        Image.effect_noise((1600, 400), 60).save(demo / "figures" / f"{name}.png")
    for name in docs_tool.STUDENTS:
        with SummaryWriter(str(demo / name / "tensorboard")) as writer:
            for step in (20, 40):
                writer.add_scalar("train/grad_norm", 1 / step, step)
    run = {"zero_shot_top1": 0.954, "linear_probe_top1": 0.955, "steps": 200, "seed": 0, "ranks": 2, "zero_stage": 1}
    summary = {
        "runs": dict.fromkeys(("teacher", *docs_tool.STUDENTS), run),
        "balance": {"share_removed": 0.437},
        "seconds_per_stage": {"data": 60, "teacher": 120},
        "machine": {"cores": 2},
        "versions": {"torch": "2.0", "deepspeed": "0.19"},
        "date": "2026-01-01",
    }
    (demo / "summary.json").write_text(json.dumps(summary))
    return demo


def test_pictures_and_the_readme_table_are_made_from_a_demo_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    demo = fake_demo(tmp_path)
    for page in ("README.md", "docs/demo.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((ROOT / page).read_text())
    written = docs_tool.from_demo(demo, tmp_path)
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert 100 < picture.width <= docs_tool.MAX_WIDTH
    marked = re.compile(r"(<!-- demo \w+[^>]*-->).*(<!-- end of demo \w+ -->)", re.DOTALL)
    for page in ("README.md", "docs/demo.md"):
        text = (tmp_path / page).read_text()
        assert "| student, instance + cluster | 95.4 % | 95.5 % |" in text and "3.0 minutes in all" in text
        for picture in re.findall(r"\]\(([^)]*demo-\w+\.png)\)", text):
            assert (tmp_path / page).parent.joinpath(picture).is_file()
        assert marked.sub(r"\1\2", text) == marked.sub(r"\1\2", (ROOT / page).read_text())


def test_a_demo_that_did_not_finish_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(errors.UserError, match=r"summary\.json is missing"):
        docs_tool.from_demo(tmp_path, tmp_path)
