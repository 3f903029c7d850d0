"""Subsets of a study that balance does not make, and what a subset holds by the corpus's own record of its pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import checkout  # noqa: F401  import paths of a plain checkout
from megacid.data.index import ShardIndex, load_index
from megacid.data.side_tables import BALANCE_AGAIN, KeepTable
from megacid.errors import UserError
from megacid.offline.row_numbers import is_own
from megacid.storage.npy import load_npy, write_array
from megacid.storage.stage_directory import StageDirectory

LARGE_GROUP = 16  # pairs


def pair_columns(corpus: Path, index: ShardIndex, *names: str) -> dict[str, np.ndarray]:
    """Columns of pairs.parquet by name, int64 [num_samples], equal for pairs with the same value.

    Raises UserError when the file lacks a column or a pair of the index.
    """
    path = corpus / "pairs.parquet"
    known = pq.read_schema(path).names if path.is_file() else []
    for name in names:
        if name not in known:
            have = f"has the columns {', '.join(known)}" if known else "is missing"
            raise UserError(f"{path} {have}, expected a column {name!r}: use an output of tools/prepare_icons.py")
    table = pq.read_table(path, columns=list(dict.fromkeys(["key", *names])))
    row_of = {key: row for row, key in enumerate(table["key"].to_pylist())}
    rows = [row_of.get(key) for shard in range(len(index.names)) for key in index.table(shard).keys]
    if None in rows:
        raise UserError(f"{path} lacks pairs of {corpus / 'train'}, expected each: make the corpus again")
    order = np.array(rows, np.int64)
    return {name: np.unique(table[name].to_numpy(), return_inverse=True)[1][order] for name in names}


def write_subset(index: ShardIndex, out: Path, arguments: dict[str, object], kept: np.ndarray) -> None:
    """Write a subset in the layout of tools/balance.py.

    Args:
        kept: bool [num_samples].
    """
    stage = StageDirectory(out, "balance", {**arguments, "digest": index.digest}, command="tools/study.py")
    if stage.finished() is not None:
        return
    stage.begin()
    for number, name in enumerate(index.names):
        write_array(out / "keep" / f"{name}.npy", kept[index.starts[number] : index.starts[number + 1]])
    stage.commit({"shards": str(index.root)}, shards_digest=index.digest, kept=int(kept.sum()), total=len(kept))


def random_subset(shards: Path, like: Path, out: Path) -> None:
    """Write a subset of as many pairs as `like` has, drawn from all pairs."""
    index = load_index(str(shards))
    count = int(KeepTable(like, index).counts.sum())
    kept = np.zeros(index.num_samples, bool)
    kept[np.random.default_rng(0).permutation(index.num_samples)[:count]] = True
    write_subset(index, out, {"random": count}, kept)


def one_of_each(corpus: Path, column: str, share: float, out: Path) -> None:
    """Write a subset with one pair of each value of a column of pairs.parquet, and others at random up to a share."""
    index = load_index(str(corpus / "train"))
    order = np.random.default_rng(0).permutation(index.num_samples)
    first = np.unique(pair_columns(corpus, index, column)[column][order], return_index=True)[1]
    count = round(share * index.num_samples)
    if len(first) > count:
        raise UserError(
            f"the pairs have {len(first):,} values of {column!r}, so one of each is more than the share {share} of "
            f"{index.num_samples:,} pairs: raise the share to at least {len(first) / index.num_samples:.4f}"
        )
    last = np.ones(len(order), bool)
    last[first] = False
    kept = np.zeros(index.num_samples, bool)
    kept[order[np.concatenate([first, np.flatnonzero(last)])[:count]]] = True
    write_subset(index, out, {"one_of": column, "share": share}, kept)


def subset_facts(corpus: Path, subset: Path) -> dict[str, dict[str, float]]:
    """What a subset holds, and how the pairs that balance removed are related to those that it kept for them.

    Args:
        subset: output of tools/balance.py, or one of the subsets above.

    Returns:
        kept: number of pairs; shares of the pictures, families (drawings of one icon in one design system) and concepts
        that have a pair in the subset.
        removed, for outputs of balance: number of pairs; shares of those that have the same picture as the kept pair,
        else the same family, else the same concept, else another_concept; in_large_groups: share of those in groups of
        at least LARGE_GROUP pairs, of which one is kept; largest_group: pairs in it.
    """
    index = load_index(str(corpus / "train"))
    table = KeepTable(subset, index)
    shards = range(len(index.names))
    rows = np.concatenate([table.kept(shard) + index.starts[shard] for shard in shards])
    columns = pair_columns(corpus, index, "picture", "family", "concept")
    kept: dict[str, float] = {"pairs": len(rows)}
    for name, values in columns.items():
        kept[name] = round(len(np.unique(values[rows])) / len(np.unique(values)), 4)
    if not (subset / "representative").is_dir():
        return {"kept": kept}
    files = [subset / "representative" / f"{name}.npy" for name in index.names]
    representative = np.concatenate([load_npy(path, BALANCE_AGAIN) for path in files])
    rows = np.flatnonzero(~is_own(representative))
    instead, count = representative[rows], max(1, len(rows))
    groups = np.bincount(representative, minlength=len(representative))
    removed: dict[str, float] = {"pairs": len(rows)}
    unrelated = np.ones(len(rows), bool)
    for name, values in columns.items():
        same = unrelated & (values[rows] == values[instead])
        removed[name] = round(int(same.sum()) / count, 4)
        unrelated &= ~same
    removed["another_concept"] = round(int(unrelated.sum()) / count, 4)
    removed["in_large_groups"] = round(int((groups[instead] >= LARGE_GROUP).sum()) / count, 4)
    removed["largest_group"] = int(groups.max(initial=0))
    return {"kept": kept, "removed": removed}
