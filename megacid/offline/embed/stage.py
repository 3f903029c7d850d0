"""Teacher embeddings of every pair of every shard, in clip-retrieval's layout, one partition per tar.

Legend: B batch, D width.

The files of a partition are written atomically; one is skipped when all are there and agree. `settings.json` is written
first, so that a folder begun with another model is refused; `meta.json` is written last. A batch never crosses from one
tar into the next: a product of matrices rounds differently when its shape changes, so only then does a partition not
depend on what else there was to do, and neither a kill nor the number of ranks nor who did what changes a bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from megacid.data.index import ShardIndex
from megacid.data.workers import worker_start
from megacid.distributed.collectives import barrier
from megacid.distributed.consensus import gather_json
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import Progress, StartProgress, no_progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.models.clip import LoadedClip
from megacid.offline.embed.input import Batch, Pairs, as_is
from megacid.offline.embed.partitions import Partition, left_out, partition_files
from megacid.offline.embed.work_queue import Ledger, Split, create_ledger
from megacid.storage.atomic import write_json_atomic
from megacid.storage.metadata import read_meta, write_meta
from megacid.storage.stage_files import WORK, disk_errors, remove_temporary_files

log = logging.getLogger(__name__)
_NAMED = 100  # failed samples that meta.json names; all are counted, and the tables of failures hold all
_LOGGED = 20  # samples left out that every rank logs one by one; then every hundredth
_LOOK_AGAIN_S = 1.0  # for work of ranks that are gone


class _Batches(Sampler[list[int]]):
    """Numbers of samples in batches of at most batch_size, none of which crosses from one tar into the next."""

    def __init__(self, ends: np.ndarray, batch_size: int, shards: Iterable[int] | None = None) -> None:
        """ends: int64 [tars], last number + 1 of each. shards: which, asked for one at a time; None: all."""
        self.ends, self.batch_size = ends.tolist(), batch_size
        self.shards = range(len(self.ends)) if shards is None else shards

    def __iter__(self) -> Iterator[list[int]]:
        for shard in self.shards:
            start, end = self.ends[shard - 1] if shard else 0, self.ends[shard]
            for low in range(start, end, self.batch_size):
                yield list(range(low, min(low + self.batch_size, end)))


def encode(clip: LoadedClip, index: ShardIndex, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Image and text embeddings of what could be decoded: float16 [B, D], L2-normalised.

    UserError naming the sample when one is not a finite vector of length 1.
    """
    both = clip.encode_image(batch.image).half().cpu(), clip.encode_text(batch.text).half().cpu()
    for what, emb_BD in zip(("image", "text"), both):
        length_B = emb_BD.float().norm(dim=1)
        bad = ~((length_B - 1).abs() < 0.01)  # also true for NaN
        if bad.any():
            at = int(bad.nonzero()[0])
            raise UserError(
                f"model {clip.name} gives the {what} of sample {batch.about[at].key} (row {batch.rows[at]} of "
                f"{index.tar_path(batch.shard)}) an embedding of length {float(length_B[at]):g}, expected a finite "
                "one of length 1: check the weights, or try --precision fp32"
            )
    return both[0].numpy(), both[1].numpy()


