"""The balance stage: from embeddings and clusters to keep masks and representatives per tar, a report and a gallery.

Legend: n samples with an embedding.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megacid.data.index import ShardIndex, ShardReader, load_index, read_sample_json
from megacid.distributed.collectives import barrier
from megacid.distributed.consensus import any_rank
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import Progress, StartProgress, no_progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.offline.balance import gallery, report
from megacid.offline.balance.clusters import group_by_cluster
from megacid.offline.balance.context import BalanceContext, BalanceSettings
from megacid.offline.balance.deduplicate import Decision, decide, preference
from megacid.offline.balance.groups import (
    PERCEPTUAL_SHARE,
    Groups,
    perceptual_below,
    process,
    representative_distance,
    sample_cluster,
)
from megacid.offline.cluster.results import read_centroids, read_labels
from megacid.offline.nearest import Assigner, Metric, prepare
from megacid.offline.rows import EmbeddingRows
from megacid.storage.atomic import write_text
from megacid.storage.metadata import read_meta
from megacid.storage.npy import read_array, write_array
from megacid.storage.parquet import join_by_key
from megacid.storage.stage_directory import StageDirectory

log = logging.getLogger(__name__)


def tar_rows(index: ShardIndex, rows: EmbeddingRows) -> tuple[np.ndarray, np.ndarray]:
    """(shard int32 [n], row in its tar int64 [n]) of every embedded sample, joined by key."""
    shard, row = np.empty(rows.num_rows, np.int32), np.empty(rows.num_rows, np.int64)
    number = {name: i for i, name in enumerate(index.names)}
    for partition, stem in enumerate(rows.stems):
        where = slice(int(rows.starts[partition]), int(rows.starts[partition + 1]))
        shard[where] = number[stem]
        tar, remedy = index.root / f"{stem}.tar", f"run tools/embed.py again for {rows.directory}"
        row[where] = join_by_key(rows.keys(partition), index.table(number[stem]).keys, tar, remedy, require_all=True)
    return shard, row


def balance(
    embeddings: Path,
    clusters: Path,
    out: Path,
    settings: BalanceSettings,
    parallel: Parallel,
    *,
    shards: Path | None = None,
    gallery_groups: int = 40,
    start_progress: StartProgress = lambda total: no_progress,
) -> dict[str, Any]:
    """Decide, write everything, meta.json last; returns meta. Samples without an embedding are not kept: they cannot be decoded.

    shards: the tars the embeddings were made from; None: where they were then. An interrupted run goes on with the links
    it has; a complete folder is left as it is; a folder of other arguments or inputs is refused. All ranks stop together when the function of `start_progress` raises Stopped.
    """
    group = parallel.group
    progress = start_progress(0)
    with stop_together(group):
        rows = EmbeddingRows(embeddings)
        text = EmbeddingRows(embeddings, "text") if settings.keep == "caption" else None
        if text is not None and not np.array_equal(text.starts, rows.starts):
            at = int(np.flatnonzero(text.starts != rows.starts)[0]) - 1
            raise UserError(
                f"{text.name(int(text.starts[at]))} belongs to a partition with another number of rows than its images: "
                "run tools/embed.py again"
            )
        label, score, k = read_labels(clusters, rows)
        centroids: np.ndarray | None = None
        metric: Metric = "cosine"
        if settings.neighbor_clusters:
            centroids, metric = read_centroids(clusters, rows.dim)
        index = index_of(shards or rows.meta["source"]["shards"], rows)
        expected = _expected(settings, rows, label, score, k)
        if centroids is not None:
            expected["centroids"] = hashlib.sha256(centroids.tobytes()).hexdigest()
        expected["gallery_groups"] = gallery_groups
        stage = StageDirectory(out, "balance", expected)
        done = _complete(stage, index)
    # Label files may be read at different moments: all ranks have to find the same.
    if not any_rank(done is None, group):
        with stop_together(group):
            if parallel.is_first:
                stage.remove_partial_results()
        log.info("%s is complete", out)
        return read_meta(out, expect="balance")
    with stop_together(group):
        if parallel.is_first:
            stage.begin()
            stage.work.begin()
        priority = preference(settings.keep, score, settings.seed, rows, text, progress=progress)
        sorted_rows = group_by_cluster(label, priority, k)
    barrier(group)
    progress = start_progress(rows.num_rows)
    device = parallel.device
    assigner = None if centroids is None else Assigner(prepare(centroids, metric, device), metric, device)
    decision = decide(
        BalanceContext(rows, sorted_rows, settings, device, assigner, group, partial=stage.work, progress=progress)
    )
    with stop_together(group):
        if parallel.is_first:
            _write(stage, index, rows, label, k, decision, settings, clusters, progress)
    barrier(group)
    return read_meta(out, expect="balance")


def _expected(
    settings: BalanceSettings, rows: EmbeddingRows, label: np.ndarray, score: np.ndarray, k: int
) -> dict[str, Any]:
    """Everything that decides the result, as JSON: the arguments, the embeddings, and the labels to the last bit."""
    names = ("shards_digest", "model", "weights", "precision", "num_samples", "dim")
    return (
        asdict(settings)
        | {name: rows.meta.get(name) for name in names}
        | {"k": k, "labels": labels_digest(label, score)}
    )


def labels_digest(label: np.ndarray, score: np.ndarray) -> str:
    """sha256 of the labels and scores of all samples: what tells whether clusters are those that were balanced."""
    digest = hashlib.sha256(np.ascontiguousarray(label).tobytes())
    digest.update(np.ascontiguousarray(score).tobytes())
    return digest.hexdigest()


def _complete(stage: StageDirectory, index: ShardIndex) -> dict[str, Any] | None:
    """meta.json of a finished folder whose files are whole; None when it has to be made."""
    meta, out = stage.finished(), stage.path
    if meta is None:
        return None
    for name, size in zip(index.names, index.sizes.tolist()):
        for path, kind in ((out / "keep" / f"{name}.npy", "b"), (out / "representative" / f"{name}.npy", "i")):
            if read_array(path, (size,), kind) is None:
                log.warning("%s is damaged or missing: making it again", path)
                return None
    subset = read_array(out / "subset.npy", (int(meta["kept"]),), "V")
    page = out / "gallery.html"
    whole = {
        "report.json": _is_json(out / "report.json"),
        "gallery.html": page.is_file() and page.stat().st_size == meta["gallery_bytes"],
        "subset.npy": not meta["has_subset"] or subset is not None,
    }
    for name, good in whole.items():
        if not good:
            log.warning("%s is damaged or missing: making it again", out / name)
            return None
    return meta


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return True


def index_of(shards: Path | str, rows: EmbeddingRows) -> ShardIndex:
    """The tars that the embeddings were made from. UserError when they are others."""
    index = load_index(shards)
    if index.digest != rows.meta["shards_digest"]:
        raise UserError(
            f"{rows.directory} was made from other shards than {shards}: give the shards it was made from with --shards, or run tools/embed.py again"
        )
    return index


def _write(
    stage: StageDirectory,
    index: ShardIndex,
    rows: EmbeddingRows,
    label: np.ndarray,
    k: int,
    decision: Decision,
    settings: BalanceSettings,
    clusters: Path,
    progress: Progress,
) -> None:
    out = stage.path
    shard, row = tar_rows(index, rows)
    kept_of = _write_masks(out, index, shard, row, decision.keep, progress)
    _write_representatives(out, index, shard, row, decision.representative)
    facts = report.decision_facts(decision, label, k, settings.target_keep)
    facts["without_embedding"] = index.num_samples - rows.num_rows
    if report.has_field(index, "origin"):
        facts |= report.planted_facts(report.origins(index, shard, row, progress), decision, label)
    write_text(out / "report.json", json.dumps(facts, indent=2) + "\n")
    failpoint("balance:report")
    has_subset = _write_subset(out, index, shard, row, decision.keep, progress)
    reader = ShardReader(index)
    show = gallery.pictures(reader, shard, row, progress)
    write_text(out / "gallery.html", _gallery(rows, label, k, decision, facts, stage.arguments["gallery_groups"], show))
    reader.close()
    failpoint("balance:gallery")
    source = {
        "embeddings": str(rows.directory.resolve()),
        "clusters": str(clusters.resolve()),
        "shards": str(index.root.resolve()),
    }
    stage.commit(
        source,
        shards_digest=index.digest,
        kept=kept_of,
        total=index.num_samples,
        threshold=decision.threshold,
        **{
            name: getattr(settings, name)
            for name in ("target_keep", "link", "keep", "cap", "neighbor_clusters", "seed")
        },
        model=rows.meta["model"],
        gallery_bytes=(out / "gallery.html").stat().st_size,
        has_subset=has_subset,
        arguments=stage.arguments,
    )


def _write_masks(
    out: Path, index: ShardIndex, shard: np.ndarray, row: np.ndarray, keep: np.ndarray, progress: Progress
) -> int:
    total = 0
    for number, name in enumerate(index.names):
        mask = np.zeros(int(index.sizes[number]), bool)
        mask[row[(shard == number) & keep]] = True
        total += int(mask.sum())
        write_array(out / "keep" / f"{name}.npy", mask)
        failpoint("balance:keep", step=number)
        progress(0)
    return total


def _write_representatives(
    out: Path, index: ShardIndex, shard: np.ndarray, row: np.ndarray, representative: np.ndarray
) -> None:
    """representative/<tar>.npy: for every sample, counted over all tars in their order, the one kept for it; -1: without an embedding."""
    place = index.starts[shard] + row
    of = np.full(index.num_samples, -1, np.int64)
    of[place] = place[representative]
    for number, name in enumerate(index.names):
        write_array(out / "representative" / f"{name}.npy", of[index.starts[number] : index.starts[number + 1]])


def _gallery(
    rows: EmbeddingRows,
    label: np.ndarray,
    k: int,
    decision: Decision,
    facts: dict[str, Any],
    count: int,
    show: gallery.Show,
) -> str:
    """gallery.html: about half of the groups of each kind, one cluster, the sizes."""
    groups = Groups(decision.representative, representative_distance(rows, decision.representative))
    below = perceptual_below(decision.threshold)
    cluster = sample_cluster(label, decision.representative, k)
    sections = [
        (
            "Perceptual redundancy",
            f"{groups.count_perceptual(below):,} groups in which every removed picture is nearer than {below:.4f}, {PERCEPTUAL_SHARE:.0%} of the threshold, to the one that is kept (blue frame).",
            gallery.group_rows(groups.perceptual(below, -(-count // 2), 9), decision.keep, show),
        ),
        (
            "Semantic redundancy",
            f"{len(groups) - groups.count_perceptual(below):,} groups with a removed picture that is farther: the same thing seen again.",
            gallery.group_rows(groups.semantic(below, count // 2, 9), decision.keep, show),
        ),
        (
            "Cluster sizes",
            "Before and after, on logarithmic axes.",
            gallery.size_plot(*report.cluster_sizes(label, decision.keep, k)),
        ),
    ]
    if cluster is not None:
        shown = process(rows, label, decision.representative, decision.keep, decision.threshold, cluster)
        text = f"Cluster {cluster}, the one of median size among those with two groups or more: its embeddings along their first two principal components, pictures moved apart where they would overlap. Lines are pairs nearer than {decision.threshold:.4f}, colours are groups (grey: alone), pale pictures are removed."
        sections.insert(2, ("The process on one cluster", text, gallery.process_plot(shown, show)))
    summary = f"{facts['kept']:,} of {facts['total']:,} samples kept ({facts['share_kept']:.2%}), links below distance {decision.threshold:.5f}"
    return gallery.page("Redundant images", summary, sections)


def _write_subset(
    out: Path, index: ShardIndex, shard: np.ndarray, row: np.ndarray, keep: np.ndarray, progress: Progress
) -> bool:
    """DataComp's list of kept uids, when the shards carry them (then True); nothing otherwise."""
    path = out / "subset.npy"
    path.unlink(missing_ok=True)
    if not report.has_field(index, "uid"):
        return False
    reader = ShardReader(index)
    found = []
    for s, r in zip(shard[keep].tolist(), row[keep].tolist()):
        progress(0)
        found.append(read_sample_json(reader, s, r).get("uid"))
    reader.close()
    uids = [uid for uid in found if isinstance(uid, str)]
    if len(uids) < len(found):
        raise UserError(
            f"{len(found) - len(uids)} of {len(found)} kept samples of {index.root} have no uid, others have: the subset file would lose them; add the uids"
        )
    try:
        subset = report.subset_array(uids)
    except ValueError as error:
        raise UserError(f"{index.root}: {error}; correct the json members") from None
    write_array(path, subset)
    return True
