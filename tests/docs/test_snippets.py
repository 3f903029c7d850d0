"""Every Python snippet of the documentation runs as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doc_blocks import PAGES, ROOT, Block, blocks
from harness import run_ranks
from pair_data import write_shards

from megacid.data.side_tables import TeacherTable
from megacid.offline.rows import EmbeddingRows

SNIPPETS = [block for page in PAGES for block in blocks(page, "python")]
TEACHER = ROOT / "docs" / "how-to" / "teacher.md"


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
    assert {"README.md", "classifier.md", "partial-fc-ddp.md", "teacher.md"} <= pages


def test_imported_clip_retrieval_embeddings_join_by_key(tmp_path: Path) -> None:
    """Partitions that do not follow the tars, rows in another order, a stranger's row, and a sample without one."""
    index = write_shards(tmp_path / "shards")
    keys = [key for number in range(len(index.names)) for key in index.table(number).keys]
    order = np.random.default_rng(0).permutation(len(keys))[1:]  # one sample has no embedding
    names = [keys[row] for row in order] + ["stranger"]
    vectors = np.concatenate([np.eye(32, dtype=np.float16)[order], np.ones((1, 32), np.float16)])
    for folder in ("img_emb", "text_emb", "metadata"):
        (tmp_path / "old" / folder).mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(len(names)), 2)):
        np.save(tmp_path / "old" / "img_emb" / f"img_emb_{number}.npy", vectors[part])
        np.save(tmp_path / "old" / "text_emb" / f"text_emb_{number}.npy", -vectors[part])
        table = {"image_path": [names[i] for i in part], "caption": [f"caption {i}" for i in part]}
        pq.write_table(pa.table(table), tmp_path / "old" / "metadata" / f"metadata_{number}.parquet")

    import_clip_retrieval = run(blocks(TEACHER, "python")[0])["import_clip_retrieval"]
    assert import_clip_retrieval(tmp_path / "old", tmp_path / "shards", tmp_path / "teacher") == 1

    teacher, checked = TeacherTable(tmp_path / "teacher", index), 0
    for shard in range(len(index.names)):
        rows = np.arange(int(index.sizes[shard]))
        rows = rows[teacher.has(shard, rows)]
        image, text = teacher.rows(shard, rows)
        assert text is not None
        assert image.argmax(1).tolist() == (index.starts[shard] + rows).tolist()
        np.testing.assert_array_equal(text, -image)
        checked += len(rows)
    assert checked == len(keys) - 1
    assert EmbeddingRows(tmp_path / "teacher").num_rows == len(keys) - 1
