"""Teacher embeddings of every pair of every shard, in clip-retrieval's layout, one partition per tar.

Legend: B batch, D width, n samples of one tar that could be decoded.

A partition is three files, each written atomically; one is skipped when all three are there and agree. `settings.json` is written
first, so that a folder begun with another model is refused; `meta.json` is written last. A batch never crosses from one
tar into the next: a product of matrices rounds differently when its shape changes, so only then does a partition not
depend on what else there was to do, and a run that was killed gives the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from megacid.checkpoint.store import read_meta, write_json_atomic, write_meta
from megacid.data.decode import BadSample, decode_caption, decode_image
from megacid.data.index import ShardIndex, ShardReader
from megacid.data.workers import worker_start
from megacid.distributed.collectives import barrier, gather_json
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.offline.files import disk_errors, sweep, write_array, writing
from megacid.offline.stopping import together
from megacid.probes import probe
from megacid.student import LoadedClip

log = logging.getLogger(__name__)
_NAMED = 100  # failed samples that meta.json names; all are counted


def files(out: Path, number: int) -> tuple[Path, Path, Path]:
    """(image embeddings, text embeddings, metadata) of one partition."""
    return (
        out / "img_emb" / f"img_emb_{number:05d}.npy",
        out / "text_emb" / f"text_emb_{number:05d}.npy",
        out / "metadata" / f"metadata_{number:05d}.parquet",
    )


def complete_keys(out: Path, number: int, stem: str, keys: list[str], dim: int) -> list[str] | None:
    """The keys of a partition that is complete and belongs to this tar; None when it has to be made (again)."""
    image, text, metadata = files(out, number)
    try:
        shapes = [np.load(path, mmap_mode="r", allow_pickle=False).shape for path in (image, text)]
        table = pq.read_table(metadata, columns=["image_path", "shard"])
    except (OSError, ValueError, EOFError, KeyError, pa.ArrowException):
        return None
    have: list[str] = table["image_path"].to_pylist()
    known = set(have)
    fits = shapes == [(len(have), dim)] * 2 and set(table["shard"].to_pylist()) <= {stem}
    return have if fits and [key for key in keys if key in known] == have else None


class Sample(NamedTuple):
    shard: int
    row: int
    image: Tensor | None  # [3, H, W]; None when the pair cannot be used
    text: Tensor | None  # int64 [T]
    caption: str
    reason: str


class Pairs(Dataset[Sample]):
    """Decoded pairs of some shards, shard after shard in tar order."""

    def __init__(
        self,
        index: ShardIndex,
        shards: list[int],
        transform: Callable[[Any], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
    ) -> None:
        self.reader, self.shards = ShardReader(index), shards
        self.transform, self.tokenizer = transform, tokenizer
        self.ends = np.cumsum([index.sizes[shard] for shard in shards])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, position: int) -> Sample:
        which = int(np.searchsorted(self.ends, position, side="right"))
        shard = self.shards[which]
        row = int(position - (self.ends[which - 1] if which else 0))
        try:
            data = self.reader.read(shard, row, "text")
            data.decode("utf-8")  # a caption is written to the metadata, where replaced bytes would pass for its words
            caption = decode_caption(data)
            image = self.transform(decode_image(self.reader.read(shard, row, "image")))
        except BadSample as error:
            return Sample(shard, row, None, None, "", error.reason)
        except UnicodeDecodeError as error:
            return Sample(shard, row, None, None, "", f"caption is not UTF-8: {error.reason}")
        return Sample(shard, row, image, self.tokenizer([caption])[0], caption, "")


class _Batches(Sampler[list[int]]):
    """Positions of `Pairs` in batches of at most batch_size, none of which crosses from one tar into the next."""

    def __init__(self, ends: np.ndarray, batch_size: int) -> None:
        """ends: int64 [tars], last position + 1 of each."""
        self.ends, self.batch_size = ends.tolist(), batch_size

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for end in self.ends:
            for low in range(start, end, self.batch_size):
                yield list(range(low, min(low + self.batch_size, end)))
            start = end


def _as_list(samples: list[Sample]) -> list[Sample]:
    return samples


@dataclass
class _Partition:
    """What has been embedded of one tar so far."""

    image: list[np.ndarray] = field(default_factory=list)
    text: list[np.ndarray] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    seen: int = 0

    def save(self, out: Path, number: int, stem: str, dim: int) -> None:
        image, text, metadata = files(out, number)
        for name, path, parts in (("image", image, self.image), ("text", text, self.text)):
            write_array(path, np.concatenate([np.empty((0, dim), np.float16), *parts]))
            probe(f"embed:{name}_written", step=number)
        columns = {"image_path": self.keys, "caption": self.captions, "shard": [stem] * len(self.keys)}
        table = pa.table({name: pa.array(value, pa.string()) for name, value in columns.items()})
        with writing(metadata) as temporary:
            pq.write_table(table, temporary)
        probe("embed:metadata_written", step=number)


def encode(clip: LoadedClip, index: ShardIndex, samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Image and text embeddings of decodable samples: float16 [B, D], L2-normalised.

    UserError naming the sample when one is not a finite vector of length 1.
    """
    images = torch.stack([sample.image for sample in samples if sample.image is not None])
    texts = torch.stack([sample.text for sample in samples if sample.text is not None])
    both = clip.encode_image(images).half().cpu(), clip.encode_text(texts).half().cpu()
    for what, emb_BD in zip(("image", "text"), both):
        length_B = emb_BD.float().norm(dim=1)
        bad = ~((length_B - 1).abs() < 0.01)  # also true for NaN
        if bad.any():
            at = int(bad.nonzero()[0])
            shard, row = samples[at].shard, samples[at].row
            raise UserError(
                f"model {clip.name} gives the {what} of sample {index.table(shard).keys[row]} (row {row} of "
                f"{index.root / index.names[shard]}.tar) an embedding of length {float(length_B[at]):g}, wanted a finite "
                "one of length 1: check the weights, or try --precision fp32"
            )
    return both[0].numpy(), both[1].numpy()


