"""Output files of the balance stage: masks and representatives per tar, DataComp's subset file, report and gallery.

Legend: n samples with an embedding.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np

from megacid.data.index import ShardIndex
from megacid.distributed.array_exchange import Ranks
from megacid.distributed.consensus import broadcast_json
from megacid.distributed.parallel import shard_range
from megacid.distributed.stopping import Progress
from megacid.failpoints import failpoint
from megacid.offline.balance import report, subset
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.balance.deduplicate import Decision
from megacid.offline.balance.gallery import gallery_page, image_reader
from megacid.offline.balance.groups import sample_groups
from megacid.offline.balance.inputs import BalanceInputs, SampleLocations, damaged_cells
from megacid.offline.rows import EmbeddingRows
from megacid.storage.atomic import write_text
from megacid.storage.npy import read_array, write_array
from megacid.storage.stage_directory import StageDirectory

log = logging.getLogger(__name__)


def finished_outputs(stage: StageDirectory, index: ShardIndex, rows: EmbeddingRows, cells: int | None) -> bool:
    """Whether the stage is finished and all of its files are complete. Logs the first one that is not."""
    meta, out = stage.finished(), stage.path
    if meta is None:
        return False
    for name, size in zip(index.names, index.sizes.tolist()):
        for path, kind in ((out / "keep" / f"{name}.npy", "b"), (out / "representative" / f"{name}.npy", "i")):
            if read_array(path, (size,), kind) is None:
                return _warn_damaged(path)
    if not _is_json(out / "report.json"):
        return _warn_damaged(out / "report.json")
    page = out / "gallery.html"
    if not page.is_file() or page.stat().st_size != meta["gallery_bytes"]:
        return _warn_damaged(page)
    if meta["has_subset"] and read_array(out / "subset.npy", (int(meta["kept"]),), "V") is None:
        return _warn_damaged(out / "subset.npy")
    if cells is not None and (damaged := damaged_cells(out, cells, rows)) is not None:
        return _warn_damaged(damaged)
    return True


def _warn_damaged(path: Path) -> bool:
    log.warning("%s is damaged or missing: writing the outputs again", path)
    return False


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return True


def write_outputs(
    stage: StageDirectory,
    inputs: BalanceInputs,
    decision: Decision,
    settings: BalanceSettings,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Writes all files, meta.json last. A collective: each rank writes those of its tars, the first one the others.

    progress: called with 0 for every tar and image.
    """
    out, index, rows = stage.path, inputs.index, inputs.rows
    partitions = range(*shard_range(len(rows.stems), ranks.rank, ranks.world))
    first, last = (int(rows.starts[at]) for at in (partitions.start, partitions.stop))
    with ranks.stop_together():
        mine = inputs.locate(partitions, progress)
    locations = SampleLocations(index, ranks.concatenate(mine))
    del mine
    with ranks.stop_together():
        kept = write_tars(out, inputs, decision, locations.number, partitions, progress)
        _write_empty_tars(out, inputs, ranks)
        fields = [locations.has_field(name) for name in ("origin", "uid")] if ranks.rank == 0 else []
    has_origin, has_subset = broadcast_json(fields, ranks.group)
    kept = int(ranks.sum(np.array([kept]))[0])
    statistics = report.decision_report(decision, inputs.label, inputs.k, settings.target_keep, ranks)
    statistics["without_embedding"] = index.num_samples - rows.num_rows
    if has_origin:
        origin = _gather_origins(locations, range(first, last), ranks, progress)
    with ranks.stop_together():
        if ranks.rank == 0:
            if has_origin:
                statistics |= report.planted_reports(origin, decision, inputs.label)
            write_text(out / "report.json", json.dumps(statistics, indent=2) + "\n")
            (out / "subset.npy").unlink(missing_ok=True)
            failpoint("balance:report")
    if has_subset:
        subset.write_subset(stage, locations, first + np.flatnonzero(decision.keep[first:last]), ranks, progress)
    with ranks.stop_together():
        if ranks.rank == 0:
            groups = sample_groups(rows, decision.representative)
            with image_reader(locations, progress) as show:
                page = gallery_page(groups, decision, statistics, stage.arguments["gallery_groups"], show)
            write_text(out / "gallery.html", page)
            failpoint("balance:gallery")
            _commit(stage, inputs, decision, settings, kept=kept, has_subset=has_subset)


def _commit(
    stage: StageDirectory, inputs: BalanceInputs, decision: Decision, settings: BalanceSettings, **facts: Any
) -> None:
    names = ("target_keep", "link", "keep", "cap", "neighbor_clusters", "seed")
    facts |= {name: getattr(settings, name) for name in names}
    own = settings.cells is not None  # the clusters are in `out`, which may be moved
    source = {name: path for name, path in inputs.source.items() if not (own and name == "clusters")}
    stage.commit(
        source,
        shards_digest=inputs.index.digest,
        total=inputs.index.num_samples,
        threshold=decision.threshold,
        model=inputs.rows.meta["model"],
        gallery_bytes=(stage.path / "gallery.html").stat().st_size,
        arguments=stage.work.fingerprint,
        **facts,
    )


def write_tars(
    out: Path, inputs: BalanceInputs, decision: Decision, number: np.ndarray, partitions: range, progress: Progress
) -> int:
    """Files of the tars of some partitions; returns the number of samples kept.

    keep/<tar>.npy: bool, whether each sample is kept; one without an embedding is not.
    representative/<tar>.npy: int64, the sample kept for each, numbered over all tars; -1: without an embedding.
    """
    index, rows, total = inputs.index, inputs.rows, 0
    starts = index.starts
    for partition in partitions:
        shard = bisect_left(index.names, rows.stems[partition])
        where = slice(int(rows.starts[partition]), int(rows.starts[partition + 1]))
        row = number[where] - starts[shard]
        mask = np.zeros(int(index.sizes[shard]), bool)
        mask[row] = decision.keep[where]
        numbers = np.full(len(mask), -1, np.int64)
        numbers[row] = number[decision.representative[where]]
        _write_tar(out, index.names[shard], mask, numbers)
        total += int(np.count_nonzero(mask))
        failpoint("balance:keep", step=shard)
        progress(0)
    return total


def _write_empty_tars(out: Path, inputs: BalanceInputs, ranks: Ranks) -> None:
    """Files of the tars that have no partition."""
    empty = sorted(set(inputs.index.names) - set(inputs.rows.stems))
    for name in empty[ranks.rank :: ranks.world]:
        size = int(inputs.index.sizes[bisect_left(inputs.index.names, name)])
        _write_tar(out, name, np.zeros(size, bool), np.full(size, -1, np.int64))


def _write_tar(out: Path, name: str, keep: np.ndarray, representative: np.ndarray) -> None:
    write_array(out / "keep" / f"{name}.npy", keep)
    write_array(out / "representative" / f"{name}.npy", representative)


def _gather_origins(locations: SampleLocations, rows: range, ranks: Ranks, progress: Progress) -> np.ndarray:
    """int64 [n]: see `report.origins`. A collective: each rank reads a share of the rows."""
    with ranks.stop_together():
        mine = report.origins(locations, rows, progress)
    return ranks.concatenate(mine)