class _Work:
    """Embeds the pieces that this rank takes from the ledger."""

    def __init__(
        self, index: ShardIndex, clip: LoadedClip, out: Path, batch_size: int, workers: int, progress: Progress
    ) -> None:
        self.index, self.clip, self.out, self.progress = index, clip, out, progress
        self.batch_size, self.workers = batch_size, workers
        self.made: list[int] = []
        self.failed = 0

    def do_all(self, ledger: Ledger) -> None:
        """Until everything is done that this rank has to see done, also what ranks that are gone had claimed."""
        while True:
            pieces = ledger.take()
            # Workers are started only where there is something for them.
            if (first := next(pieces, None)) is not None:
                self._do(chain([first], pieces), ledger)
            elif ledger.finished():
                return
            else:
                time.sleep(_LOOK_AGAIN_S)
                self.progress(ledger.advance(0))

    def _do(self, pieces: Iterable[int], ledger: Ledger) -> None:
        loader = DataLoader(
            Pairs(self.index, self.clip.preprocess_eval, self.clip.tokenizer),
            # Claims are made as the workers need them: in this process, at most a few batches ahead.
            batch_sampler=_Batches(self.index.starts[1:], self.batch_size, pieces),
            num_workers=self.workers,
            collate_fn=as_is,
            worker_init_fn=worker_start(),
        )
        part = Partition()
        try:
            for batch in loader:
                self._add(part, batch)
                if part.seen == self.index.sizes[batch.shard]:
                    failpoint("embed:partition", step=batch.shard)
                    files = partition_files(self.out, batch.shard, len(self.index.names))
                    part.save(files, batch.shard, self.index.names[batch.shard])
                    ledger.finish(batch.shard)
                    self.made.append(batch.shard)
                    failpoint("embed:shard_done", step=batch.shard)
                    part = Partition()
                self.progress(ledger.advance(batch.size))
        except RuntimeError:
            self.progress(0)  # a signal to the whole process group ends the workers too: then it is no failure
            raise

    def _add(self, part: Partition, batch: Batch) -> None:
        if batch.about:
            image_BD, text_BD = encode(self.clip, self.index, batch)
            part.image.append(image_BD)
            part.text.append(text_BD)
            part.about += batch.about
        part.failures += batch.failures
        for key, reason in batch.failures:
            self.failed += 1
            if self.failed <= _LOGGED or self.failed % 100 == 0:
                name = self.index.names[batch.shard]
                log.warning("left out %s/%s, number %d of this rank: %s", name, key, self.failed, reason)


def weights_digest(model: str, pretrained: str | None) -> str:
    """sha256 of local weight files, so that other weights under the same name are noticed; the tag itself otherwise."""
    folder = Path(model.removeprefix("local-dir:"))
    if model.startswith("local-dir:"):
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


def claim(out: Path, settings: dict[str, Any], batch_size: int) -> None:
    """Write settings.json, or check that the folder was begun with the same; UserError naming both otherwise."""
    path = out / "settings.json"
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    remove_temporary_files(out)
    if path.exists():
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path} is damaged: delete {out} or take another --out") from None
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"{out} was made with {name} {before.get(name)!r}, this run has {value!r}: take another --out or delete it"
                )
        if before.get("batch_size") != batch_size:
            log.warning(
                "%s was begun with batch size %s, this run has %d: what is there is kept, it may differ in the last bit",
                out,
                before.get("batch_size"),
                batch_size,
            )
    elif any(out.iterdir()):
        raise UserError(f"{out} is not empty and was not made by tools/embed.py: take another --out")
    else:
        with disk_errors(path):
            write_json_atomic(path, {**settings, "batch_size": batch_size})


def _check_space(out: Path, todo: int, dim: int) -> float:
    need = todo * dim * 4 * 1.02 + todo * 200  # two fp16 rows, and what a caption takes
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
    split: Split = "steal",
    start_progress: StartProgress = lambda total: no_progress,
) -> dict[str, Any]:
    """Embed what is missing and write meta.json; returns it.

    split: "static" gives shard s to rank s % world; "steal" does so first, and a rank that is done goes on with what no
    other has begun, or a rank that is gone had. start_progress: called with the samples that all ranks together have to do;
    gives the function that takes those done, by all ranks as far as this one knows. Every rank fails together, with the
    same message, and stops together when that function raises Stopped.
    """
    group, path = parallel.group, out / WORK / "ledger"
    shards, mine = len(index.names), range(parallel.rank, len(index.names), parallel.world)
    with stop_together(group):
        if parallel.is_first:
            claim(out, settings, batch_size)
            (out / "meta.json").unlink(missing_ok=True)
    with stop_together(group):
        missing = [shard for shard in mine if _left_out(index, out, shard, clip.embed_dim) is None]
    done = np.ones(shards, np.bool_)
    done[[shard for part in gather_json(missing, group) for shard in part]] = False
    total = int(index.sizes[~done].sum())
    with stop_together(group):
        if parallel.is_first:
            need = _check_space(out, total, clip.embed_dim)
            create_ledger(path, done, parallel.world)
            log.info("%d of %d shards to do, %d samples, %.3f GB to write", (~done).sum(), shards, total, need / 1e9)
    with stop_together(group):
        ledger = Ledger(path, shards, parallel, split)
    if ledger.split == "steal" and not ledger.locks_are_shared(group):
        log.warning("%s lies on a file system without locks between the ranks: --split static is used", out)
        ledger.split = "static"
    # The ledger is the inner block: a rank that fails gives up its claims before it waits for the others.
    with stop_together(group), ledger:
        work = _Work(index, clip, out, batch_size, workers, start_progress(total))
        work.do_all(ledger)
    samples = sum(gather_json(ledger.mine, group))
    with stop_together(group):
        work.progress(ledger.learn(samples))
        # What others have made may not be visible here yet, when the file system is that of a network.
        seen = sorted({*mine}.difference(missing).union(work.made))
        facts = _verify(index, out, seen, clip.embed_dim)
    all_facts = gather_json(facts, group)
    with stop_together(group):
        if parallel.is_first:
            failpoint("embed:before_meta")
            shutil.rmtree(path.parent, ignore_errors=True)
            with disk_errors(out / "meta.json"):
                _write_meta(index, clip, out, settings, all_facts)
            failpoint("embed:done")
    barrier(group)
    return read_meta(out, expect="embed")