def _finished(
    index: ShardIndex, shards: list[int], loader: DataLoader[Sample], clip: LoadedClip, tick: Callable[[int], None]
) -> Iterator[tuple[int, _Partition]]:
    """(shard, its partition) as soon as the last sample of a tar is done; every batch is of one tar."""
    for shard in [shard for shard in shards if index.sizes[shard] == 0]:
        yield shard, _Partition()
    part = _Partition()
    for batch in loader:
        shard = batch[0].shard
        good = [sample for sample in batch if sample.image is not None]
        part.seen += len(batch)
        if good:
            image_BD, text_BD = encode(clip, index, good)
            part.image.append(image_BD)
            part.text.append(text_BD)
            part.keys += [index.table(shard).keys[sample.row] for sample in good]
            part.captions += [sample.caption for sample in good]
        for sample in batch:
            if sample.image is None:
                log.warning(
                    "left out %s/%s: %s", index.names[shard], index.table(shard).keys[sample.row], sample.reason
                )
        if part.seen == index.sizes[shard]:
            yield shard, part
            part = _Partition()
        tick(len(batch))


def weights_digest(model: str, pretrained: str | None) -> str:
    """sha256 of local weight files, so that other weights under the same name are noticed; the tag itself otherwise."""
    folder = Path(model.removeprefix("local-dir:"))
    if model.startswith("local-dir:"):
        paths = sorted(
            path
            for path in folder.iterdir()
            if path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".json") and path.name != "meta.json"
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
    sweep(out)
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
    progress: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
) -> dict[str, Any]:
    """Embed what is missing and write meta.json; returns it. `progress(total)` gives the function that takes samples done.

    Shards are split over the ranks (shard number % world). Every rank fails together, with the same message, and stops
    together when the function of `progress` raises Stopped.
    """
    group = parallel.group
    with together(group):
        if parallel.is_first:
            claim(out, settings, batch_size)
            (out / "meta.json").unlink(missing_ok=True)
    mine = range(parallel.rank, len(index.names), parallel.world)
    with together(group):
        todo = [s for s in mine if complete_keys(out, s, index.names[s], index.table(s).keys, clip.embed_dim) is None]
        count = int(sum(index.sizes[shard] for shard in todo))
        need = _check_space(out, count, clip.embed_dim)
        tick = progress(count)
        log.info(
            "rank %d: %d of %d shards to do, %d samples, %.3f GB to write",
            parallel.rank,
            len(todo),
            len(mine),
            count,
            need / 1e9,
        )
    with together(group):
        pairs = Pairs(index, todo, clip.preprocess_eval, clip.tokenizer)
        loader = DataLoader(
            pairs,
            batch_sampler=_Batches(pairs.ends, batch_size),
            num_workers=workers,
            collate_fn=_as_list,
            worker_init_fn=worker_start(),
        )
        try:
            for shard, part in _finished(index, todo, loader, clip, tick):
                probe("embed:partition", step=shard)
                part.save(out, shard, index.names[shard], clip.embed_dim)
                probe("embed:shard_done", step=shard)
        except RuntimeError:
            tick(0)  # a signal to the whole process group ends the workers too: then it is no failure
            raise
    with together(group):
        mine_facts = _verify(index, out, list(mine), clip.embed_dim)
    facts = gather_json(mine_facts, group)
    with together(group):
        if parallel.is_first:
            probe("embed:before_meta")
            with disk_errors(out / "meta.json"):
                _write_meta(index, clip, out, settings, facts)
            probe("embed:done")
    barrier(group)
    return read_meta(out, expect="embed")


