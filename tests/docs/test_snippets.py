"""Every Python snippet of the documentation runs as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from doc_blocks import PAGES, Block, blocks
from harness import run_ranks

SNIPPETS = [block for page in PAGES for block in blocks(page, "python")]


def run(block: Block) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), names)
    return names


@pytest.mark.parametrize("block", [b for b in SNIPPETS if "ranks" not in b.marks], ids=lambda block: block.name)
def test_snippet_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(block)


@pytest.mark.parametrize("block", [b for b in SNIPPETS if "ranks" in b.marks], ids=lambda block: block.name)
def test_snippet_trains_on_its_ranks(block: Block) -> None:
    losses = run_ranks(run(block)["train"], int(block.marks["ranks"]))
    assert all(rank == losses[0] for rank in losses)
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_pages_have_snippets_for_one_process_and_for_ranks() -> None:
    pages = {block.page.name for block in SNIPPETS}
    assert {"README.md", "classifier.md", "partial-fc-ddp.md"} <= pages
