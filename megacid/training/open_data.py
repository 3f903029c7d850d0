"""Opens the training data of a run file: shards with their side tables, or features.

A mistake that only one rank sees, such as a file that is missing on its node, is the same error on every rank: local
work stands in `fail_together` blocks, collectives stand outside of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megacid.config.conditions import terms_with_teacher
from megacid.config.schema import RunFile
from megacid.config.sections import SourceConfig
from megacid.data.augmentation import recorded_views
from megacid.data.batch import Batch, Positions
from megacid.data.captions import CaptionSource
from megacid.data.ensemble import common_views, open_teachers
from megacid.data.features import FeatureSet, FeatureStream
from megacid.data.index import load_index
from megacid.data.joined import JoinSources
from megacid.data.joined_build import open_joined
from megacid.data.jpeg import image_reader
from megacid.data.loader import PairStream
from megacid.data.mixture import Mixture
from megacid.data.pairs import PairOptions
from megacid.data.pipes.commands import PREFIX, StreamPosition, digest, find_pipes
from megacid.data.pipes.reading import PipedPairs
from megacid.data.pipes.side_files import SideFiles
from megacid.data.pipes.stream import PipedStream
from megacid.data.remote.cache import ShardCache
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.sources import Source, check_sources_agree
from megacid.distributed.consensus import agree, fail_together
from megacid.distributed.divided_work import Workers
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.storage.metadata import read_meta

log = logging.getLogger("megacid")

_FETCH_LIMIT = 2 * 10**9  # bytes of remote tars that the start of a run may fetch to index them


class Stream(Protocol):
    """Micro-batches of one rank, a pure function of the start step."""

    def __iter__(self) -> Iterator[Batch]: ...
    def statistics(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Data:
    """The training data, and the sizes that the model takes from them."""

    stream: Callable[[int], Stream]  # from a start step
    teacher_dims: tuple[int, ...] = ()  # width of each teacher
    num_classes: int | None = None  # None: no labels
    centroids: Callable[[], AbstractContextManager[Path]] | None = None  # of the labels' clusters; None: they have none
    feature_dim: int | None = None  # None: pairs of images and texts
    normalize: Callable[[Tensor], Tensor] | None = None  # uint8 images -> the input; None: features
    samples: Callable[[Positions], Stream] | None = None  # pairs at other positions than those of the steps
    epoch_samples: int = 0
    teacher_has_text: bool = False
    position: StreamPosition | None = None  # of a stream that a checkpoint has to store; None: the step determines it
    progress: Callable[[int], dict[str, float]] = lambda samples: {}  # scalars of the sources after so many samples
    name_of: Callable[[int], str] = str  # a sample id, for messages

    @property
    def teacher_dim(self) -> int | None:
        """Width of all teachers together; None: no teacher."""
        return sum(self.teacher_dims) or None


def open_data(run: RunFile, parallel: Parallel) -> Data:
    """Open shards with their side tables, or features, and check that all ranks see the same content. A collective."""
    if run.megacid.data.features is not None:
        data = _open_features(run, run.megacid.data.features, parallel)
    elif (run.megacid.data.shards or "").startswith(PREFIX):
        data = _open_pipes(run, parallel)
    else:
        data = _open_pairs(run, parallel)
    with fail_together(parallel.group):
        stats = data.stream(0).statistics()
    log.info("data: %s", "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in stats.items()))
    return replace(data, epoch_samples=stats.get("rows" if data.feature_dim else "kept", 0))


def _positions(run: RunFile, parallel: Parallel, start_step: int) -> Positions:
    return Positions(
        run.global_batch, run.micro_batch, run.accumulation, parallel.rank, parallel.world,
        start_step, run.megacid.run.total_steps,
    )  # fmt: skip


def _open_features(run: RunFile, directory: str, parallel: Parallel) -> Data:
    with fail_together(parallel.group):
        features = FeatureSet(directory)
    agree(features.digest, f"the content of {directory}", parallel.group)

    def stream(start_step: int) -> FeatureStream:
        return FeatureStream(
            features,
            _positions(run, parallel, start_step),
            seed=run.megacid.run.seed,
            block_shards=run.megacid.data.block_shards,
            pin_memory=parallel.device.type == "cuda",
        )

    return Data(stream, num_classes=features.classes, feature_dim=features.dim)


def _open_pairs(run: RunFile, parallel: Parallel) -> Data:
    config = run.megacid.data
    with fail_together(parallel.group):
        check_views(run)
        check_weights(run)
        options, normalize = _pair_options(run, parallel)
        cache = ShardCache.open(config.cache_dir, config.cache_gb) if config.cache_dir else None
    tables = {name: _open_tables(run, source, cache, parallel) for name, source in config.all_sources.items()}
    with fail_together(parallel.group):
        check_sources_agree(tables)
    sources = []
    for name, source in config.all_sources.items():
        joined = open_joined(
            tables[name], config.block_shards, Path(run.megacid.run.dir), Workers(parallel), len(tables)
        )
        sources.append(Source(joined, name, source.weight))
    with fail_together(parallel.group):
        first = PairStream(sources, _positions(run, parallel, 0), options)
    teacher, labels = sources[0].teacher, sources[0].labels  # those of all, as `check_sources_agree` says
    return Data(
        lambda start_step: PairStream(sources, _positions(run, parallel, start_step), options),
        samples=lambda positions: PairStream(sources, positions, options),
        teacher_dims=tuple(table.dim for table in teacher.tables) if teacher else (),
        teacher_has_text=teacher is not None and teacher.has_text,
        num_classes=labels.num_classes if labels else None,
        centroids=labels.centroids if labels else None,
        normalize=normalize,
        progress=first.progress,
        name_of=first.name_of,
    )


def _pair_options(run: RunFile, parallel: Parallel) -> tuple[PairOptions, Callable[[Tensor], Tensor]]:
    """How pairs are read, and the normalisation of their images."""
    from megacid.models.clip import PixelNormalization, tokenizer_for, train_transform

    config, student = run.megacid.data, run.megacid.student
    options = PairOptions(
        transform=train_transform(student, config.augment, config.decoder),
        read_image=image_reader(config.decoder),
        tokenize=tokenizer_for(student),
        seed=run.megacid.run.seed,
        seeded_transform=config.augment != "none",
        workers=config.workers,
        worker_timeout_s=config.worker_timeout_s,
        prefetch=config.prefetch,
        error_budget=config.error_budget,
        max_image_pixels=config.max_image_pixels,
        block_shards=config.block_shards,
        pin_memory=parallel.device.type == "cuda",
    )
    return options, PixelNormalization(student, parallel.device, channels_last=student.channels_last)


def _open_pipes(run: RunFile, parallel: Parallel) -> Data:
    config, loss = run.megacid.data, run.megacid.loss
    assert config.shards is not None
    with fail_together(parallel.group):
        check_views(run)
        options, normalize = _pair_options(run, parallel)
        tars, caption = find_pipes(config.shards), CaptionSource.parse(config.caption)
        sides = SideFiles.open(
            tars,
            caption.spec,
            teachers=config.teachers if terms_with_teacher(loss) else (),
            labels=config.labels if loss.cluster else None,
            labels_per_sample=config.labels_per_sample,
            keep=config.keep,
        )
    agree(f"{digest(tars)} {sides.digest}", "the commands of data.shards and what is joined to them", parallel.group)
    position = StreamPosition(tars, parallel.rank, parallel.world, max(1, config.workers))
    log.info(
        "data.shards are %d commands, read by %d loader processes of %d ranks: a resumed run continues at the next tar "
        "of each process, so the rest of the tar that it was reading, and up to %d samples of its shuffle buffer, are "
        "left out", len(tars), parallel.world * max(1, config.workers), parallel.world, config.shuffle_buffer,
    )  # fmt: skip

    def stream(plan: Positions, turns: Sequence[int]) -> PipedStream:
        return PipedStream(PipedPairs(tars, sides, caption, options, plan, turns, config.shuffle_buffer))

    first_turns = tuple(position.next_turns)
    return Data(
        lambda start_step: stream(_positions(run, parallel, start_step), position.next_turns),
        samples=lambda positions: stream(positions, first_turns),
        teacher_dims=tuple(table.dim for table in sides.teachers),
        teacher_has_text=sides.has_text,
        num_classes=sides.labels.num_classes if sides.labels else None,
        centroids=sides.labels.centroids if sides.labels else None,
        normalize=normalize,
        position=position,
    )


def check_weights(run: RunFile) -> None:
    """Raise UserError when a source would give no sample in the whole run."""
    sources, samples = run.megacid.data.all_sources, run.megacid.run.total_steps * run.global_batch
    weights = {name: source.weight for name, source in sources.items()}
    for (name, weight), count in zip(weights.items(), Mixture(list(weights.values())).counts(samples)):
        if count == 0:
            raise UserError(
                f'"megacid.data.sources.{name}.weight" is {weight:g} of {sum(weights.values()):g} in all, which gives '
                f"no sample among the {samples} of the run: raise it, or remove the source"
            )


def _open_tables(run: RunFile, source: SourceConfig, cache: ShardCache | None, parallel: Parallel) -> JoinSources:
    """The index and the side tables of a source. A collective."""
    loss, workers = run.megacid.loss, Workers(parallel)
    index = load_index(source.shards, caption=source.caption, cache=cache, fetch_limit=_FETCH_LIMIT, workers=workers)
    agree(index.digest, f"the content of {source.shards}", parallel.group)
    with fail_together(parallel.group):
        teacher = labels = None
        if source.teachers and terms_with_teacher(loss):
            teacher = open_teachers(source.teachers, index, cache)
        if source.labels and loss.cluster:
            labels = LabelTable(source.labels, index, run.megacid.data.labels_per_sample, cache)
        return JoinSources(index, teacher, labels, KeepTable(source.keep, index) if source.keep else None)


def check_views(run: RunFile) -> None:
    """Raise UserError unless the student sees the crops that the teacher has embedded. Reads no data."""
    config = run.megacid.data
    teachers = [path for source in config.all_sources.values() for path in source.teachers]
    if not (teachers and terms_with_teacher(run.megacid.loss)):
        return
    views = common_views({path: recorded_views(read_meta(path, "embed"), path) for path in teachers})
    teacher = teachers[0]
    if views is None:
        return
    if config.augment != "random_resized_crop":
        raise UserError(
            f'"megacid.data.augment" is "{config.augment}", expected "random_resized_crop", since {teacher} has '
            f'embeddings of {views.count} crops per image: write "random_resized_crop", or run tools/embed.py without '
            "--views into another directory"
        )
    from megacid.models.clip import crops_digest

    if (own := crops_digest(run.megacid.student)) != views.crops:
        raise UserError(
            f"{teacher} has embeddings of other crops (digest {views.crops}) than this installation of open_clip and "
            f"torch cuts (digest {own}): install the versions in its meta.json, or run tools/embed.py again"
        )