def _verify(index: ShardIndex, out: Path, shards: list[int], dim: int) -> dict[str, Any]:
    """Rows and left out keys of every partition of one rank, read back from disk."""
    rows, failures = 0, 0
    failed: list[str] = []
    for shard in shards:
        keys = index.table(shard).keys
        have = complete_keys(out, shard, index.names[shard], keys, dim)
        if have is None:
            raise UserError(
                f"partition {shard} of {out} ({files(out, shard)[0]} and the two beside it) is not readable right after it "
                "was written: check the disk, and run the same command again"
            )
        rows += len(have)
        failures += len(keys) - len(have)
        known = set(have)
        failed += [f"{index.names[shard]}/{key}" for key in keys if key not in known][: _NAMED - len(failed)]
    return {"rows": rows, "failures": failures, "failed": failed}


def _write_meta(
    index: ShardIndex, clip: LoadedClip, out: Path, settings: dict[str, Any], facts: list[dict[str, Any]]
) -> None:
    rows = sum(fact["rows"] for fact in facts)
    if rows == 0:
        raise UserError(
            f"none of the {index.num_samples} samples of {index.root} could be embedded: see the reasons above, check the images and captions"
        )
    failed = sorted(name for fact in facts for name in fact["failed"])
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
        shards_digest=index.digest,
        num_samples=rows,
        failures={"count": sum(fact["failures"] for fact in facts), "named": failed[:_NAMED]},
    )


def seconds_per_sample(clip: LoadedClip, index: ShardIndex, batch_size: int) -> float:
    """Time of the model on one small batch of the first shard, for the estimate; NaN when nothing there can be decoded."""
    import time

    pairs = Pairs(index, [0], clip.preprocess_eval, clip.tokenizer)
    samples = [
        sample for sample in (pairs[i] for i in range(min(batch_size, 32, len(pairs)))) if sample.image is not None
    ]
    if not samples:
        return math.nan
    encode(clip, index, samples)  # the first run pays for lazy initialisation
    began = time.monotonic()
    encode(clip, index, samples)
    return (time.monotonic() - began) / len(samples)