def _left_out(index: ShardIndex, out: Path, shard: int, dim: int) -> list[str] | None:
    """Keys of a tar that a complete partition leaves out; None when it is not complete."""
    files = partition_files(out, shard, len(index.names))
    failures = left_out(files, index.names[shard], index.table(shard).keys, dim)
    return None if failures is None else [failure.key for failure in failures]


def _verify(index: ShardIndex, out: Path, shards: list[int], dim: int) -> dict[str, Any]:
    """What is in the partitions of some shards, read back from disk: failed samples by shard, the first ones by name."""
    by_shard: dict[str, int] = {}
    named: list[str] = []
    empty: list[str] = []
    for shard in shards:
        failed = _left_out(index, out, shard, dim)
        if failed is None:
            raise UserError(
                f"partition {shard} of {out} ({partition_files(out, shard, len(index.names)).image} and those beside it) is "
                "not readable right after it was written: check the disk, and run the same command again"
            )
        stem = index.names[shard]
        if failed:
            by_shard[stem] = len(failed)
        if len(failed) == index.sizes[shard]:
            empty.append(stem)
        named += [f"{stem}/{key}" for key in failed[: _NAMED - len(named)]]
    return {"by_shard": by_shard, "named": named, "empty": empty}


def _write_meta(
    index: ShardIndex, clip: LoadedClip, out: Path, settings: dict[str, Any], facts: list[dict[str, Any]]
) -> None:
    by_shard = {stem: count for fact in facts for stem, count in fact["by_shard"].items()}
    failed = sum(by_shard.values())
    if failed == index.num_samples:
        raise UserError(
            f"none of the {index.num_samples} samples of {index.root} could be embedded: see {out / 'failures'}, check the "
            "images and captions"
        )
    named = sorted({name for fact in facts for name in fact["named"]})
    write_meta(
        out,
        "embed",
        source={"shards": str(index.root.resolve())},
        model=settings["model"],
        pretrained=settings["pretrained"],
        precision=settings["precision"],
        weights=settings["weights"],
        dim=clip.embed_dim,
        partitions={stem: number for number, stem in enumerate(index.names)},
        empty=sorted({stem for fact in facts for stem in fact["empty"]}),
        shards_digest=index.digest,
        num_samples=index.num_samples - failed,
        failures={"count": failed, "named": named[:_NAMED]},
        failures_by_shard=dict(sorted(by_shard.items())),
    )


def seconds_per_sample(clip: LoadedClip, index: ShardIndex, batch_size: int) -> tuple[float, float]:
    """Seconds that decoding (in one process) and the model take for one sample, measured on a small batch of the first
    shard that has samples; NaN when nothing there can be decoded."""
    shard = int(np.flatnonzero(index.sizes)[0])
    start, count = int(index.starts[shard]), min(batch_size, 32, int(index.sizes[shard]))
    began = time.monotonic()
    batch = Pairs(index, clip.preprocess_eval, clip.tokenizer).__getitems__(list(range(start, start + count)))
    decoding = (time.monotonic() - began) / count
    if not batch.about:
        return math.nan, math.nan
    encode(clip, index, batch)  # the first run pays for lazy initialisation
    began = time.monotonic()
    encode(clip, index, batch)
    return decoding, (time.monotonic() - began) / len(batch.about)
