"""Output files of the balance stage: masks and representatives per tar, DataComp's subset file, report and gallery.

Legend: n samples with an embedding.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from megacid.data.index import ShardIndex
from megacid.distributed.stopping import Progress
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.offline.balance import report
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.balance.deduplicate import Decision
from megacid.offline.balance.gallery import gallery_page, image_reader
from megacid.offline.balance.groups import Groups, representative_distance
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
    progress: Progress,
) -> None:
    """Writes all files, meta.json last. One rank calls it; progress: called with 0 for every tar and image."""
    out, index = stage.path, inputs.index
    locations = inputs.locate()
    kept = _write_masks(out, locations, decision.keep, progress)
    _write_representatives(out, locations, decision.representative)
    statistics = report.decision_report(decision, inputs.label, inputs.k, settings.target_keep)
    statistics["without_embedding"] = index.num_samples - inputs.rows.num_rows
    if locations.has_field("origin"):
        statistics |= report.planted_reports(report.origins(locations, progress), decision, inputs.label)
    write_text(out / "report.json", json.dumps(statistics, indent=2) + "\n")
    failpoint("balance:report")
    has_subset = _write_subset(out / "subset.npy", locations, decision.keep, progress)
    groups = Groups(decision.representative, representative_distance(inputs.rows, decision.representative))
    with image_reader(locations, progress) as show:
        page = gallery_page(groups, decision, statistics, stage.arguments["gallery_groups"], show)
    write_text(out / "gallery.html", page)
    failpoint("balance:gallery")
    names = ("target_keep", "link", "keep", "cap", "neighbor_clusters", "seed")
    facts: dict[str, Any] = {name: getattr(settings, name) for name in names}
    own = settings.cells is not None  # the clusters are in `out`, which may be moved
    source = {name: path for name, path in inputs.source.items() if not (own and name == "clusters")}
    stage.commit(
        source,
        shards_digest=index.digest,
        kept=kept,
        total=index.num_samples,
        threshold=decision.threshold,
        **facts,
        model=inputs.rows.meta["model"],
        gallery_bytes=(out / "gallery.html").stat().st_size,
        has_subset=has_subset,
        arguments=stage.work.fingerprint,
    )


def _write_masks(out: Path, locations: SampleLocations, keep: np.ndarray, progress: Progress) -> int:
    """keep/<tar>.npy: bool, whether each sample is kept; one without an embedding is not. Returns the number kept."""
    index, total = locations.index, 0
    for number, name in enumerate(index.names):
        mask = np.zeros(int(index.sizes[number]), bool)
        mask[locations.row[(locations.shard == number) & keep]] = True
        total += int(mask.sum())
        write_array(out / "keep" / f"{name}.npy", mask)
        failpoint("balance:keep", step=number)
        progress(0)
    return total


def _write_representatives(out: Path, locations: SampleLocations, representative: np.ndarray) -> None:
    """representative/<tar>.npy: int64, the sample kept for each, numbered over all tars; -1: without an embedding."""
    index, number = locations.index, locations.number
    numbers = np.full(index.num_samples, -1, np.int64)
    numbers[number] = number[representative]
    for shard, name in enumerate(index.names):
        write_array(out / "representative" / f"{name}.npy", numbers[index.starts[shard] : index.starts[shard + 1]])


def _write_subset(path: Path, locations: SampleLocations, keep: np.ndarray, progress: Progress) -> bool:
    """DataComp's list of the uids kept. Returns False, and writes nothing, when the shards have no uids."""
    path.unlink(missing_ok=True)
    if not locations.has_field("uid"):
        return False
    values = [fields.get("uid") for _, fields in locations.read_json(np.flatnonzero(keep), progress)]
    uids = [uid for uid in values if isinstance(uid, str)]
    root = locations.index.root
    if len(uids) < len(values):
        raise UserError(
            f"{len(values) - len(uids)} of {len(values)} kept samples of {root} have no uid, others have: the subset "
            "file would lack them; add the uids"
        )
    try:
        subset = report.subset_array(uids)
    except ValueError as error:
        raise UserError(f"{root}: {error}; correct the json members") from None
    write_array(path, subset)
    return True
