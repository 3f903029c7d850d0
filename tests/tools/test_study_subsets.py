"""tools/study_subsets.py: subsets that balance does not make, and what subsets hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from offline_data import run as run_tool_inside
from train_run import Pipeline

from megacid.data.index import load_index
from megacid.data.side_tables import KeepTable
from megacid.errors import UserError
from study_subsets import one_of_each, pair_columns, random_subset, subset_facts, write_subset


@pytest.fixture
def corpus(pipeline: Pipeline, tmp_path: Path) -> Path:
    """The scenes of the shared pipeline as a corpus: pairs i and i + 20 are a family, i and i + 10 a concept."""
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "train").symlink_to(pipeline.shards)
    index = load_index(str(pipeline.shards))
    keys = [key for shard in range(len(index.names)) for key in index.table(shard).keys]
    write_pairs(root, keys, [n % 20 for n in range(len(keys))], [n % 10 for n in range(len(keys))])
    return root


def write_pairs(root: Path, keys: list[str], family: list[int], concept: list[int]) -> None:
    """pairs.parquet in another order than the tars, with a pair of another split."""
    columns = {
        "key": [*keys[::-1], "elsewhere"],
        "picture": [*keys[::-1], "elsewhere"],
        "family": [f"f{n}" for n in [*family[::-1], 0]],
        "concept": [f"c{n}" for n in [*concept[::-1], 0]],
    }
    pq.write_table(pa.table(columns), root / "pairs.parquet")


def kept_rows(subset: Path, corpus: Path) -> np.ndarray:
    index = load_index(str(corpus / "train"))
    table = KeepTable(subset, index)
    return np.concatenate([table.kept(n) + index.starts[n] for n in range(len(index.names))])


def test_a_random_subset_has_as_many_pairs_as_the_balanced_one_and_others(pipeline: Pipeline, tmp_path: Path) -> None:
    inputs = ("--embeddings", pipeline.teacher, "--clusters", pipeline.labels)
    run_tool_inside("balance", *inputs, "--out", tmp_path / "balanced", "--target-keep", 0.5)
    for _ in range(2):  # the second time it is kept
        random_subset(pipeline.shards, tmp_path / "balanced", tmp_path / "random")
    index = load_index(str(pipeline.shards))
    balanced, drawn = (KeepTable(tmp_path / name, index) for name in ("balanced", "random"))
    assert drawn.counts.sum() == balanced.counts.sum() > 20
    assert any((drawn.kept(n).tolist() != balanced.kept(n).tolist()) for n in range(len(index.names)))


def test_one_of_each_keeps_every_value_and_fills_up_to_the_share(corpus: Path, tmp_path: Path) -> None:
    total = load_index(str(corpus / "train")).num_samples
    for _ in range(2):  # the second time it is kept
        one_of_each(corpus, "family", 20.0 / total, tmp_path / "least")
    assert sorted(kept_rows(tmp_path / "least", corpus) % 20) == list(range(20))
    one_of_each(corpus, "family", 0.5, tmp_path / "half")
    kept = kept_rows(tmp_path / "half", corpus)
    assert len(kept) == round(total / 2) and set(kept % 20) == set(range(20))
    assert len(set(Counter(kept % 20).values())) > 1, "others at random"
    with pytest.raises(UserError, match=r"20 values of 'family', .* raise the share to at least 0\."):
        one_of_each(corpus, "family", 19.0 / total, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def write_balance(out: Path, corpus: Path, representative: np.ndarray) -> Path:
    """An output of balance in which pair i is kept for those with representative i."""
    own = representative == np.arange(len(representative))
    index = load_index(str(corpus / "train"))
    write_subset(index, out, {}, own)
    (out / "representative").mkdir()
    for number, name in enumerate(index.names):
        part = representative[index.starts[number] : index.starts[number + 1]]
        np.save(out / "representative" / f"{name}.npy", part)
    return out


def test_facts_of_a_subset_count_what_it_holds_and_what_the_removed_pairs_share(corpus: Path, tmp_path: Path) -> None:
    total = load_index(str(corpus / "train")).num_samples
    representative = np.arange(total)
    representative[20] = 0  # the family
    representative[10] = 0  # the concept
    representative[[1, 2, 3, 4]] = 0  # another concept
    representative[[25, 45]] = 5  # another group, of one family
    facts = subset_facts(corpus, write_balance(tmp_path / "small", corpus, representative))
    assert facts["kept"] == {"pairs": total - 8, "picture": round(1 - 8 / total, 4), "family": 1.0, "concept": 1.0}
    shares = {"picture": 0.0, "family": 0.375, "concept": 0.125, "another_concept": 0.5}
    assert facts["removed"] == {"pairs": 8, **shares, "in_large_groups": 0.0, "largest_group": 7}
    representative[np.arange(total) % 20 == 7] = 0  # a whole family, and half of its concept
    representative[40:60] = 40  # one group of 20, in which 19 are removed
    facts = subset_facts(corpus, write_balance(tmp_path / "large", corpus, representative))
    assert facts["kept"]["family"] == 0.95 and facts["kept"]["concept"] == 1.0
    assert facts["removed"]["largest_group"] == 20
    one_of_each(corpus, "family", 20.0 / total, tmp_path / "least")
    assert subset_facts(corpus, tmp_path / "least") == {
        "kept": {"pairs": 20, "picture": round(20 / total, 4), "family": 1.0, "concept": 1.0}
    }


def test_a_corpus_without_the_column_or_with_other_pairs_is_one_error(corpus: Path, tmp_path: Path) -> None:
    index = load_index(str(corpus / "train"))
    with pytest.raises(UserError, match="has the columns key, picture, family, concept, expected a column 'style'"):
        pair_columns(corpus, index, "style")
    with pytest.raises(UserError, match="is missing, expected a column 'family'"):
        pair_columns(tmp_path, index, "family")
    write_pairs(corpus, ["other"], [0], [0])
    with pytest.raises(UserError, match=r"lacks pairs of .*train, expected each: make the corpus again"):
        pair_columns(corpus, index, "family")
