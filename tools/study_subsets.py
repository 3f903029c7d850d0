"""Subsets of a study that balance does not make, and what balance removed, by the corpus's own record of its pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import checkout  # noqa: F401  import paths of a plain checkout
from megacid.data.index import ShardIndex, load_index
from megacid.data.side_tables import KeepTable
from megacid.errors import UserError
from megacid.storage.npy import write_array
from megacid.storage.stage_directory import StageDirectory

LARGE_GROUP = 16  # pairs


def pair_column(corpus: Path, index: ShardIndex, name: str) -> np.ndarray:
    """int64 [num_samples], equal for pairs with the same value in a column of pairs.parquet.

    Raises UserError when the file lacks the column or a pair of the index.
    """
    path = corpus / "pairs.parquet"
    known = pq.read_schema(path).names if path.is_file() else []
    if name not in known:
        have = f"has the columns {', '.join(known)}" if known else "is missing"
        raise UserError(f"{path} {have}, expected a column {name!r}: use an output of tools/prepare_icons.py")
    table = pq.read_table(path, columns=list(dict.fromkeys(["key", name])))
    values = dict(zip(table["key"].to_pylist(), np.unique(table[name].to_numpy(), return_inverse=True)[1].tolist()))
    found = [values.get(key) for shard in range(len(index.names)) for key in index.table(shard).keys]
    if None in found:
        raise UserError(f"{path} lacks pairs of {corpus / 'train'}, expected each: make the corpus again")
    return np.array(found, np.int64)


def write_subset(shards: Path, out: Path, arguments: dict[str, object], kept: np.ndarray) -> None:
    """Write a subset in the layout of tools/balance.py.

    Args:
        kept: bool [num_samples].
    """
    index = load_index(str(shards))
    stage = StageDirectory(out, "balance", {**arguments, "digest": index.digest}, command="tools/study.py")
    if stage.finished() is not None:
        return
    stage.begin()
    for number, name in enumerate(index.names):
        write_array(out / "keep" / f"{name}.npy", kept[index.starts[number] : index.starts[number + 1]])
    stage.commit({"shards": str(shards)}, shards_digest=index.digest, kept=int(kept.sum()), total=len(kept))


def random_subset(shards: Path, like: Path, out: Path) -> None:
    """Write a subset of as many pairs as `like` has, drawn from all pairs."""
    index = load_index(str(shards))
    count = int(KeepTable(like, index).counts.sum())
    kept = np.zeros(index.num_samples, bool)
    kept[np.random.default_rng(0).permutation(index.num_samples)[:count]] = True
    write_subset(shards, out, {"random": count}, kept)


def one_of_each(corpus: Path, column: str, share: float, out: Path) -> None:
    """Write a subset with one pair of each value of a column of pairs.parquet, and others at random up to a share."""
    shards = corpus / "train"
    index = load_index(str(shards))
    order = np.random.default_rng(0).permutation(index.num_samples)
    first = np.unique(pair_column(corpus, index, column)[order], return_index=True)[1]
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
    write_subset(shards, out, {"one_of": column, "share": share}, kept)


def removed_pairs(corpus: Path, subset: Path) -> dict[str, float]:
    """What balance removed, as shares of it: how each removed pair is related to the one that was kept for it.

    Args:
        subset: output of tools/balance.py.

    Returns:
        pairs: their number. same_picture, same_family (another drawing of the icon in its design system), same_concept
        (in another design system or family), another_concept; they add up to 1. in_large_groups: those in groups of at
        least LARGE_GROUP pairs, of which one is kept. largest_group: pairs in it.
    """
    index = load_index(str(corpus / "train"))
    stored = [np.load(subset / "representative" / f"{name}.npy") for name in index.names]
    representative = np.concatenate(stored)
    removed = np.flatnonzero(representative != np.arange(len(representative)))
    kept, count = representative[removed], max(1, len(removed))
    groups = np.bincount(representative, minlength=len(representative))
    facts: dict[str, float] = {"pairs": len(removed)}
    unrelated = np.ones(len(removed), bool)
    for name in ("picture", "family", "concept"):
        values = pair_column(corpus, index, name)
        same = unrelated & (values[removed] == values[kept])
        facts[f"same_{name}"] = round(int(same.sum()) / count, 4)
        unrelated &= ~same
    facts["another_concept"] = round(int(unrelated.sum()) / count, 4)
    facts["in_large_groups"] = round(int((groups[kept] >= LARGE_GROUP).sum()) / count, 4)
    facts["largest_group"] = int(groups.max(initial=0))
    return facts
