"""The embedding stage: teacher embeddings of every pair of every shard, one partition per tar.

Legend: D width.

The files of a partition are written atomically; a partition is skipped if all its files exist and agree.
`settings.json` is written first, so a folder started with another model is refused; `meta.json` is written last. A
batch never spans two tars: a matrix product rounds differently when its shape changes, so the bits of a partition
depend on its tar and the batch size alone, not on interruptions, the number of ranks or the assignment of shards.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from megacid.data.copied_ahead import copied_ahead
from megacid.data.index import ShardIndex
from megacid.data.index_report import MAX_LOST, listed, percent
from megacid.data.workers import worker_start
from megacid.distributed.collectives import Group, barrier
from megacid.distributed.consensus import gather_json
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import Progress, StartProgress, no_progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.models.clip import LoadedClip
from megacid.models.hub import model_directory
from megacid.offline.embed.encoding import encode, rows_per_sample
from megacid.offline.embed.input import Batch, Crops, Pairs, as_is
from megacid.offline.embed.partitions import Failure, Layout, Partition, failures_if_complete, partition_files
from megacid.offline.embed.work_queue import Sharding, WorkQueue, create_queue
from megacid.storage.metadata import read_meta
from megacid.storage.stage_directory import WORK, StageDirectory

log = logging.getLogger(__name__)
_NAMED = 100  # skipped samples that meta.json lists by name; the failures tables list all
_LOGGED = 20  # skipped samples that each rank logs individually; after that every hundredth
_NUMBER = re.compile(r"\d+")  # reasons that differ in numbers are counted together
_RECORDED = ("model", "pretrained", "precision", "weights", "dim", "views")  # settings that meta.json repeats
_POLL_S = 1.0  # interval between checks for shards that other ranks have abandoned


class ShardBatchSampler(Sampler[list[int]]):
    """Batches of at most `batch_size` sample numbers, none of which spans two tars.

    Args:
        ends: int64 [tars], last sample number + 1 of each tar.
        shards: The shards to visit, an iterator consumed as batches are needed; None: all.
    """

    def __init__(self, ends: np.ndarray, batch_size: int, shards: Iterable[int] | None = None) -> None:
        self.ends, self.batch_size = ends.tolist(), batch_size
        self.shards = range(len(self.ends)) if shards is None else shards

    def __iter__(self) -> Iterator[list[int]]:
        for shard in self.shards:
            start, end = self.ends[shard - 1] if shard else 0, self.ends[shard]
            for low in range(start, end, self.batch_size):
                yield list(range(low, min(low + self.batch_size, end)))


class _ShardEmbedder:
    """Embeds the shards that this rank claims from the queue."""

    def __init__(
        self,
        index: ShardIndex,
        clip: LoadedClip,
        crops: Crops | None,
        out: Path,
        batch_size: int,
        workers: int,
        progress: Progress,
    ) -> None:
        self.index, self.clip, self.crops, self.out, self.progress = index, clip, crops, out, progress
        self.batch_size, self.workers = batch_size, workers
        self.written: list[int] = []
        self.failed = 0

    def run(self, queue: WorkQueue) -> None:
        """Claim and embed until the queue is finished, including shards whose rank died."""
        while True:
            shards = queue.claim()
            # Peek first: starting the data workers is expensive.
            if (first := next(shards, None)) is not None:
                self._embed(chain([first], shards), queue)
            elif queue.finished():
                return
            else:
                time.sleep(_POLL_S)
                self.progress(queue.note_progress(0))

    def _embed(self, shards: Iterable[int], queue: WorkQueue) -> None:
        loader = DataLoader(
            Pairs(self.index, self.clip.preprocess_eval, self.clip.tokenizer, self.crops),
            # The sampler runs in this process and claims shards at most a few batches ahead.
            batch_sampler=ShardBatchSampler(self.index.starts[1:], self.batch_size, shards),
            num_workers=self.workers,
            collate_fn=as_is,
            worker_init_fn=worker_start(),
        )
        partition = Partition()
        try:
            for batch in copied_ahead(loader, Batch.copied, self.clip.device):
                self._add(partition, batch)
                if partition.size == self.index.sizes[batch.shard]:
                    failpoint("embed:partition", step=batch.shard)
                    files = partition_files(self.out, batch.shard, len(self.index.names))
                    partition.save(files, batch.shard, self.index.names[batch.shard])
                    queue.finish(batch.shard)
                    self.written.append(batch.shard)
                    failpoint("embed:shard_done", step=batch.shard)
                    partition = Partition()
                self.progress(queue.note_progress(batch.size))
        except RuntimeError:
            self.progress(0)  # raises Stopped if a signal to the process group ended the workers: that is not a failure
            raise

    def _add(self, partition: Partition, batch: Batch) -> None:
        if batch.samples:
            encoded = encode(self.clip, self.index, batch)
            partition.image.append(encoded.image)
            partition.text.append(encoded.text)
            for parts, rows in (partition.views, encoded.views), (partition.captions, encoded.captions):
                if rows is not None:
                    parts.append(rows)
            partition.samples += batch.samples
        partition.failures += batch.failures
        for key, reason in batch.failures:
            self.failed += 1
            if self.failed <= _LOGGED or self.failed % 100 == 0:
                name = self.index.names[batch.shard]
                log.warning("skipped %s/%s (%d skipped by this rank): %s", name, key, self.failed, reason)


def weights_digest(model: str, pretrained: str | None) -> str:
    """sha256 of local weight files, which detects changed weights under the same name; "tag:NAME" for a tag."""
    if (folder := model_directory(model)) is not None:
        paths = sorted(
            path
            for path in folder.iterdir()
            if path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".json", ".txt", ".model")
            and path.name != "meta.json"
        )
    elif pretrained is not None and Path(pretrained).is_file():
        paths = [Path(pretrained)]
    else:
        return f"tag:{pretrained}"
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _check_space(out: Path, todo: int, dim: int, rows: float) -> float:
    need = todo * dim * 2 * rows * 1.02 + todo * 200  # the fp16 rows and the metadata of a sample
    free = shutil.disk_usage(out).free
    if need > free:
        raise UserError(
            f"{out} needs {need / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free: free space or take another --out"
        )
    return need


def embed(
    index: ShardIndex,
    clip: LoadedClip,
    out: Path,
    parallel: Parallel,
    *,
    settings: dict[str, Any],
    batch_size: int,
    workers: int,
    crops: Crops | None = None,
    sharding: Sharding = "dynamic",
    max_lost: float = MAX_LOST,
    start_progress: StartProgress = lambda total: no_progress,
) -> dict[str, Any]:
    """Embed the missing shards and write meta.json, whose content is returned.

    All ranks fail together with the same message, and stop together when the progress function raises Stopped.

    Args:
        settings: The model, precision, weights and views; recorded, and compared with those of a started folder.
        crops: Cuts the views that are embedded in addition to the whole images; None: no views.
        sharding: "static" assigns shard s to rank s % world. "dynamic" starts the same way; a rank that is done then
            takes over shards that no rank has started and those of ranks that died.
        max_lost: Share of the samples that may be skipped. Above it meta.json is not written; the partitions stay.
        start_progress: Called with the samples to embed on all ranks; returns the `Progress` that counts them.
    """
    group = parallel.group
    stage = StageDirectory(out, "embed", settings, notes={"batch_size": batch_size})
    shards, mine = len(index.names), range(parallel.rank, len(index.names), parallel.world)
    with stop_together(group):
        if parallel.is_first:
            if stage.finished() is not None:
                max_lost = 1.0  # it was accepted when the stage was finished
            stage.begin()
    layout = Layout(clip.embed_dim, crops.views.count if crops else 0, index.caption.several)
    missing, done = _done_shards(index, out, layout, mine, group)
    total = int(index.sizes[~done].sum())
    with stop_together(group):
        if parallel.is_first:
            need = _check_space(out, total, clip.embed_dim, rows_per_sample(index, crops))
            create_queue(_queue_file(out), done, parallel.world)
            log.info("%d of %d shards to do, %d samples, %.3f GB to write", (~done).sum(), shards, total, need / 1e9)
    queue = _open_queue(out, shards, parallel, sharding)
    # The queue is the inner block: a failing rank releases its claims before it waits for the other ranks.
    with stop_together(group), queue:
        embedder = _ShardEmbedder(index, clip, crops, out, batch_size, workers, start_progress(total))
        embedder.run(queue)
    samples = sum(gather_json(queue.samples_done, group))
    with stop_together(group):
        embedder.progress(queue.note_total(samples))
        # On a network file system the files of other ranks may not be visible here yet, so each rank checks its own.
        checked = sorted({*mine}.difference(missing).union(embedder.written))
        stats = verify(index, out, checked, layout)
    all_stats = gather_json(stats, group)
    with stop_together(group):
        if parallel.is_first:
            finish(stage, index, all_stats, max_lost)
            failpoint("embed:done")
    barrier(group)
    return read_meta(out, expect="embed")


def _done_shards(
    index: ShardIndex, out: Path, layout: Layout, mine: range, group: Group
) -> tuple[list[int], np.ndarray]:
    """(the shards of `mine` that lack a complete partition, bool [shards]: those that no rank lacks). A collective."""
    with stop_together(group):
        missing = [shard for shard in mine if failures_of(index, out, shard, layout) is None]
    done = np.ones(len(index.names), np.bool_)
    done[[shard for shards_of_rank in gather_json(missing, group) for shard in shards_of_rank]] = False
    return missing, done


def _queue_file(out: Path) -> Path:
    return out / WORK / "queue"


def _open_queue(out: Path, shards: int, parallel: Parallel, sharding: Sharding) -> WorkQueue:
    """The queue that the first rank created. A collective."""
    with stop_together(parallel.group):
        queue = WorkQueue(_queue_file(out), shards, parallel, sharding)
    if queue.sharding == "dynamic" and not queue.locks_are_shared(parallel.group):
        log.warning("%s is on a file system without locks between the ranks: using --sharding static", out)
        queue.sharding = "static"
    return queue


def failures_of(index: ShardIndex, out: Path, shard: int, layout: Layout) -> list[Failure] | None:
    """The samples that a complete partition skips; None when the partition is not complete."""
    files = partition_files(out, shard, len(index.names))
    return failures_if_complete(files, index.names[shard], index.table(shard).keys, layout)


def verify(index: ShardIndex, out: Path, shards: list[int], layout: Layout) -> dict[str, Any]:
    """Read partitions back: number of skipped samples by shard and by reason, names of the first."""
    by_shard: dict[str, int] = {}
    by_reason: Counter[str] = Counter()
    named: list[str] = []
    for shard in shards:
        failures = failures_of(index, out, shard, layout)
        if failures is None:
            raise UserError(
                f"{partition_files(out, shard, len(index.names)).image} or a file of its partition is not readable "
                "after it was written: check the disk and run the same command again"
            )
        stem = index.names[shard]
        if failures:
            by_shard[stem] = len(failures)
        by_reason.update(_NUMBER.sub("N", failure.reason) for failure in failures)
        named += [f"{stem}/{failure.key}" for failure in failures[: _NAMED - len(named)]]
    return {"by_shard": by_shard, "by_reason": dict(by_reason.most_common(_NAMED)), "named": named}


def _check_failures(index: ShardIndex, out: Path, by_reason: Counter[str], failed: int, max_lost: float) -> None:
    """Raise UserError when no sample, or fewer than 1 - `max_lost` of them, could be embedded."""
    if failed == index.num_samples:
        raise UserError(
            f"none of the {index.num_samples} samples of {index.root} could be embedded: check the images and "
            f"captions, the reasons are in {out / 'failures'}"
        )
    if failed > max_lost * index.num_samples:
        raise UserError(
            f"{failed:,} of {index.num_samples:,} samples of {index.root} could not be embedded, expected at most "
            f"{percent(max_lost)}: {listed(by_reason)}; see {out / 'failures'}, and repair the shards, or run the same "
            "command with --max-lost 1 to go on without these samples"
        )


def finish(
    stage: StageDirectory,
    index: ShardIndex,
    stats: list[dict[str, Any]],
    max_lost: float,
    source: dict[str, str] | None = None,
    **facts: Any,
) -> None:
    """Writes meta.json on one rank. stats: of `verify` on every rank; source, facts: added to it."""
    by_shard = {stem: count for part in stats for stem, count in part["by_shard"].items()}
    by_reason = sum((Counter(part["by_reason"]) for part in stats), Counter[str]())
    failed = sum(by_shard.values())
    _check_failures(index, stage.path, by_reason, failed, max_lost)
    named = sorted({name for part in stats for name in part["named"]})
    empty = [stem for stem, size in zip(index.names, index.sizes) if by_shard.get(stem, 0) == size]
    stage.commit(
        {"shards": index.paths.source} | (source or {}),
        **{name: stage.arguments[name] for name in _RECORDED if name in stage.arguments},
        partitions={stem: number for number, stem in enumerate(index.names)},
        empty=sorted(empty),
        shards_digest=index.digest,
        caption=index.caption.spec,
        num_samples=index.num_samples - failed,
        failures={"count": failed, "named": named[:_NAMED]},
        failures_by_shard=dict(sorted(by_shard.items())),
        failures_by_reason=dict(by_reason.most_common(_NAMED)),
        **facts,
    )
